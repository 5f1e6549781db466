"""One layer of the cache: transformers' protocol, and the writing and dropping of tokens under a policy."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol, cast

import torch
from transformers.cache_utils import CacheLayerMixin

from .. import contract, ops, processes, transfer
from ..errors import UserError
from ..policy import Policy, Positions, Ranking, Selection, Wants
from . import layouts
from .forward import Forward, kind_of_forward
from .kv import KVView, Scoring, Static
from .new_tokens import NewToken, NewTokens
from .prompt import LastQueries, Written
from .rotary import Rotary
from .slots import Checkpoint, Slots
from .traffic import Traffic
from .windows import Window, Windowed

_NO_LIMIT = torch.iinfo(torch.int64).max


class BeforeProbe(NamedTuple):
    """A layer as it was before a probe."""

    fed: int
    slots: Checkpoint
    summaries: dict[str, torch.Tensor]
    last_queries: LastQueries | None


class Observer(Protocol):
    """Hears what a layer writes, and what it answers at a decode step: see diagnostics.py."""

    def wrote(self, layer: LayerCache, new: NewTokens) -> None: ...

    def answered(
        self, layer: LayerCache, query: torch.Tensor, selection: Selection | None, output: torch.Tensor
    ) -> None: ...


class LayerCache(CacheLayerMixin):
    """One layer's slots under one policy.

    Args:
        policy: of this layer.
        capacity: tokens a row can hold; None grows as needed. A policy that keeps fewer holds those.
        index: of the layer in the model, for messages.
        window: what a token sees of the layer, where that is not all before it. The policy acts inside.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(
        self, policy: Policy, capacity: int | None = None, index: int = 0, window: Window | None = None
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        contract.check_class(cast(Any, type(policy)))
        contract.check_declarations(policy)
        self.window = window
        # A window that holds all that it shows is full before a token leaves it; where a policy holds fewer,
        # one may leave before.
        self.leaves_early = window is not None and policy.keeps is not None
        if window is not None:
            policy = Windowed(policy, window)
        self.policy, self.index = policy, index
        self.slots = Slots(policy.key_layout, policy.columns, policy.summaries)
        self.traffic = Traffic()
        self.mass_column = contract.mass_column(policy)  # to which attention itself adds
        self.packs = contract.packs(policy)  # heads that keep different numbers
        self.overwrites = policy.keeps is not None and policy.overwrites
        # The most that each KV head ever holds; None: it grows. One for all until their number is known.
        self.limits: list[int | None] = [policy.keeps if self.overwrites else None]
        self._limits: torch.Tensor | None = None  # [K] int64, where heads differ
        self.kv = KVView(self.slots, self.traffic, in_order=not self.overwrites)
        self.asked_capacity = capacity
        self.fed = 0  # token columns so far, padding included: what transformers calls the sequence length
        self.prompt_end: int | None = None  # token columns of the prompt, where that is known
        self.expected: Forward | None = None  # the kind of the next forward, where whoever feeds it says so
        self.forward = Forward.PROMPT  # the kind of the forward that is running
        self.incoming: tuple[torch.Tensor, torch.Tensor] | None = None  # keys and values not yet written
        self.ids: torch.Tensor | None = None  # [B, Q] of the incoming tokens, if the policy wants them
        # [B, V] of each row's last token, NaN before the first: by them the next one is a surprise. They are
        # the model's, held in one layer, because they move with the rows.
        self.last_logits: torch.Tensor | None = None
        self.arrived: NewTokens | None = None  # until their surprise is known, if the policy wants it
        self.active: torch.Tensor | None = None  # [B] bool: rows that still decode; None: all
        self.unpacked = False  # it was packed, and a prompt is being read into padded storage
        # The layers that `cut_together` cuts, in their order; none: this one alone. (A list of itself would
        # keep the storage of every cache until the garbage is collected.)
        self.together: list[LayerCache] = []
        self.before_probe: BeforeProbe | None = None  # while one runs
        self.lends = False  # other layers attend to these slots too (gemma3n)
        # A prompt ends when its last forward is over, because this layer lends, or one that is cut with it.
        self.waits = False
        self.waiting = False  # for that
        self.model_heads: int | None = None  # KV heads of the layer in all processes, where that is known
        self.group: int | None = None  # query heads per KV head, where that is known
        self.counts_steps = True  # in a model one layer counts them for all
        self.observer: Observer | None = None

    # ---------------------------------------------------------------- a forward
    @property
    def scoring(self) -> Scoring:
        """The model's way from products to logits in this layer."""
        return self.kv._scoring

    @scoring.setter
    def scoring(self, scoring: Scoring) -> None:
        self.kv._scoring = scoring

    def turn_by(self, rotary: Rotary) -> None:
        """Take the rotary embedding of the model's layer, for a policy whose positions are not the text's."""
        if self.policy.positions is Positions.CACHE:
            self.slots.rotary = rotary
        else:
            self.kv._rotary = rotary

    def begin_step(self, valid: torch.Tensor | None) -> None:
        """A decode step begins; counted if a meter measures. `valid [B, 1]` False: that row has ended."""
        if valid is not None:
            self.active = valid[:, 0]
        self.traffic.begin(transfer.current(), self.active)

    def end_step(self) -> None:
        """A decode step has ended: dense attention would have read every token seen, or the window."""
        slots = self.slots
        if self.traffic.meter is not None:
            self.kv._count_changes()
            seen = slots.seen if self.window is None else slots.seen - self.window.first(slots.seen - 1)
            self.traffic.dense(seen[:, None].expand_as(slots.lengths), 2 * slots.head_size, slots.dtype)
        self.traffic.begin(None, None)

    def take_token(self) -> NewTokens:
        """Take in the incoming token of each row: for a free slot, or the one with the lowest priority.

        `write_token` writes it, with what `on_append` has added; or whoever looks before that.
        """
        keys, values = self._take_incoming()
        slots, active = self.slots, self.active
        coming = slots.ones if active is None else active
        if self.window is not None and self.window.chunks:
            begins = (slots.seen % self.window.size == 0) & coming.bool()
            slots.lengths.masked_fill_(begins[:, None], 0)
        limits = [limit for limit in self.limits if limit is not None]
        most, lowest = max(limits, default=None), None
        full = most if self._limits is None else self._limits
        if most is not None and (slots.used >= min(limits) or self.leaves_early):
            slots.coming = coming
            lowest = self._lowest(most)
            if self.window is not None and self.leaves_early:
                oldest = slots.positions.gather(2, lowest[..., None])[..., 0]
                full = most * (oldest >= self.window.first(slots.seen - 1)[:, None])
            slots.coming = None
        if not slots.fixed and (self._most is None or slots.used < self._most):
            self._make_room(slots.used + 1)
            slots.used += 1
        ids = self._take_ids(coming)
        new = NewToken(slots, keys, values, active, ids, full, lowest)
        self._count_appended(new)
        self.kv._arriving = new
        return new

    def write_token(self, new: NewTokens) -> None:
        """Write the token that was taken in, and all that goes with it."""
        self.kv._settle()
        self._arrived(new)

    def _count_appended(self, new: NewTokens) -> None:
        if self.traffic.meter is None:
            return
        slots = self.slots
        written = new.counts[:, None].expand(slots.lengths.shape)
        self.traffic.written("keys", written, slots.head_size * slots.key_copies, slots.dtype)
        self.traffic.written("values", written, slots.head_size, slots.dtype)
        if self.counts_steps:
            self.traffic.steps(new.counts)

    def append_prompt(self, valid: torch.Tensor | None) -> NewTokens:
        """Write the incoming Q tokens of each row after its live slots.

        `valid [B, Q]` bool marks the real ones; None: all.
        """
        keys, values = self._take_incoming()
        if self.forward is not Forward.PROBE:  # which begins its pass with what is seen
            self.leave_unseen()
        self.kv._steps = 0
        self.slots.clear_free_sizes()
        rows, _, new, _ = keys.shape
        slots, order = self.slots, None
        counts = torch.full((rows,), new, device=keys.device)
        if valid is not None:
            order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
            counts = valid.sum(1)
            real = torch.arange(new, device=keys.device) < counts[:, None]
            index = order[:, None, :, None].expand(keys.shape)
            # Padding may be anything, NaN included: storage must stay finite.
            keys = keys.gather(2, index).masked_fill(~real[:, None, :, None], 0)
            values = values.gather(2, index).masked_fill(~real[:, None, :, None], 0)
        if slots.packing is not None:
            self.check_room(slots.used + new)
            slots.unpack(slots.used + new)
            self.unpacked = True
        self._make_room(slots.used + new)
        starts = slots.lengths.clone()
        at = slots.append_tokens(keys, values, counts)
        slots.used += new
        self.kv._prompt.written = Written(starts, counts, order)
        tokens = NewTokens(keys, values, counts, at, self._take_ids(counts, order))
        self._arrived(tokens)
        return tokens

    def _arrived(self, new: NewTokens) -> None:
        self.arrived = new if Wants.SURPRISE in self.policy.wants else None
        if self.observer is not None:
            self.observer.wrote(self, new)

    def take_surprise(self, surprise: torch.Tensor) -> None:
        """Tell the policy the surprise `[B, Q]` of the tokens of the last forward; end the prompt, if it was
        its end.
        """
        if self.arrived is None:
            return
        new, self.arrived = self.arrived, None
        in_step = self.forward is Forward.STEP
        self.traffic.begin(transfer.current() if in_step else None, self.active)
        self.policy.on_surprise(self.kv, surprise.to(self.device), new)
        if in_step:
            self.kv._count_changes()
        self.traffic.begin(None, None)
        if self.forward is Forward.PROMPT:
            self.end_prompt()

    def complete_prompt(self) -> None:
        """A prompt's last forward has passed this layer: the prompt ends, now or when all have read it."""
        self.waiting = self.waits
        if not self.waiting:
            self.end_prompt()

    def end_forward(self) -> None:
        """The last forward is over in all layers: a prompt that has waited for that ends."""
        if self.waiting:
            for layer in self.together or [self]:
                layer.waiting = False
                layer.end_prompt()

    def end_prompt(self) -> None:
        """The prompt is complete: tell the policy, ask it who stays, and drop the others.

        Layers that are cut together wait for the last of them.
        """
        self.policy.on_prefill(self.kv)
        together = self.together or [self]
        if not self.policy.cuts_together:
            self._cut(self.policy.cut(self.kv))
        elif self is together[-1]:
            answers = self.policy.cut_together([layer.kv for layer in together])
            contract.check_answers(answers, self.policy, len(together))
            for layer, answer in zip(together, answers, strict=True):
                layer._cut(answer)

    def _cut(self, answer: torch.Tensor | None) -> None:
        """Drop what does not stay: all but what `cut` answered, or all but the best `keeps` by priority."""
        keeps, slots, unpacked = self.policy.keeps, self.slots, self.unpacked
        if answer is None and unpacked and keeps is None:  # all stay, packed again
            answer = slots.live()
        cut = contract.checked_cut(answer, self.policy, self.index, slots, self.limits)
        self.kv._prompt.forget_cut()
        self.unpacked = False
        if cut is not None:
            if self.packs and (self._limits is not None or (self._most is None and cut.heads_differ)):
                slots.pack(cut.stays, cut.counts, self.limits)
            elif cut.drops or slots.used > cut.most:
                slots.keep_where(cut.stays, cut.most)
        elif keeps is not None and slots.used > keeps:
            # Sorted: the order of tokens is kept.
            slots.keep(self._priority().topk(keeps, dim=2).indices.sort(dim=2).values)

    def leave_unseen(self) -> None:
        """Drop what a window does not show to the next token; put the others in their order."""
        slots = self.slots
        if self.window is None or slots.used == 0:
            return
        first = self.window.first(slots.seen)[:, None, None]
        seen = slots.live() & (slots.positions >= first)
        order = slots.positions.masked_fill(~seen, _NO_LIMIT).argsort(dim=2)[..., : self.window.size]
        counts = seen.sum(2)
        free = torch.arange(order.shape[2], device=order.device) >= counts[..., None]
        slots.keep(order.masked_fill(free, -1))
        slots.lengths.copy_(counts)

    def since(self, new: int) -> torch.Tensor | None:
        """The first slot `[B, K, Q]` that each of a prompt's `new` tokens sees; None: all see from 0 on."""
        if self.window is None or self.fed <= self.window.size:
            return None
        slots, written = self.slots, self.kv._prompt.written
        assert written is not None
        tokens = (slots.seen - written.counts)[:, None] + torch.arange(new, device=slots.device)
        first = self.window.first(tokens)[:, None].expand(*slots.lengths.shape, new)
        # Slots are in the order of their tokens: `leave_unseen` put them so.
        positions = slots.positions.masked_fill(~slots.live(), _NO_LIMIT)
        return torch.searchsorted(positions, first.contiguous())

    def discard_incoming(self) -> None:
        """Forget the tokens that `update` took: nothing is written."""
        self.incoming = None

    def _take_incoming(self) -> tuple[torch.Tensor, torch.Tensor]:
        assert self.incoming is not None
        taken, self.incoming = self.incoming, None
        return taken

    def _take_ids(self, counts: torch.Tensor, order: torch.Tensor | None = None) -> torch.Tensor | None:
        """The ids `[B, Q]` of the tokens just taken, a row's `counts [B]` real ones first, -1 beyond."""
        if Wants.IDS not in self.policy.wants:
            return None
        if self.ids is None:
            raise UserError(
                f"policy {self.policy.name} wants the ids of tokens, and this forward came without them"
            )
        ids, self.ids = self.ids.to(counts.device), None
        if order is not None:
            ids = ids.gather(1, order)
        return ids.masked_fill(torch.arange(ids.shape[1], device=ids.device) >= counts[:, None], -1)

    def _lowest(self, most: int) -> torch.Tensor:
        """`[B, K]`: the slot with the lowest priority.

        No head that overwrites holds more than `most`: the slots beyond, of heads that grow, are not ranked.
        """
        slots = self.slots
        used, slots.used = slots.used, min(slots.used, most)
        ranking = self._ranking()
        lowest = ops.lowest(ranking.by, self.kv, newest=ranking.newest, oldest=ranking.oldest)
        slots.used = used
        return lowest

    def _ranking(self) -> Ranking:
        answer = contract.checked_priority(self.policy.priority(self.kv), self.policy, self.index, self.slots)
        self.kv._count_changes()
        return answer

    def _priority(self) -> torch.Tensor:
        """`[B, K, T]`; dead slots are the lowest."""
        return self._ranking().priority(self.kv).masked_fill(~self.slots.live(), -torch.inf)

    # ---------------------------------------------------------------- a prompt that is read by a plan
    def make_way(self, rooms: torch.Tensor | None) -> None:
        """Keep the `rooms [B]` slots with the highest priority in each row and KV head, in their order."""
        if rooms is None or self.is_empty:
            return
        lengths = self.slots.lengths
        counts = torch.minimum(lengths, rooms.to(lengths.device)[:, None])
        most, drops = torch.stack([counts.max(), (counts < lengths).any()]).tolist()
        if not drops:
            return
        self.kv._prompt.room = rooms.to(lengths.device)
        priority = self._priority()
        self.kv._prompt.room = None
        order = priority.argsort(dim=2, descending=True, stable=True)
        among = torch.arange(self.slots.used, device=lengths.device) < counts[..., None]
        self.slots.keep_where(torch.zeros_like(among).scatter_(2, order, among), most)

    def begin_pass(self, kind: Forward, rows: torch.Tensor, spans: torch.Tensor) -> None:
        """The rows marked `[B]` begin a pass over tokens `spans [B, 2]` of their prompts."""
        prompt, slots = self.kv._prompt, self.slots
        prompt.probing, prompt.span = kind is Forward.PROBE, spans
        if self.is_empty:
            return
        self.leave_unseen()
        lengths = slots.lengths
        earlier = torch.zeros_like(lengths) if prompt.pass_starts is None else prompt.pass_starts
        prompt.pass_starts = torch.where(rows.to(slots.device)[:, None], lengths, earlier)
        if prompt.probing:
            summaries = {name: summary.clone() for name, summary in slots.summaries.items()}
            self.before_probe = BeforeProbe(self.fed, slots.checkpoint(), summaries, prompt.last_queries)

    def end_pass(self, ragged: bool) -> None:
        """Take a probe back; `ragged`: some rows brought fewer tokens than others."""
        slots, prompt = self.slots, self.kv._prompt
        self.end_forward()
        if self.before_probe is not None:
            before, self.before_probe = self.before_probe, None
            self.fed, prompt.last_queries = before.fed, before.last_queries
            slots.restore(before.slots)
            slots.summaries.update(before.summaries)
        elif ragged:
            slots.used = int(slots.lengths.max())
        self.expected, prompt.probing = None, False

    def go_on_from(self, other: LayerCache) -> None:
        """Hold a copy of what another layer holds between two passes over the same prompts, as if read here.

        This layer is empty; the policies have done the same so far.
        """
        slots = other.slots
        keys = layouts.by_token(slots.keys, slots.used)
        if not (self.is_initialized and self.slots.fits(keys)):
            self.lazy_initialization(keys, slots.values)
        self._make_room(slots.used)
        self.slots.hold_copy_of(slots)
        self.kv._prompt.go_on_from(other.kv._prompt)
        self.kv._steps = other.kv._steps
        self.fed, self.scoring = other.fed, other.scoring
        if other.last_logits is not None:
            with torch.inference_mode(False):  # reset() may be called outside of it
                self.last_logits = other.last_logits.clone()

    # ---------------------------------------------------------------- room
    def fix_shapes(self, tokens: int) -> None:
        """Make room for `tokens` a row, or for the kept ones: decode steps then have constant shapes."""
        self.end_forward()
        to_come = tokens - self.fed
        self.slots.fix(self.slots.used + to_come if self._most is None else min(tokens, self._most))
        # The prompt is in, and from now on `fed` stands still: it cannot tell. `count_fed` counts.
        self.prompt_end = None
        self.kv._steps += 1

    def end_decode(self) -> None:
        """No decode uses the cache any more: rows that had ended may go on, and the storage may grow."""
        self.active = None
        if self.slots.fixed:
            self.slots.unfix()
            self.kv._steps -= 1  # it counted the step that would have come

    def count_fed(self) -> None:
        """Count one more token fed while shapes are fixed: outside of the step, which may be a graph."""
        self.fed += 1
        self.kv._steps += 1

    def check_room(self, tokens: int) -> None:
        """Raise UserError if a row can never hold this many tokens."""
        if self.asked_capacity is not None and self._most is None and tokens > self.asked_capacity:
            raise UserError(
                f"the cache holds {self.asked_capacity} tokens a row (capacity), and {tokens} are needed"
            )

    def memory_by_row(self, room: torch.Tensor) -> list[int]:
        """Bytes that each row would hold alone, with room for `room [B]` tokens; its prompt is complete."""
        slots = self.slots
        room = room.to(slots.device)
        ends = slots.lengths + (room - slots.seen)[:, None]
        if slots.packing is not None:
            slots_of_rows = (
                ends if self._limits is None else self._limits.where(self._limits < _NO_LIMIT, ends)
            ).sum(1)
        else:
            slots_of_rows = ends.amax(1) if self._most is None else room.clamp(max=self._most)
        return [slots.memory_of(n) for n in slots_of_rows.tolist()]

    @property
    def _most(self) -> int | None:
        """Slots that are ever in use once the prompt is complete."""
        return None if None in self.limits else max(filter(None, self.limits))

    def _make_room(self, needed: int) -> None:
        if needed > self.slots.capacity:
            self.check_room(needed)
            at_most = self._most
            if at_most is None and self.asked_capacity is not None:
                to_come = self.asked_capacity - self.fed
                # No more than is still to come; below 0 where a plan has dropped tokens of a longer text.
                at_most = needed + to_come if to_come >= 0 else self.asked_capacity
            self.slots.make_room(needed, at_most)

    # ---------------------------------------------------------------- transformers' protocol
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.policy.check(key_states.shape[3])
        new = key_states.shape[2]
        keeps_all = self.policy.keeps is None
        self.slots.allocate(
            key_states,
            value_states,
            max(new, self.asked_capacity or 0) if keeps_all else new,
            self.group,
        )
        self.dtype, self.device = key_states.dtype, key_states.device
        self._bind(key_states)
        self.is_initialized = True

    def _bind(self, keys: torch.Tensor) -> None:
        """Ask the policy for its static data and limits, for the KV heads of these keys `[B, K, Q, D]`."""
        policy, many, size = self.policy, keys.shape[1], keys.shape[3]
        split = self.model_heads is not None and many < self.model_heads
        first = processes.rank() * many if split else 0
        heads = range(first, first + many)
        self.kv._heads, self.kv._split = heads, split
        static = policy.bind(self.index, heads, size, keys.device)
        self.kv._static = Static(
            contract.checked_static(static, policy, self.index, many, keys.device), self.traffic
        )
        answer = policy.keeps_per_head(self.index, heads)
        self.limits = contract.checked_limits(answer, policy, self.index, many)
        self.kv._in_order = all(limit is None for limit in self.limits)
        if len(set(self.limits)) > 1:
            numbers = [_NO_LIMIT if limit is None else limit for limit in self.limits]
            self._limits = torch.tensor(numbers, device=keys.device)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the new tokens in hand; they are written by the attention function, which knows the padding.

        It finds this layer through an attribute of the returned keys: no global state, and layers that borrow
        another layer's keys (gemma3n) find it too.
        """
        if self.incoming is not None:
            raise UserError(
                "a policy cannot act: the attention of the last forward did not take the keys that it "
                "cached. Either that forward failed half-way, and a new cache is needed, or this model "
                "changes keys between cache and attention, and only transformers' own cache can serve it"
            )
        self.end_forward()
        if self.is_empty and not (self.is_initialized and self.slots.fits(key_states)):
            if key_states.shape != value_states.shape:
                raise UserError(
                    f"keys of {key_states.shape[3]} and values of {value_states.shape[3]} numbers a head: "
                    "policies need the same for both. Use transformers' own cache for this model"
                )
            self.lazy_initialization(key_states, value_states)
        if len(key_states) != self.batch_size:
            raise UserError(
                f"the cache holds {self.batch_size} rows, but {len(key_states)} came: a new batch needs a "
                "new cache; to continue each row several times, call cache.batch_repeat_interleave(times) "
                "first"
            )
        new = key_states.shape[2]
        if self.expected is None and self.fed == 0 and self.policy.plan([new]) is not None:
            raise UserError(
                f"policy {self.policy.name} reads a prompt by a plan: call kvsieve.read(model, prompt, "
                "cache) first, or use kvsieve.decode"
            )
        if not self.slots.fixed:  # else whoever fixed the shapes counts, outside of the step
            self.fed += new
        held = self.slots.used > 0
        self.forward = self.expected or kind_of_forward(
            new, held=held, fed=self.fed, prompt_end=self.prompt_end
        )
        if self.forward is Forward.STEP and not self.slots.fixed:
            self.kv._steps += 1
        self.incoming = (key_states, value_states)
        key_states.kvsieve_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def check_earlier(self, mask: torch.Tensor) -> None:
        """Raise UserError if a mask over the tokens fed so far, `[B, T]`, hides some that are cached."""
        seen = self.slots.seen
        shown = mask.sum(1).to(seen)
        if not torch.equal(shown, seen):
            raise UserError(
                f"the attention_mask shows {shown.tolist()} earlier tokens a row, but {seen.tolist()} were "
                "cached: what is once in the cache cannot be masked out; start a new cache"
            )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Ask for no mask over slots: the layer itself knows who sees which (see hf/interface.py)."""
        return 0, 0

    def get_seq_length(self) -> int:
        return self.fed

    def get_max_length(self) -> int:
        return -1 if self.asked_capacity is None else self.asked_capacity

    def reset(self) -> None:
        """Forget all tokens. The storage stays for the next batch, if it has as many rows."""
        self.fed = 0
        self.active, self.incoming, self.prompt_end = None, None, None
        self.ids, self.arrived = None, None
        if self.last_logits is not None:
            self.last_logits.fill_(torch.nan)
        self.waiting, self.unpacked = False, False
        self.expected, self.before_probe = None, None
        self.traffic.begin(None, None)  # a step that failed has not ended
        self.kv._reset()
        if self.is_initialized:
            self.slots.reset()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Make row i what row `indices[i]` was."""
        if self.is_initialized:
            self.slots.reorder(indices)
        if self.last_logits is not None:
            with torch.inference_mode(False):
                self.last_logits = self.last_logits.index_select(0, indices.to(self.last_logits.device))
        if self.active is not None:
            self.active = self.active.index_select(0, indices.to(self.active.device))
        self.kv._prompt.reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            rows = torch.arange(self.batch_size, device=self.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    @property
    def is_empty(self) -> bool:
        """Whether no token was fed: storage that a reset has left may then be of another batch."""
        return self.fed == 0

    @property
    def batch_size(self) -> int:
        return self.slots.lengths.shape[0]
