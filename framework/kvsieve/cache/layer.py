"""One layer of the cache: preallocated slots per row and KV head, and everything that a policy remembers about them.

Rows are ragged: a row's tokens stand from slot 0 on, whatever side it was padded on; `lengths [B, K]` says how many
slots are live. Slots have no order once a policy evicts: `positions` says which token each one holds. Storage is finite
everywhere (zero-filled), because 0 x NaN is NaN.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, cast

import torch
from transformers.cache_utils import CacheLayerMixin

from .. import ops, transfer
from ..errors import UserError
from ..policy import Policy, Shape
from . import layouts

Phase = Literal["auto", "chunk", "last_chunk"]


class NewTokens(NamedTuple):
    """Tokens just written, a row's real ones first; what follows them is zero."""

    keys: torch.Tensor  # [B, K, Q, D], rotated
    values: torch.Tensor  # [B, K, Q, D]
    counts: torch.Tensor  # [B], how many of the Q are real
    slots: torch.Tensor  # [B, K, Q], where they were written


class LayerCache(CacheLayerMixin):
    """One layer's slots. This is the `kv` that a policy sees.

    `kv["name"]` reads a column `[B, K, T, ...]` or summary `[B, K, ...]`, and `kv["name"] = ...` writes it; both are
    metered. So are `kv.keys` and `kv.values [B, K, T, D]`: touching them costs a whole read, the ops cost less.
    """

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    lengths: torch.Tensor  # [B, K] int64: live slots
    seen: torch.Tensor  # [B] int64: tokens so far, evicted ones and the one being written included
    head_size: int

    def __init__(self, policy: Policy, capacity: int | None = None) -> None:
        self.policy = policy
        self.budget = policy.slots_kept()
        self.wanted = capacity
        self.is_initialized = False
        self.fed = 0  # token columns so far, padding included: what transformers calls the sequence length
        self.used = 0  # no live slot at or above it; known without asking the device
        self.fixed = False  # shapes are constant from now on: `used` stands at the capacity
        self._home: dict[str, torch.Tensor] = {}  # where a captured step finds the storage, after a reset too
        self.counts_steps = True  # in a model one layer counts them for all
        self.phase: Phase = "auto"
        self.prompt_end: int | None = None  # token columns of the prompt, where that is known
        self.lends = False  # other layers attend to these slots too (gemma3n): evict when all have
        self.decoding = False  # the forward now running is a decode step
        self.appended: tuple[
            torch.Tensor, torch.Tensor, torch.Tensor | None
        ]  # starts, counts, order: for borrowers
        self.active: torch.Tensor | None = None  # [B] bool: rows that still decode; None: all
        self.incoming: tuple[torch.Tensor, torch.Tensor] | None = None
        self.meter: transfer.Meter | None = None
        self.scoring: dict[str, Any] = {"scale": None, "softcap": None, "sinks": None}
        self._touched: set[str] = set()
        self._stores: dict[str, torch.Tensor] = {}  # [B, K, C, ...] each; keys as their layout has it
        self._key_stores: list[str] = []  # token-major first, if there is one
        self._summaries: dict[str, torch.Tensor] = {}

    # ---------------------------------------------------------------- what a policy reads
    @property
    def capacity(self) -> int:
        return self._stores["values"].shape[2]

    @property
    def keys(self) -> torch.Tensor | None:  # type: ignore[override]
        """`[B, K, T, D]`, whatever the layout. Metered as a read of every live key."""
        if not self.is_initialized:
            return None
        self.count_read("keys", self.lengths, self.head_size)
        return layouts.by_token(self.live_keys, self.used)

    @property
    def values(self) -> torch.Tensor | None:  # type: ignore[override]
        """`[B, K, T, D]`. Metered as a read of every live value."""
        if not self.is_initialized:
            return None
        self.count_read("values", self.lengths, self.head_size)
        return self.live_values

    @property
    def live_keys(self) -> torch.Tensor:
        """`[B, K, T, D]`, or `[B, K, T/n, n, D]` of a blocked layout, for the ops, which count for themselves."""
        name = self._key_stores[0]
        return layouts.first_slots(name, self._stores[name], self.used)

    @property
    def live_channels(self) -> torch.Tensor:
        """As `live_keys`, in the layout that is read by channels at the least cost."""
        name = self._key_stores[-1]
        return layouts.first_slots(name, self._stores[name], self.used)

    @property
    def live_values(self) -> torch.Tensor:
        return self._stores["values"][:, :, : self.used]

    @property
    def positions(self) -> torch.Tensor:
        """`[B, K, T]` int64: the token that a live slot holds, counted within its row from 0."""
        return self._stores["positions"][:, :, : self.used]

    @property
    def in_order(self) -> bool:
        """Whether slots stand in the order of their tokens: always, until one is overwritten."""
        return self.budget is None

    def live(self) -> torch.Tensor:
        """`[B, K, T]` bool: slots that hold a token."""
        return torch.arange(self.used, device=self.lengths.device) < self.lengths[..., None]

    def newest(self, n: int) -> torch.Tensor:
        """`[B, K, T]` bool: slots that hold one of the row's newest `n` tokens, the one being written counted."""
        return self.live() & (self.positions >= (self.seen - n)[:, None, None])

    def oldest(self, n: int) -> torch.Tensor:
        """`[B, K, T]` bool: slots that hold one of the row's first `n` tokens."""
        return self.live() & (self.positions < n)

    def __getitem__(self, name: str) -> torch.Tensor:
        if name in self._summaries:
            summary = self._summaries[name]
            if self._first_touch("read", name):
                self.count_read("summaries", torch.ones_like(self.lengths), summary[0, 0].numel(), summary)
            return summary
        column = self._stores[name][:, :, : self.used]
        if self._first_touch("read", name):
            self.count_read("columns", self.lengths, column[0, 0, 0].numel(), column)
        return column

    def __setitem__(self, name: str, new: torch.Tensor) -> None:
        if name in self._summaries:
            summary = self._summaries[name]
            if self._first_touch("written", name):
                self.count_written("summaries", torch.ones_like(self.lengths), summary[0, 0].numel(), summary)
            summary.copy_(new)
            return
        column = self._stores[name][:, :, : self.used]
        if self._first_touch("written", name):
            self.count_written("columns", self.lengths, column[0, 0, 0].numel(), column)
        column.copy_(new)

    def write(self, name: str, new: NewTokens, column: torch.Tensor) -> None:
        """Set a column for the new tokens only: `column [B, K, Q, ...]`. Metered as a write of theirs."""
        store = self._stores[name]
        self.count_written(
            "columns", new.counts[:, None].expand_as(self.lengths), store[0, 0, 0].numel(), store
        )
        ops.implementation(store.device).append(store, column.to(store.dtype), new.slots, self.active)

    # ---------------------------------------------------------------- the meter
    def begin_step(self, meter: transfer.Meter | None) -> None:
        """A decode step begins (with a meter, if one measures), or a prefill (None)."""
        self.meter = meter
        self._touched.clear()

    def count_read(
        self, kind: str, slots: torch.Tensor, numbers: int, like: torch.Tensor | None = None
    ) -> None:
        """Meter what this step reads: of `slots [B, K]` slots, so many numbers each, of the type of `like` (default:
        keys)."""
        self._count(f"read/{kind}", slots, numbers, like)

    def count_written(
        self, kind: str, slots: torch.Tensor, numbers: int, like: torch.Tensor | None = None
    ) -> None:
        self._count(f"written/{kind}", slots, numbers, like)

    def count_dense(self) -> None:
        """Meter what dense attention over all tokens seen would read."""
        self._count("dense", self.seen[:, None].expand_as(self.lengths), 2 * self.head_size, None)

    def _count(self, name: str, slots: torch.Tensor, numbers: int, like: torch.Tensor | None) -> None:
        if self.meter is None:
            return
        if self.active is not None:
            slots = slots * self.active[:, None]
        self.meter.add(name, slots.sum() * (numbers * (self.dtype if like is None else like.dtype).itemsize))

    def _first_touch(self, way: str, name: str) -> bool:
        if self.meter is None:
            return False
        key = f"{way}/{name}"
        first = key not in self._touched
        self._touched.add(key)
        return first

    # ---------------------------------------------------------------- append and compact
    def append_prompt(self, keys: torch.Tensor, values: torch.Tensor, valid: torch.Tensor | None) -> tuple[
        NewTokens, torch.Tensor, torch.Tensor | None
    ]:  # fmt: skip
        """Write Q tokens a row after the live slots; `valid [B, Q]` bool says which are real (None: all).

        Returns the tokens as written, the lengths before `[B, K]`, and the order `[B, Q]` that brings a row's real
        tokens to the front (None: as they came).
        """
        rows, _, new, _ = keys.shape
        order = None
        counts = torch.full((rows,), new, device=keys.device)
        if valid is not None:
            order = (~valid).to(torch.uint8).argsort(dim=1, stable=True)
            counts = valid.sum(1)
            real = torch.arange(new, device=keys.device) < counts[:, None]
            index = order[:, None, :, None].expand(keys.shape)
            # Padding may be anything, NaN included: storage must stay finite.
            keys = keys.gather(2, index).masked_fill(~real[:, None, :, None], 0)
            values = values.gather(2, index).masked_fill(~real[:, None, :, None], 0)
        self._make_capacity(self.used + new)
        starts = self.lengths.clone()
        slots = starts[..., None] + torch.arange(new, device=keys.device)
        self.seen += counts
        tokens = (self.seen - counts)[:, None, None] + torch.arange(new, device=keys.device).expand_as(slots)
        self._write(keys, values, tokens, slots)
        self.lengths += counts[:, None]
        self.used += new
        return NewTokens(keys, values, counts, slots), starts, order

    def append_one(self, keys: torch.Tensor, values: torch.Tensor) -> NewTokens:
        """Write one token a row, `[B, K, 1, D]`: in the next free slot, or over the one with the lowest priority."""
        active = self.active
        counts = self._ones if active is None else active.long()
        self.seen += counts
        tokens = (self.seen - 1)[:, None, None].expand(*self.lengths.shape, 1)
        if self.budget is not None and self.used >= self.budget:
            slots = self._slot_to_overwrite(self.budget)
            grown = counts[:, None] * (slots == self.lengths)
        else:
            slots, grown = self.lengths.clone(), counts[:, None]
            if not self.fixed:
                self._make_capacity(self.used + 1)
                self.used += 1
        self._write(keys, values, tokens, slots[..., None], active)
        self.lengths += grown
        written = counts[:, None].expand_as(self.lengths)
        self.count_written("keys", written, self.head_size * len(self._key_stores))
        self.count_written("values", written, self.head_size)
        if active is not None:
            keys, values = (t.masked_fill(~active[:, None, None, None], 0) for t in (keys, values))
        return NewTokens(keys, values, counts, slots[..., None])

    def fix_shapes(self, tokens: int) -> None:
        """Make room for `tokens` a row, or for the budget, once; decode steps then have constant shapes.

        The price: ops that do not go by the lengths cost what the capacity costs.
        """
        final = tokens if self.budget is None else min(tokens, self.budget)
        self._make_capacity(final)
        self._home = self._stores
        self.used, self.fixed = self.capacity, True
        self.prompt_end, self.phase = None, "auto"  # the prompt is in: `fed` stands still, and cannot tell

    def _slot_to_overwrite(self, budget: int) -> torch.Tensor:
        """`[B, K]`: the first free slot where there is one, else the slot with the lowest priority."""
        lowest = self.policy.priority(self).masked_fill(~self.live(), torch.inf).argmin(2)
        return torch.where(self.lengths < budget, self.lengths, lowest)

    def compact_to_budget(self) -> None:
        """Keep the `budget` slots with the highest priority of each row and KV head; the rest is freed."""
        if self.budget is None or self.used <= self.budget:
            return
        priority = self.policy.priority(self).masked_fill(~self.live(), -torch.inf)
        slots = (
            priority.topk(self.budget, dim=2).indices.sort(dim=2).values
        )  # sorted: the order of tokens is kept
        run = ops.implementation(slots.device)
        before, self._stores = self._stores, self._stores_for_budget()
        for name, store in before.items():
            kept = self._stores[name]
            run.compact(layouts.slots_first(name, store), slots, layouts.slots_first(name, kept))
        self.lengths.clamp_(max=self.budget)
        self.used = self.budget

    def _stores_for_budget(self) -> dict[str, torch.Tensor]:
        """Those of a decode before the last reset, if they fit; else new ones."""
        assert self.budget is not None
        if self._home and self._home["values"].shape[2] == self.budget and self._home is not self._stores:
            return self._home
        return {name: layouts.resized(name, store, self.budget) for name, store in self._stores.items()}

    def _write(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        tokens: torch.Tensor,
        slots: torch.Tensor,
        active: torch.Tensor | None = None,
    ) -> None:
        run = ops.implementation(keys.device)
        for name, store in self._stores.items():
            if name in layouts.KEY_STORES:
                new = keys
            elif name == "values":
                new = values
            elif name == "positions":
                new = tokens
            else:  # a column starts at zero for every token
                new = store.new_zeros(()).expand(*slots.shape, *store.shape[3:])
            run.append(layouts.slots_first(name, store), new, slots, active)

    # ---------------------------------------------------------------- storage
    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        rows, heads, new, size = key_states.shape
        self.policy.check(size)
        self.dtype, self.device, self.head_size = key_states.dtype, key_states.device, size
        capacity = new if self.budget is not None else max(new, self.wanted or 0)

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        self.lengths = zeros(rows, heads, dtype=torch.int64)
        self.seen = zeros(rows, dtype=torch.int64)
        self._ones = (
            zeros(rows, dtype=torch.int64) + 1
        )  # what every row gets in a step: not made anew in each
        keys = self.policy.key_layout.stores(key_states, capacity)
        self._key_stores = list(keys)
        self._stores = {
            **keys,
            "values": zeros(rows, heads, capacity, value_states.shape[3], dtype=value_states.dtype),
            "positions": zeros(rows, heads, capacity, dtype=torch.int64),
        }
        for name, shape in self.policy.columns.items():
            dtype, extra = _dtype_and_size(shape, size)
            self._stores[name] = zeros(rows, heads, capacity, *extra, dtype=dtype)
        for name, shape in self.policy.summaries.items():
            dtype, extra = _dtype_and_size(shape, size)
            self._summaries[name] = zeros(rows, heads, *extra, dtype=dtype)
        self._home = {}
        self.is_initialized = True

    def _fits(self, keys: torch.Tensor) -> bool:
        """Whether the storage that a reset has left is for such keys."""
        same = len(keys) == self.batch_size and keys.shape[3] == self.head_size
        return same and keys.dtype == self.dtype and keys.device == self.device

    def _make_capacity(self, needed: int) -> None:
        if needed <= self.capacity:
            return
        self.check_room(needed)
        room = max(needed, self.capacity + max(256, self.capacity // 4))  # so that growing, a copy, is rare
        if self.budget is not None:
            room = max(needed, min(room, self.budget))
        grown = {name: layouts.resized(name, store, room) for name, store in self._stores.items()}
        for name, store in self._stores.items():
            layouts.first_slots(name, grown[name], self.used).copy_(
                layouts.first_slots(name, store, self.used)
            )
        self._stores = grown

    def check_room(self, tokens: int) -> None:
        """Raise UserError if a row can never hold this many tokens."""
        if self.wanted is not None and self.budget is None and tokens > self.wanted:
            raise UserError(f"the cache holds {self.wanted} tokens a row (capacity), and {tokens} are needed")

    def memory(self) -> int:
        """Bytes held for keys in all their layouts, values, columns, summaries (positions, lengths not counted)."""
        held = [store for name, store in self._stores.items() if name != "positions"]
        return sum(t.numel() * t.element_size() for t in [*held, *self._summaries.values()])

    def places(self) -> list[tuple[int, torch.Size]]:
        """Where in memory everything is that a step reads and writes, and its shape."""
        state = [*self._stores.values(), *self._summaries.values(), self.lengths, self.seen, self._ones]
        return [(tensor.data_ptr(), tensor.shape) for tensor in state]

    def snapshot(self) -> dict[str, torch.Tensor]:
        """A copy of everything stored, by name; not metered."""
        stored = {**self._stores, **self._summaries, "lengths": self.lengths, "seen": self.seen}
        return {name: tensor.clone() for name, tensor in stored.items()}

    # ---------------------------------------------------------------- what transformers asks of a cache layer
    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the new tokens in hand; they are written by the attention function, which knows the padding.

        It finds this layer through an attribute of the returned keys: no global state, and layers that borrow another
        layer's keys (gemma3n) find it too.
        """
        if self.incoming is not None:
            raise UserError(
                "a policy cannot act: the attention of the last forward did not take the keys that it cached. Either "
                "that forward failed half-way, and a new cache is needed, or this model changes keys between cache and "
                "attention, and only transformers' own cache can serve it"
            )
        if not self.is_initialized or (self.fed == 0 and not self._fits(key_states)):
            if key_states.shape != value_states.shape:
                raise UserError(
                    f"keys of {key_states.shape[3]} and values of {value_states.shape[3]} numbers a head: policies "
                    "need the same for both. Use transformers' own cache for this model"
                )
            self.lazy_initialization(key_states, value_states)
        if len(key_states) != self.batch_size:
            raise UserError(
                f"the cache holds {self.batch_size} rows, but {len(key_states)} came: a new batch needs a new cache; "
                "to continue each row several times, call cache.batch_repeat_interleave(times) first"
            )
        if not self.fixed:  # else whoever fixed the shapes counts, outside of the step
            self.fed += key_states.shape[2]
        if self.prompt_end is not None:
            part: Phase = "chunk" if self.fed < self.prompt_end else "last_chunk"
            self.phase = "auto" if self.fed > self.prompt_end else part
        self.incoming = (key_states, value_states)
        key_states.kvsieve_layer = self  # type: ignore[attr-defined]
        return key_states, value_states

    def check_earlier(self, mask: torch.Tensor) -> None:
        """Raise UserError if a mask over the tokens fed so far, `[B, T]`, hides some that are in the cache."""
        shown = mask.sum(1).to(self.seen)
        if not torch.equal(shown, self.seen):
            raise UserError(
                f"the attention_mask shows {shown.tolist()} earlier tokens a row, but {self.seen.tolist()} were "
                "cached: what is once in the cache cannot be masked out; start a new cache"
            )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.fed + query_length, 0

    def get_seq_length(self) -> int:
        return self.fed

    def get_max_length(self) -> int:
        return -1 if self.wanted is None else self.wanted

    def reset(self) -> None:
        """Forget all tokens. The storage stays for the next batch, if it has as many rows: a captured step finds it."""
        self.fed = self.used = 0
        self.fixed = False
        self.active, self.incoming, self.prompt_end, self.phase = None, None, None, "auto"
        if self.is_initialized:
            for tensor in (self.lengths, self.seen, *self._summaries.values()):
                tensor.zero_()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Row i becomes what row `indices[i]` was."""
        if not self.is_initialized:
            return
        indices = indices.to(self.device)
        self._stores = {name: store.index_select(0, indices) for name, store in self._stores.items()}
        self._summaries = {
            name: summary.index_select(0, indices) for name, summary in self._summaries.items()
        }
        self.lengths, self.seen = self.lengths.index_select(0, indices), self.seen.index_select(0, indices)
        self._ones = torch.ones_like(self.seen)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.is_initialized:
            rows = torch.arange(self.lengths.shape[0], device=self.device)
            self.batch_select_indices(rows.repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        return self.lengths.shape[0]


def _dtype_and_size(shape: Shape, head_size: int) -> tuple[torch.dtype, tuple[int, ...]]:
    if isinstance(shape, tuple):
        dtype, size = shape
        return dtype, (head_size if size == "D" else cast(int, size),)
    return shape, ()
