"""The contract: what a policy may say, and when it is asked.

A policy is a frozen dataclass. Its fields are its hyper-parameters and its YAML keys. The base class is dense
attention, so a method writes only what differs. A policy object never changes: what it must remember stands in the
cache, as a column (per slot) or a summary (per row and KV head), and moves with the tokens.

One decode step of one layer, in order:

    make room   priority(kv)      only where storage is full: the slot with the lowest priority is overwritten
    append      on_append(kv, new)
    select      select(query, kv)
    attend
    observe     on_attend(kv, mass)

A prompt (or a chunk of one) is attended densely: append, attend, observe; when it is complete, on_prefill, and storage
is compacted to the budget.

Letters: B rows, K KV heads, G query heads per KV head, T slots in use, S slots chosen, D head size, Q new tokens.
"""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch

from .cache.layouts import KeyLayout

if TYPE_CHECKING:
    from .cache.layer import LayerCache, NewTokens

# What a column or summary holds: one number (a dtype), or a vector (dtype, size); size "D" is the head size.
Shape = torch.dtype | tuple[torch.dtype, "int | str"]


class Observe(enum.Enum):
    """Which reduced form of the attention weights a policy needs; the full matrix is never formed."""

    NONE = "none"
    MASS = "mass"  # per slot: the weight it received, summed over queries, averaged over the group


class Tail(NamedTuple):
    """What stands for the slots that were not chosen: `output = (1 - weight) * attention + weight * value`."""

    weight: torch.Tensor  # [B, K, G], float32, in [0, 1]
    value: torch.Tensor  # [B, K, D]


class Selection(NamedTuple):
    """The slots to read at this step. A group of query heads reads one set."""

    slots: torch.Tensor  # [B, K, S], int64; the first `counts` of them are read, each at most once
    counts: torch.Tensor  # [B, K], integer, at most S
    tail: Tail | None = None


@dataclasses.dataclass(frozen=True)
class Policy:
    """Base of all policies, itself dense attention: reads everything, keeps everything.

    A policy with a field `budget: int` keeps at most that many tokens per KV head, the current one included.
    """

    name: ClassVar[str] = ""
    paper: ClassVar[str] = ""
    capturable: ClassVar[bool] = (
        True  # a step has constant shapes and never looks at the device: see graph.py
    )

    # ---------------------------------------------------------------- declarations
    # Properties, so that they may depend on the parameters; a plain class attribute of the same name will do.
    @property
    def columns(self) -> Mapping[str, Shape]:
        """What the cache keeps per slot for this policy; zero for a new token."""
        return {}

    @property
    def summaries(self) -> Mapping[str, Shape]:
        """What the cache keeps per row and KV head; zero at first."""
        return {}

    @property
    def observes(self) -> Observe:
        """Which form of the attention weights `on_attend` is given."""
        return Observe.NONE

    @property
    def key_layout(self) -> KeyLayout:
        """How the keys lie in memory; it changes speed and memory, never a result."""
        return KeyLayout()

    # ---------------------------------------------------------------- two questions
    def select(self, query: torch.Tensor, kv: LayerCache) -> Selection | None:
        """What to read at this decode step; None reads every live slot. Does not modify the cache.

        `query` is `[B, K, G, D]`, rotated as the model does, not scaled. The current token is already in `kv`.
        """
        return None

    def priority(self, kv: LayerCache) -> torch.Tensor:
        """Who stays when storage is full: `[B, K, T]`, higher stays. Does not modify the cache.

        Asked when the prompt is complete (the best `budget` stay) and at every decode step whose storage is full (the
        lowest is overwritten by the new token, which `kv.seen` already counts). Dead slots may hold anything.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has a budget, so it must say who stays: priority(kv)"
        )

    # ---------------------------------------------------------------- notices
    def on_append(self, kv: LayerCache, new: NewTokens) -> None:
        """The new tokens stand in `kv`. May write columns and summaries."""

    def on_attend(self, kv: LayerCache, mass: torch.Tensor) -> None:
        """Attention has read; `mass [B, K, T]` float32 per slot, if the policy observes it. May write columns."""

    def on_prefill(self, kv: LayerCache) -> None:
        """The prompt is complete in this layer, not yet compacted. May write columns and summaries."""

    # ---------------------------------------------------------------- configuration
    @classmethod
    def for_compression(cls, ratio: float, head_size: int, context: int) -> Self:
        """This policy with the parameters that read `ratio` of dense attention's bytes at `context` tokens."""
        raise NotImplementedError(f"{cls.name} has no for_compression: give its parameters instead")

    def for_layer(self, layer: int, layers: int) -> Policy:
        """The policy of layer `layer` of `layers`; wrappers answer differently per layer."""
        return self

    def check(self, head_size: int) -> None:
        """Raise UserError if these parameters cannot serve a model with this head size."""

    def slots_kept(self) -> int | None:
        """How many slots a KV head holds once the prompt is complete; None keeps all."""
        return getattr(self, "budget", None)

    def spec(self) -> dict[str, Any]:
        """`{name: parameters}`, from which specs.policy_from_spec makes an equal policy."""

        def plain(value: Any) -> Any:
            if isinstance(value, Policy):
                return value.spec()
            return [plain(item) for item in value] if isinstance(value, list | tuple) else value

        return {
            self.name: {field.name: plain(getattr(self, field.name)) for field in dataclasses.fields(self)}
        }
