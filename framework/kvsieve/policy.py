"""The contract: what a policy may say, and when it is asked.

A policy is a frozen dataclass. Its fields are its hyper-parameters and its YAML keys. The base class is dense
attention, so a method writes only what differs. A policy object never changes: what it must remember stands
in the cache, as a column (per slot) or a summary (per row and KV head), and moves with the tokens.

One decode step of one layer, in order:

    make room   priority(kv)      only where storage is full: the slot with the lowest priority is overwritten
    append      on_append(kv, new)
    select      select(query, kv), on_select(kv, selection)
    attend
    observe     on_attend(kv, mass)

A prompt (or a chunk of one) is attended densely: append, on_queries, attend, observe; when it is complete,
on_prefill, then `cut(kv)` says which slots stay: by default the `keeps` with the highest priority.

Declarations and answers are checked: see contract/.

Letters: B rows, K KV heads, G query heads per KV head, T slots in use, S slots chosen, D head size, Q new
tokens.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch

from .cache.columns import KEYS, Column, Paged, Shape
from .cache.layouts import KeyLayout
from .errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .cache.kv import KVView
    from .cache.new_tokens import NewTokens

__all__ = [
    "KEYS",
    "Column",
    "Far",
    "Observe",
    "Paged",
    "Pass",
    "Policy",
    "Positions",
    "Ranking",
    "Selection",
    "Shape",
    "Tail",
    "Wants",
]


class Observe(enum.Enum):
    """The reduced form of the attention weights that a policy needs; the full matrix is never formed."""

    NONE = "none"
    # Per slot: the weight it received, summed over queries, averaged over the group.
    MASS = "mass"
    # The same, of decode steps alone: a prompt is read without computing it.
    STEP_MASS = "step mass"
    # Per slot and query head, `[B, K, G, T]`: summed over queries, not averaged over the group.
    HEADS = "heads"


class Positions(enum.Enum):
    """The positions at which a policy needs keys and queries."""

    # Those that tokens have in their row's text.
    TEXT = "text"
    # Places among the tokens that are held: where some are dropped, the cache turns the keys of those behind
    # them once, and the model goes on at the next place. Needs a model with rotary embeddings, and every row
    # to hold as many tokens in all layers and heads; nothing is overwritten.
    CACHE = "cache"
    # Its own: it turns keys or queries by `kv.turned`, and so needs a model with rotary embeddings.
    OWN = "own"


class Pass(NamedTuple):
    """One part of the reading of a prompt: see `Policy.plan`."""

    first: int  # of the row's prompt, the tokens from `first` on
    last: int  # and before `last`
    # False: a probe. Its tokens see what is held and are observed (`kv.probing`), then taken back.
    stays: bool = True
    # Before it, every KV head keeps only so many slots: those with the highest priority. None: all.
    room: int | None = None
    # Before it, what was read counts as a complete prompt: `on_prefill`, `cut`.
    cut: bool = False
    # Its one token is fed as a decode step, so that `select` is asked.
    step: bool = False
    # Of a probe, fed before its tokens: text, token ids, or a range of the prompt's tokens.
    before: tuple[str | range | tuple[int, ...], ...] = ()


class Wants(enum.Flag):
    """Things that a policy needs to know of the tokens beyond keys and values."""

    NOTHING = 0
    # Their ids: `new.ids`.
    IDS = 1
    # How unexpected they were: `on_surprise`. It costs the logits of the whole prompt, or of a piece of it.
    SURPRISE = 2


class Ranking(NamedTuple):
    """A priority told by its parts: a step whose storage is full then finds the lowest slot in one kernel."""

    by: torch.Tensor  # [B, K, T], floating or int64; higher stays
    newest: int = 0  # of the row's tokens the newest, the one being written counted, stay before all others
    oldest: int = 0  # and its first

    def priority(self, kv: KVView) -> torch.Tensor:
        """The same in numbers `[B, K, T]`, floating."""
        ranks = self.by if self.by.is_floating_point() else self.by.float()
        if self.newest:
            ranks = ranks.masked_fill(kv.newest(self.newest), torch.inf)
        if self.oldest:
            ranks = ranks.masked_fill(kv.oldest(self.oldest), torch.inf)
        return ranks


class Tail(NamedTuple):
    """Stands for the slots that were not chosen: `output = (1 - weight) * attention + weight * value`."""

    weight: torch.Tensor  # [B, K, G], float32, in [0, 1]
    value: torch.Tensor  # [B, K, D]


class Far(NamedTuple):
    """More slots to read at this step, by another query: the step's own at another position, say.

    One softmax weighs them together with those of the selection.
    """

    slots: torch.Tensor  # [B, K, F], int64; the first `counts` of them are read, none is of the selection's
    counts: torch.Tensor  # [B, K], integer, at most F
    query: torch.Tensor  # [B, K, G, D], of the type of the step's query


class Selection(NamedTuple):
    """The slots to read at this step. A group of query heads reads one set."""

    slots: torch.Tensor  # [B, K, S], int64; the first `counts` of them are read, each at most once
    counts: torch.Tensor  # [B, K], integer, at most S
    tail: Tail | None = None
    far: Far | None = None


@dataclasses.dataclass(frozen=True)
class Policy:
    """Dense attention: reads everything, keeps everything. The base of all policies."""

    name: ClassVar[str] = "dense"
    paper: ClassVar[str] = ""
    # Fields that only say who is dropped: nothing but `cut`, `cut_together`, `priority` and the rooms of a
    # `plan` goes by them. In a comparison, policies that differ in nothing else read a prompt together until
    # one of them drops.
    drops_by: ClassVar[tuple[str, ...]] = ()

    # ---------------------------------------------------------------- declarations
    # Properties, so that they may depend on the parameters; a plain class attribute of the same name will do.
    @property
    def keeps(self) -> int | None:
        """Tokens that a KV head keeps once the prompt is complete, at most; None: no limit.

        Needs `priority`, or a `cut` and `overwrites = False`.
        """
        return None

    @property
    def overwrites(self) -> bool:
        """Whether a new token takes the slot with the lowest priority once `keeps` slots are in use.

        If so, the current token counts among the `keeps`. Else the cache grows after the prompt.
        """
        return True

    @property
    def columns(self) -> Mapping[str, Column]:
        """Numbers that the cache keeps for this policy per slot, zero for a new token; or, `Paged`, per page
        of slots, zero at first.
        """
        return {}

    @property
    def summaries(self) -> Mapping[str, Shape]:
        """Numbers that the cache keeps per row and KV head; zero at first.

        Size "S" is that of the `[B, K, S]` written last, and 0 at first and after every prompt; such a step
        is not `capturable`.
        """
        return {}

    @property
    def observes(self) -> Observe:
        """The form of the attention weights that `on_attend` is given."""
        return Observe.NONE

    @property
    def adds_mass_to(self) -> str | None:
        """A column, float32, that adds up the mass of all attention, without an `on_attend`; None: none.

        In a step attention itself adds it.
        """
        return None

    @property
    def positions(self) -> Positions:
        """The positions at which keys and queries are needed."""
        return Positions.TEXT

    @property
    def any_order(self) -> bool:
        """Whether slots may stand in any order, as they do once tokens are overwritten.

        So in a policy that overwrites, or has no `select`. One that selects and keeps every token finds them
        in the order of the text, but inside a sliding window, where it acts only if it declares this.
        """
        return type(self).select is Policy.select or (self.keeps is not None and self.overwrites)

    @property
    def in_windows(self) -> bool:
        """Whether it acts in layers with a sliding window too, within the window; else those are dense."""
        return False

    @property
    def drops(self) -> bool:
        """Whether it drops tokens, by `keeps` or a `cut` of its own: found out, and not to be declared."""
        return self.keeps is not None or self.cuts_together or type(self).cut is not Policy.cut

    @property
    def cuts_together(self) -> bool:
        """Whether all layers are cut by one decision, `cut_together`, instead of each at its own end."""
        return False

    @property
    def wants(self) -> Wants:
        """Things that it needs to know of the tokens beyond keys and values."""
        return Wants.NOTHING

    @property
    def last_queries(self) -> int:
        """Number of a row's last prompt queries that are held until the prompt is complete.

        `on_prefill` and `cut` then find their attention in `kvsieve.ops.window_weights(kv)`.
        """
        return 0

    @property
    def key_layout(self) -> KeyLayout:
        """The order of the keys in memory; it changes speed and memory, never a result.

        "auto" is for policies that read keys by channels: the fastest layout on the device of the cache.
        """
        return KeyLayout()

    @property
    def capturable(self) -> bool:
        """Whether a step has constant shapes and never waits for the device: it can then be a CUDA graph."""
        return True

    def keeps_per_head(self, layer: int, heads: range) -> Sequence[int | None] | None:
        """Return the tokens that each KV head ever holds, None: no limit; or None: heads are alike.

        Asked once, when the layer's storage is made, of the model's KV heads `heads` that this process has. A
        head with a limit overwrites, by `priority`, once it holds so many; one without grows. `cut` says who
        stays of a prompt.
        """
        return None

    def bind(
        self, layer: int, heads: range, head_size: int, device: torch.device
    ) -> Mapping[str, torch.Tensor]:
        """Return static data of layer `layer`, by name: tensors `[K, ...]` on `device`, found as `kv.static`.

        Asked once, when the layer's storage is made. `heads` are the KV heads of the model that this process
        has: all, unless the model is split. Raises UserError where the data is for another model.
        """
        return {}

    def plan(self, segments: Sequence[int]) -> Sequence[Pass] | None:
        """Say how a prompt of such segments is read; None: as a whole.

        `segments` are numbers of tokens: those of a row, such as its context and its question, or the turns
        of a conversation; one, where the caller of `decode` gives none. The passes that stay are the prompt,
        in order. The prompt is complete after the last one. Raises UserError where it needs other segments.
        """
        return None

    # ---------------------------------------------------------------- questions
    def select(self, query: torch.Tensor, kv: KVView) -> Selection | None:
        """Choose the slots to read at this decode step; None reads every live one.

        Does not modify the cache. `query` is `[B, K, G, D]`, rotated as the model does, not scaled. The
        current token is already in `kv`.
        """
        return None

    def priority(self, kv: KVView) -> torch.Tensor | Ranking:
        """Rank the slots when storage is full: `[B, K, T]`, floating; higher stays. Or say it as a `Ranking`.

        Asked when the prompt is complete (the best `keeps` stay) and, if the policy `overwrites`, at every
        decode step whose storage is full (the lowest is overwritten by the new token, which `kv.seen` already
        counts). Dead slots may hold anything. Of equal ones the lower slot goes. Does not modify the cache.
        """
        raise NotImplementedError(
            f"{type(self).__name__} keeps {self.keeps} tokens: priority(kv) must rank them"
        )

    def cut(self, kv: KVView) -> torch.Tensor | None:
        """Choose the slots that stay, once, when the prompt is complete: `[B, K, T]` bool.

        None: the `keeps` best by `priority`, or all where `keeps` is None. Heads may keep different numbers,
        none more than `keeps`, each at least one live slot; dead slots are not chosen. Asked after
        `on_prefill`, in a conversation at the end of every turn of several tokens. Does not modify the cache.
        Afterwards the cache grows, or `overwrites`.
        """
        return None

    def cut_together(self, layers: Sequence[KVView]) -> Sequence[torch.Tensor | None]:
        """Answer for `cut`, once for all layers whose policy equals this one: for each, in their order.

        Asked when the last of them has read the prompt, if the policy declares `cuts_together`; until then
        all layers hold all of it. The layers may be on several devices.
        """
        raise NotImplementedError(
            f"{type(self).__name__} declares `cuts_together`: cut_together(layers) must answer"
        )

    def sees(self, kv: KVView, new: NewTokens) -> torch.Tensor | None:
        """Choose the slots that each new token of a prompt, or of a piece of it, may see: `[B, Q, T]` bool.

        None: all. Of what it answers, causal order leaves those up to the token's own, which must be among
        them. For models that were trained with such a mask; in a decode step `select` chooses. As large as it
        is: a long prompt is read in pieces (`prefill_chunk`). Does not modify the cache.
        """
        return None

    # ---------------------------------------------------------------- notices
    def on_append(self, kv: KVView, new: NewTokens) -> None:
        """The new tokens stand in `kv`. May write columns and summaries."""

    def on_queries(self, kv: KVView, queries: torch.Tensor, new: NewTokens) -> None:
        """A prompt, or a piece of one, was written: its queries `[B, K, G, Q, D]`, rotated, not scaled.

        The first `new.counts [B]` are real, the others may hold anything. `kv.notes` is for what is gathered
        from them until `cut`.
        """

    def on_select(self, kv: KVView, selection: Selection | None) -> None:
        """`select` has answered at this step. May write columns and summaries, for the next steps to find."""

    def on_attend(self, kv: KVView, mass: torch.Tensor) -> None:
        """Attention has read; `mass [B, K, T]` float32 is what each slot received; of `Observe.HEADS`,
        `[B, K, G, T]`. May write columns. Where it is not overridden, it adds the mass to `adds_mass_to`.
        """
        if self.adds_mass_to is not None:
            kv[self.adds_mass_to] += mass

    def on_surprise(self, kv: KVView, surprise: torch.Tensor, new: NewTokens) -> None:
        """The model has read the new tokens: `surprise [B, Q]` float32 is -log P(token | those before it).

        A row's real ones first; NaN for a row's first token of all, and beyond the real ones. For a policy
        that wants it: after each forward, a probe excepted, and before the prompt is cut. May write columns
        and summaries.
        """

    def on_prefill(self, kv: KVView) -> None:
        """The prompt is complete in this layer, nothing is dropped yet. May write columns and summaries.

        In a conversation every turn of several tokens is a prompt.
        """

    # ---------------------------------------------------------------- configuration
    @classmethod
    def for_compression(cls, ratio: float, head_size: int, context: int) -> Self:
        """Make this policy with the parameters that read `ratio` of dense attention's bytes at `context`
        tokens.
        """
        if cls is Policy:
            if ratio != 1:
                raise UserError(f"dense attention reads everything: its compression is 1, not {ratio:g}")
            return cls()
        raise NotImplementedError(
            f"{cls.name} cannot be asked for a compression: give its parameters instead"
        )

    @classmethod
    def for_memory(cls, share: float, head_size: int, context: int) -> Self:
        """Make this policy with the parameters that hold `share` of the bytes of dense attention's cache.

        Of a prompt of `context` tokens, once it is complete; columns and summaries are counted. Where the
        cache grows, what is generated comes on top.
        """
        if cls is Policy:
            if share != 1:
                raise UserError(f"dense attention keeps everything: its memory is 1, not {share:g}")
            return cls()
        raise NotImplementedError(f"{cls.name} cannot be asked for memory: give its parameters instead")

    @classmethod
    def for_tokens(cls, tokens: int, head_size: int, context: int) -> Self:
        """Make this policy with the parameters that read `tokens` tokens whole, keys and values, at a step.

        At most so many; per KV head, or on average where heads or layers differ. Where tokens are dropped
        once, they are so many of the prompt, and what is generated comes on top.
        """
        raise NotImplementedError(f"{cls.name} cannot be asked for tokens: give its parameters instead")

    def for_layer(self, layer: int, layers: int) -> Policy:
        """Return the policy of layer `layer` of `layers`; wrappers answer differently per layer."""
        return self

    def in_layout(self, layout: KeyLayout) -> Policy | None:
        """Return this policy with its keys in another layout; None if the layout is no parameter of it."""
        return None

    def check(self, head_size: int) -> None:
        """Raise UserError if these parameters cannot serve a model with this head size."""

    def check_model(self, model: PreTrainedModel) -> None:
        """Raise UserError if these parameters are for another model: asked when a cache is made for one."""

    def files(self) -> Mapping[str, str]:
        """Return the files that it reads, by parameter; their contents are part of a result's id."""
        return {}

    def spec(self) -> dict[str, Any]:
        """Return `{name: parameters}`, plain data from which specs.make_policy makes an equal policy."""

        def plain(value: Any) -> Any:
            if isinstance(value, Policy):
                return value.spec()
            return [plain(item) for item in value] if isinstance(value, list | tuple) else value

        return {
            self.name: {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        }
