"""Storage of one layer: slots per row and KV head, and everything that stands in them.

Rows are ragged: a row's tokens stand from slot 0 on; `lengths [B, K]` says how many slots are live. Slots
have no order once one is overwritten: `positions` says which token each one holds. Storage is finite
everywhere (zero-filled), because 0 x NaN is NaN. Knows no policy and no transformers.

Stores are padded, `[B, K, C, ...]`, or packed once heads keep different numbers: see packing.py. Whoever
reads a packed store here gets a padded copy of it; attention and appending do without.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from .. import ops
from . import layouts
from .columns import Column, Paged, Shape, dtype_and_size
from .layouts import KeyLayout
from .packing import Packing
from .rotary import Rotary

Count = TypeVar("Count", int, torch.Tensor)

# Stores beside the columns; a key layout has one or two of the first three.
VALUES, POSITIONS = "values", "positions"
RESERVED = (*layouts.KEY_STORES, VALUES, POSITIONS, "lengths", "seen")


class Checkpoint(NamedTuple):
    """The lengths of a layer at one moment, and whether its shapes were constant."""

    used: int
    lengths: torch.Tensor
    seen: torch.Tensor
    fixed: bool


class Slots:
    """Storage of one layer: keys as their layout has them, values, positions, columns, summaries.

    Args:
        layout: of the keys; "auto" is decided by the device, when storage is allocated.
        columns: per slot or per page of slots, by name.
        summaries: per row and KV head, by name.
    """

    lengths: torch.Tensor  # [B, K] int64: live slots
    head_size: int
    dtype: torch.dtype
    device: torch.device

    def __init__(
        self, layout: KeyLayout, columns: Mapping[str, Column], summaries: Mapping[str, Shape]
    ) -> None:
        self.layout = layout
        self._pages = {name: column.page for name, column in columns.items() if isinstance(column, Paged)}
        self._column_shapes: dict[str, Shape] = {
            name: column.shape if isinstance(column, Paged) else column for name, column in columns.items()
        }
        self._summary_shapes = dict(summaries)
        self.free_sizes = {
            n for n, shape in summaries.items() if isinstance(shape, tuple) and shape[1] == "S"
        }
        self._stores: dict[str, torch.Tensor] = {}  # [B, K, C, ...] each; keys as their layout has it
        self.packing: Packing | None = None  # of the stores, where they are packed: [1, 1, S, ...] each
        self._key_stores: list[str] = []  # token-major first, if there is one
        self._home: dict[str, torch.Tensor] = {}  # where a captured step finds the stores, after a reset too
        self.summaries: dict[str, torch.Tensor] = {}  # [B, K, ...]
        self.used = 0  # no live slot at or above it; known without asking the device
        self.coming: torch.Tensor | None = None  # [B]: rows that a token comes to, while room is made for it
        self.fixed = False  # shapes are constant from now on: `used` stands at the capacity
        self.rotary: Rotary | None = None  # if keys are rotated by their slot: they turn as they move

    # ---------------------------------------------------------------- allocate
    def allocate(
        self, keys: torch.Tensor, values: torch.Tensor, capacity: int, group: int | None = None
    ) -> None:
        """Make empty storage with room for `capacity` tokens a row.

        Keys and values will be like these, `[B, K, Q, D]`; `group` query heads share a KV head.

        Raises:
            UserError: a column or summary is as large as the group, which is not known.
        """
        rows, heads, _, size = keys.shape
        self.dtype, self.device, self.head_size = keys.dtype, keys.device, size

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        # Ordinary tensors even within inference mode: reset() may be called outside of it.
        with torch.inference_mode(False):
            self.lengths = zeros(rows, heads, dtype=torch.int64)
            # Of each head, all alike: in the step each counts its own, and none reads what another writes.
            self.seen_by_head = zeros(rows, heads, dtype=torch.int64)
            # Tokens that every row gets in a step: not made anew in each.
            self.ones = torch.ones(rows, dtype=torch.int64, device=self.device)
            stores = self.layout.on(self.device).stores(keys, capacity)
            self._key_stores = list(stores)
            stores[VALUES] = zeros(rows, heads, capacity, values.shape[3], dtype=values.dtype)
            stores[POSITIONS] = zeros(rows, heads, capacity, dtype=torch.int64)
            for name, shape in self._column_shapes.items():
                dtype, extra = dtype_and_size(shape, keys, group)
                stores[name] = zeros(rows, heads, self.entries(name, capacity), *extra, dtype=dtype)
            for name, shape in self._summary_shapes.items():
                dtype, extra = dtype_and_size(shape, keys, group)
                self.summaries[name] = zeros(rows, heads, *extra, dtype=dtype)
        self._stores, self._home, self.packing = stores, {}, None

    def fits(self, keys: torch.Tensor) -> bool:
        """Whether the storage that a reset has left is for such keys."""
        same = keys.shape[:2] == self.lengths.shape and keys.shape[3] == self.head_size
        return same and bool(self._stores) and keys.dtype == self.dtype and keys.device == self.device

    @property
    def seen(self) -> torch.Tensor:
        """`[B]` int64: tokens so far, dropped ones and those to come included."""
        return self.seen_by_head[:, 0] if self.coming is None else self.seen_by_head[:, 0] + self.coming

    @property
    def capacity(self) -> int:
        """Slots that a row can hold without growing."""
        return self._stores[VALUES].shape[2] if self.packing is None else self.packing.capacity

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self._column_shapes)

    def page(self, name: str) -> int:
        """Slots that share an entry of this column: 1, if it is not paged."""
        return self._pages.get(name, 1)

    def entries(self, name: str, slots: Count) -> Count:
        """The entries that a store or column has for so many slots: one each, or one per page begun."""
        return -(-slots // self._pages[name]) if name in self._pages else slots

    @property
    def key_copies(self) -> int:
        """Times that the layout stores a key."""
        return len(self._key_stores)

    # ---------------------------------------------------------------- read: the slots in use
    @property
    def keys(self) -> torch.Tensor:
        """`[B, K, T, D]`, or `[B, K, T/n, n, D]` of a blocked layout."""
        return self._in_use(self._key_stores[0])

    @property
    def channels(self) -> torch.Tensor:
        """The keys, as `keys` gives them, from the store that is read by channels at the least cost."""
        return self._in_use(self._key_stores[-1])

    @property
    def values(self) -> torch.Tensor:
        """`[B, K, T, D]`."""
        return self._in_use(VALUES)

    @property
    def positions(self) -> torch.Tensor:
        """`[B, K, T]` int64: the token that a live slot holds, counted within its row from 0."""
        return self._in_use(POSITIONS)

    def column(self, name: str) -> torch.Tensor:
        """`[B, K, T, ...]`, or `[B, K, ceil(T / page), ...]`."""
        return self._in_use(name)

    def at(self, name: str, slots: torch.Tensor) -> torch.Tensor:
        """A copy `[B, K, S, ...]` of "keys", "values" or a column at `slots [B, K, S]`, its pages if paged.

        What is out of reach is zero.
        """
        store = self._key_stores[0] if name == "keys" else name
        stored = self._in_use(store)
        width = stored.shape[3:] if stored.dim() < 5 else stored.shape[4:]
        taken = stored.new_empty(*slots.shape, *width)
        ops.implementation(slots.device).compact(stored, slots, taken)
        return taken

    def live(self) -> torch.Tensor:
        """`[B, K, T]` bool: slots that hold a token."""
        return torch.arange(self.used, device=self.device) < self.lengths[..., None]

    def to_attend(self) -> tuple[torch.Tensor, torch.Tensor, dict[str, Any]]:
        """Keys, values, and where heads begin in them if they are packed, as `attend` takes them: no copy."""
        if self.packing is None:
            return self.keys, self.values, {}
        packed = {"starts": self.packing.starts, "total": self.used}
        return self._stores[layouts.TOKENS], self._stores[VALUES], packed

    def _in_use(self, name: str) -> torch.Tensor:
        if self.packing is not None:
            return self.packing.unpack(self._stores[name], self.used)
        return layouts.first_slots(name, self._stores[name], self.entries(name, self.used))

    # ---------------------------------------------------------------- write
    def append_token(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        columns: Mapping[str, torch.Tensor],
        means: Iterable[str],
        active: torch.Tensor | None,
        limits: int | torch.Tensor | None,
        lowest: torch.Tensor | None,
    ) -> torch.Tensor:
        """Write one token a row, `[B, K, 1, D]`, and all that goes with it, in one op; count it as seen.

        In the first free slot, or over the one that is `lowest [B, K]` where a head holds its `limits`
        (`[K]`, or of all). Other columns than `columns [B, K, 1, ...]` start at zero; the summaries `means`
        are means of all values. Rows that are not `active [B]` get nothing. Returns the slots `[B, K, 1]`.
        """
        stores = []
        for name, new in self._of_tokens(keys, values).items():
            stores.append((layouts.slots_first(name, self._stores[name]), columns.get(name, new)))
        return ops.implementation(keys.device).append_token(
            stores,
            self._stores[POSITIONS],
            self.lengths,
            self.seen_by_head,
            means=[(self.summaries[name], values) for name in means],
            active=active,
            limits=limits,
            lowest=lowest,
            starts=self._starts,
        )

    def append_tokens(self, keys: torch.Tensor, values: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Write the first `counts [B]` of tokens `[B, K, Q, D]` after the live slots, the others beyond them.

        Columns start at zero. Returns the slots `[B, K, Q]`.
        """
        number = torch.arange(keys.shape[2], device=keys.device)
        slots = self.lengths[..., None] + number
        new = self._of_tokens(keys, values) | {POSITIONS: self.seen_by_head[..., None] + number}
        run = ops.implementation(keys.device)
        for name, tokens in new.items():
            store = layouts.slots_first(name, self._stores[name])
            run.append(store, ops.reference.store.or_zero(tokens, store, slots), slots)
        self.lengths += counts[:, None]
        self.seen_by_head += counts[:, None]
        return slots

    def _of_tokens(self, keys: torch.Tensor, values: torch.Tensor) -> dict[str, torch.Tensor | None]:
        """The stores that a new token is written to, but positions, and with what; None: zero.

        Entries of pages stay as they are.
        """
        known = dict.fromkeys(self._key_stores, keys) | {VALUES: values}
        columns = (name for name in self._column_shapes if name not in self._pages)
        return {**known, **dict.fromkeys(columns)}

    def write_keys(self, keys: torch.Tensor, slots: torch.Tensor, active: torch.Tensor | None = None) -> None:
        """Put keys `[B, K, S, D]` into `slots [B, K, S]`, in every store of them."""
        run = ops.implementation(keys.device)
        for name in self._key_stores:
            store = layouts.slots_first(name, self._stores[name])
            run.append(store, keys.to(self.dtype), slots, active, starts=self._starts)

    @property
    def _starts(self) -> torch.Tensor | None:
        return None if self.packing is None else self.packing.starts

    def write_column(
        self, name: str, column: torch.Tensor, slots: torch.Tensor, active: torch.Tensor | None = None
    ) -> None:
        """Put `column [B, K, Q, ...]` into `slots [B, K, Q]`, its pages if paged."""
        store = self._stores[name]
        ops.implementation(store.device).append(store, column.to(store.dtype), slots, active)

    def add_to_column(
        self, name: str, amounts: torch.Tensor, slots: torch.Tensor, active: torch.Tensor | None = None
    ) -> None:
        """Add `amounts [B, K, S, ...]` to what stands in `slots [B, K, S]`; slots below 0: nowhere."""
        store, added = self._stores[name], slots >= 0
        if active is not None:
            added = added & active[:, None, None]
        extra = [1] * (store.dim() - 3)
        amounts = amounts.to(store.dtype).masked_fill(~added.view(*added.shape, *extra), 0)
        index = slots.clamp(min=0).view(*slots.shape, *extra).expand(amounts.shape)
        store.scatter_add_(2, index, amounts)

    def replace_summary(self, name: str, new: torch.Tensor) -> None:
        """Hold `new [B, K, S]` as a summary of free size."""
        held = self.summaries[name]
        assert new.shape[:2] == held.shape[:2]
        self.summaries[name] = new.to(held.dtype, copy=True)

    def clear_free_sizes(self) -> None:
        """Forget what summaries of free size hold."""
        for name in self.free_sizes:
            self.summaries[name] = self.summaries[name][:, :, :0]

    # ---------------------------------------------------------------- size
    def make_room(self, needed: int, at_most: int | None = None) -> None:
        """Grow to at least `needed` slots, but not beyond `at_most`.

        By more than needed, so that growing, which copies, is rare.
        """
        if needed <= self.capacity:
            return
        room = self.capacity + max(256, self.capacity // 4)
        if at_most is not None:
            room = min(room, at_most)
        if self.packing is not None:
            self._repack(self.packing.grown(max(needed, room) - self.capacity))
            return
        with torch.inference_mode(False):
            grown = self._resized(max(needed, room))
        for name, store in self._stores.items():
            used = self.entries(name, self.used)
            layouts.first_slots(name, grown[name], used).copy_(layouts.first_slots(name, store, used))
        self._stores = grown

    def fix(self, capacity: int) -> None:
        """Make room for `capacity` slots, once; from now on shapes are constant.

        The price: ops that do not go by the lengths cost what the capacity costs.
        """
        self.make_room(capacity, capacity)
        self._home = self._stores if self.packing is None else {}
        self.used, self.fixed = self.capacity, True

    def unfix(self) -> None:
        """Let it grow again; the stores stay where a captured step finds them. Waits for the device."""
        if self.fixed:
            self.used, self.fixed = int(self.lengths.max()), False

    def trim(self) -> None:
        """Give back the storage beyond the slots in use; not where columns are paged."""
        if self.packing is None and not self._pages and self.capacity > self.used:
            self.keep(torch.arange(self.used, device=self.device).expand(*self.lengths.shape, -1))

    def keep_where(self, stays: torch.Tensor, most: int) -> None:
        """Keep the slots where `stays [B, K, T]`, in their order; `most`: of the head that keeps most.

        Storage is as large as that head needs, for all heads.
        """
        counts = stays.sum(2)
        free = torch.arange(most, device=self.device) >= counts[..., None]
        self.keep(_in_front(stays)[..., :most].masked_fill(free, -1))
        self.lengths.copy_(counts)

    def pack(
        self, stays: torch.Tensor, counts: Sequence[Sequence[int]], limits: Sequence[int | None]
    ) -> None:
        """Keep the slots where `stays [B, K, T]`, in their order; every head has room for its own only.

        Not with columns, and token-major keys alone.

        Args:
            stays: `counts` of them in each row and head.
            limits: the most that each of the K heads will ever hold, for which it gets room; None: it grows.
        """
        assert self.packing is None
        assert not self._column_shapes
        assert self._key_stores == [layouts.TOKENS]
        kept, self.used = _in_front(stays), max(map(max, counts))
        rooms = [[limit or max(count, 1) for count, limit in zip(row, limits, strict=True)] for row in counts]
        with torch.inference_mode(False):
            self.packing = Packing(rooms, [limit is None for limit in limits], self.used, self.device)
            self._stores = {name: self.packing.pack(store, kept) for name, store in self._stores.items()}
        self._home = {}
        self.lengths.copy_(stays.sum(2))

    def unpack(self, capacity: int) -> None:
        """Give every head room for `capacity` slots, as a prompt needs that is read into it."""
        with torch.inference_mode(False):
            shape = *self.lengths.shape, capacity
            padded = {name: store.new_zeros(*shape, *store.shape[3:]) for name, store in self._stores.items()}
            for name, store in padded.items():
                store[:, :, : self.used].copy_(self._in_use(name))
        self._stores, self.packing = padded, None

    def _repack(self, packing: Packing, rows: torch.Tensor | None = None) -> None:
        """Move packed stores to other rooms; row i comes from row `rows[i]`."""
        assert self.packing is not None
        heads = torch.arange(self.lengths.numel(), device=self.device)
        if rows is not None:
            heads = heads.view(self.lengths.shape)[rows].flatten()
        with torch.inference_mode(False):
            self._stores = {
                name: packing.repack(store, self.packing, heads) for name, store in self._stores.items()
            }
        self.packing = packing

    def keep(self, slots: torch.Tensor) -> None:
        """Keep `slots [B, K, n]`, in this order, and free the rest. The live ones among them come first.

        Not with paged columns: a page would be of other tokens.
        """
        assert not self._pages
        if self.packing is not None:
            self.unpack(self.used)
        run, count = ops.implementation(slots.device), slots.shape[2]
        before, home = self._stores, self._home
        # The stores of a decode before the last reset, if they fit: a captured step finds them.
        fits = bool(home) and home[VALUES].shape[2] >= count
        if fits and home is not before:
            self._stores = home
        else:
            with torch.inference_mode(False):
                self._stores = self._resized(count)
        for name, store in before.items():
            kept = self._stores[name]
            run.compact(layouts.slots_first(name, store), slots, layouts.slots_first(name, kept))
        if fits and home is before:  # a prompt that was read into them
            for name, store in self._stores.items():
                kept = layouts.first_slots(name, store, count)
                layouts.first_slots(name, home[name], count).copy_(kept)
            self._stores = home
        self.lengths.clamp_(max=count)
        self.used = count
        if self.rotary is not None:
            self._turn_moved(self.rotary, slots)

    def _turn_moved(self, rotary: Rotary, before: torch.Tensor) -> None:
        """Turn the keys that stood in slots `before [B, K, n]` to the slots where they are now."""
        now = torch.arange(before.shape[2], device=before.device).expand_as(before)
        by = (now - before).masked_fill(before < 0, 0)
        self.write_keys(rotary.turned(self.at("keys", now), by), now.masked_fill(by == 0, -1))

    def _resized(self, capacity: int) -> dict[str, torch.Tensor]:
        return {
            name: layouts.resized(name, store, self.entries(name, capacity))
            for name, store in self._stores.items()
        }

    # ---------------------------------------------------------------- rows
    def reorder(self, indices: torch.Tensor) -> None:
        """Make row i what row `indices[i]` was."""
        indices = indices.to(self.device)

        def rows(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: tensor.index_select(0, indices) for name, tensor in tensors.items()}

        if self.packing is not None:
            self._repack(self.packing.of_rows(indices.tolist()), indices)
        with torch.inference_mode(False):
            if self.packing is None:
                self._stores = rows(self._stores)
            self.summaries, self._home = rows(self.summaries), {}
            self.lengths = self.lengths.index_select(0, indices)
            self.seen_by_head = self.seen_by_head.index_select(0, indices)
            self.ones = self.ones.new_ones(len(indices))

    def reset(self) -> None:
        """Forget all tokens. The storage stays, zero-filled: dead slots must be finite.

        Packed stores are let go: they are for what was kept, and a prompt comes next.
        """
        if self.packing is not None:
            self._stores, self.packing = {}, None
        self.used, self.fixed, self.coming = 0, False, None
        home = {} if self._home is self._stores else self._home
        self.clear_free_sizes()
        stores = (*self._stores.values(), *home.values(), *self.summaries.values())
        for tensor in (self.lengths, self.seen_by_head, *stores):
            tensor.zero_()

    # ---------------------------------------------------------------- look from outside
    def memory(self) -> int:
        """Bytes held for keys in all their stores, values, columns and summaries; not for positions."""
        held = [store for name, store in self._stores.items() if name != POSITIONS]
        return sum(t.numel() * t.element_size() for t in [*held, *self.summaries.values()])

    def memory_of(self, slots: int) -> int:
        """Of that, the bytes of one row with room for so many slots: packed ones of all heads."""
        held = [
            layouts.resized(name, store[:1].to("meta"), self.entries(name, slots))
            for name, store in self._stores.items()
            if name != POSITIONS
        ]
        held += [summary[:1] for summary in self.summaries.values()]
        return sum(t.numel() * t.element_size() for t in held)

    def places(self) -> list[tuple[int, torch.Size]]:
        """Address and shape of everything that a step reads and writes."""
        state = [*self._stores.values(), *self.summaries.values(), self.lengths, self.seen_by_head, self.ones]
        places = [(tensor.data_ptr(), tensor.shape) for tensor in state]
        if self.packing is not None:
            places.append((self.packing.starts.data_ptr(), torch.Size([self.capacity])))
        return places

    def stored(self) -> dict[str, torch.Tensor]:
        """All tensors by name: whole stores, columns and summaries, `lengths`, `seen`."""
        return {**self._stores, **self.summaries, "lengths": self.lengths, "seen": self.seen_by_head}

    def checkpoint(self) -> Checkpoint:
        """Note the lengths, so that after `restore` the next token is put in the same slot."""
        return Checkpoint(self.used, self.lengths.clone(), self.seen_by_head.clone(), self.fixed)

    def hold_copy_of(self, other: Slots) -> None:
        """Hold what `other` holds, which has as many rows, the same stores, and nothing packed."""
        self.used = other.used
        self.lengths.copy_(other.lengths)
        self.seen_by_head.copy_(other.seen_by_head)
        for name, store in other._stores.items():
            used = self.entries(name, other.used)
            held = layouts.first_slots(name, self._stores[name], used)
            held.copy_(layouts.first_slots(name, store, used))
        for name, summary in other.summaries.items():
            if name in self.free_sizes:
                self.replace_summary(name, summary)
            else:
                self.summaries[name].copy_(summary)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint; slots that were overwritten since are not restored."""
        self.used, self.fixed = checkpoint.used, checkpoint.fixed
        self.lengths.copy_(checkpoint.lengths)
        self.seen_by_head.copy_(checkpoint.seen)


def _in_front(stays: torch.Tensor) -> torch.Tensor:
    """The slots `[B, K, T]`, those where `stays` first, in their order."""
    return stays.to(torch.uint8).argsort(dim=2, descending=True, stable=True)
