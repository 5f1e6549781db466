"""Storage of one layer: slots per row and KV head, and everything that stands in them.

Rows are ragged: a row's tokens stand from slot 0 on; `lengths [B, K]` says how many slots are live. Slots
have no
order once one is overwritten: `positions` says which token each one holds. Storage is finite everywhere
(zero-filled), because 0 x NaN is NaN. Knows no policy and no transformers.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from .. import ops
from . import layouts
from .layouts import KeyLayout

# A column or summary holds one number (a dtype), or a vector (dtype, size); size "D" is the head size.
Shape = torch.dtype | tuple[torch.dtype, "int | str"]

# Stores beside the columns; a key layout has one or two of the first three.
VALUES, POSITIONS = "values", "positions"
RESERVED = (*layouts.KEY_STORES, VALUES, POSITIONS, "lengths", "seen")


class Checkpoint(NamedTuple):
    """The lengths of a layer at one moment."""

    used: int
    lengths: torch.Tensor
    seen: torch.Tensor


class Slots:
    """Storage of one layer: keys as their layout has them, values, positions, columns, summaries.

    Args:
        layout: of the keys.
        columns: per slot, by name.
        summaries: per row and KV head, by name.
    """

    lengths: torch.Tensor  # [B, K] int64: live slots
    seen: torch.Tensor  # [B] int64: tokens so far, dropped ones and the one being written included
    head_size: int
    dtype: torch.dtype
    device: torch.device

    def __init__(
        self, layout: KeyLayout, columns: Mapping[str, Shape], summaries: Mapping[str, Shape]
    ) -> None:
        self.layout = layout
        self._column_shapes, self._summary_shapes = dict(columns), dict(summaries)
        self._stores: dict[str, torch.Tensor] = {}  # [B, K, C, ...] each; keys as their layout has it
        self._key_stores: list[str] = []  # token-major first, if there is one
        self._home: dict[str, torch.Tensor] = {}  # where a captured step finds the stores, after a reset too
        self.summaries: dict[str, torch.Tensor] = {}  # [B, K, ...]
        self.used = 0  # no live slot at or above it; known without asking the device
        self.fixed = False  # shapes are constant from now on: `used` stands at the capacity

    # ---------------------------------------------------------------- allocate
    def allocate(self, keys: torch.Tensor, values: torch.Tensor, capacity: int) -> None:
        """Make empty storage with room for `capacity` tokens a row.

        Keys and values will be like these, `[B, K, Q, D]`.
        """
        rows, heads, _, size = keys.shape
        self.dtype, self.device, self.head_size = keys.dtype, keys.device, size

        def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        # Ordinary tensors even within inference mode: reset() may be called outside of it.
        with torch.inference_mode(False):
            self.lengths = zeros(rows, heads, dtype=torch.int64)
            self.seen = zeros(rows, dtype=torch.int64)
            # Tokens that every row gets in a step: not made anew in each.
            self.ones = torch.ones_like(self.seen)
            stores = self.layout.stores(keys, capacity)
            self._key_stores = list(stores)
            stores[VALUES] = zeros(rows, heads, capacity, values.shape[3], dtype=values.dtype)
            stores[POSITIONS] = zeros(rows, heads, capacity, dtype=torch.int64)
            for name, shape in self._column_shapes.items():
                dtype, extra = _dtype_and_size(shape, size)
                stores[name] = zeros(rows, heads, capacity, *extra, dtype=dtype)
            for name, shape in self._summary_shapes.items():
                dtype, extra = _dtype_and_size(shape, size)
                self.summaries[name] = zeros(rows, heads, *extra, dtype=dtype)
        self._stores, self._home = stores, {}

    def fits(self, keys: torch.Tensor) -> bool:
        """Whether the storage that a reset has left is for such keys."""
        same = keys.shape[:2] == self.lengths.shape and keys.shape[3] == self.head_size
        return same and keys.dtype == self.dtype and keys.device == self.device

    @property
    def capacity(self) -> int:
        """Slots that a row can hold without growing."""
        return self._stores[VALUES].shape[2]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns."""
        return tuple(self._column_shapes)

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
        """`[B, K, T, ...]`."""
        return self._in_use(name)

    def live(self) -> torch.Tensor:
        """`[B, K, T]` bool: slots that hold a token."""
        return torch.arange(self.used, device=self.device) < self.lengths[..., None]

    def _in_use(self, name: str) -> torch.Tensor:
        return layouts.first_slots(name, self._stores[name], self.used)

    # ---------------------------------------------------------------- write
    def write(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        tokens: torch.Tensor,
        slots: torch.Tensor,
        active: torch.Tensor | None = None,
    ) -> None:
        """Put tokens `[B, K, Q, ...]` into `slots [B, K, Q]`; their columns start at zero. `active [B]`
        False: not.
        """
        run = ops.implementation(keys.device)
        for name, store in self._stores.items():
            if name in layouts.KEY_STORES:
                new = keys
            elif name == VALUES:
                new = values
            elif name == POSITIONS:
                new = tokens
            else:
                new = store.new_zeros(()).expand(*slots.shape, *store.shape[3:])
            run.append(layouts.slots_first(name, store), new, slots, active)

    def write_column(
        self, name: str, column: torch.Tensor, slots: torch.Tensor, active: torch.Tensor | None = None
    ) -> None:
        """Put `column [B, K, Q, ...]` into `slots [B, K, Q]`."""
        store = self._stores[name]
        ops.implementation(store.device).append(store, column.to(store.dtype), slots, active)

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
        with torch.inference_mode(False):
            grown = self._resized(max(needed, room))
        for name, store in self._stores.items():
            in_use = layouts.first_slots(name, store, self.used)
            layouts.first_slots(name, grown[name], self.used).copy_(in_use)
        self._stores = grown

    def fix(self, capacity: int) -> None:
        """Make room for `capacity` slots, once; from now on shapes are constant.

        The price: ops that do not go by the lengths cost what the capacity costs.
        """
        self.make_room(capacity, capacity)
        self._home = self._stores
        self.used, self.fixed = self.capacity, True

    def keep_where(self, stays: torch.Tensor, most: int) -> None:
        """Keep the slots where `stays [B, K, T]`, in their order; `most`: of the head that keeps most.

        Storage is as large as that head needs, for all heads.
        """
        counts = stays.sum(2)
        slots = stays.to(torch.uint8).argsort(dim=2, descending=True, stable=True)[..., :most]
        free = torch.arange(most, device=self.device) >= counts[..., None]
        self.keep(slots.masked_fill(free, -1))
        self.lengths.copy_(counts)

    def keep(self, slots: torch.Tensor) -> None:
        """Keep `slots [B, K, n]`, in this order, and free the rest. The live ones among them come first."""
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

    def _resized(self, capacity: int) -> dict[str, torch.Tensor]:
        return {name: layouts.resized(name, store, capacity) for name, store in self._stores.items()}

    # ---------------------------------------------------------------- rows
    def reorder(self, indices: torch.Tensor) -> None:
        """Make row i what row `indices[i]` was."""
        indices = indices.to(self.device)

        def rows(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
            return {name: tensor.index_select(0, indices) for name, tensor in tensors.items()}

        with torch.inference_mode(False):
            self._stores, self.summaries, self._home = rows(self._stores), rows(self.summaries), {}
            self.lengths, self.seen = (t.index_select(0, indices) for t in (self.lengths, self.seen))
            self.ones = torch.ones_like(self.seen)

    def reset(self) -> None:
        """Forget all tokens. The storage stays, zero-filled: dead slots must be finite."""
        self.used, self.fixed = 0, False
        home = {} if self._home is self._stores else self._home
        stores = (*self._stores.values(), *home.values(), *self.summaries.values())
        for tensor in (self.lengths, self.seen, *stores):
            tensor.zero_()

    # ---------------------------------------------------------------- look from outside
    def memory(self) -> int:
        """Bytes held for keys in all their stores, values, columns and summaries; not for positions."""
        held = [store for name, store in self._stores.items() if name != POSITIONS]
        return sum(t.numel() * t.element_size() for t in [*held, *self.summaries.values()])

    def places(self) -> list[tuple[int, torch.Size]]:
        """Address and shape of everything that a step reads and writes."""
        state = [*self._stores.values(), *self.summaries.values(), self.lengths, self.seen, self.ones]
        return [(tensor.data_ptr(), tensor.shape) for tensor in state]

    def stored(self) -> dict[str, torch.Tensor]:
        """All tensors by name: whole stores, columns and summaries, `lengths`, `seen`."""
        return {**self._stores, **self.summaries, "lengths": self.lengths, "seen": self.seen}

    def checkpoint(self) -> Checkpoint:
        """Note the lengths, so that after `restore` the next token is put in the same slot."""
        return Checkpoint(self.used, self.lengths.clone(), self.seen.clone())

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint; slots that were overwritten since are not restored."""
        self.used = checkpoint.used
        self.lengths.copy_(checkpoint.lengths)
        self.seen.copy_(checkpoint.seen)


def _dtype_and_size(shape: Shape, head_size: int) -> tuple[torch.dtype, tuple[int, ...]]:
    if not isinstance(shape, tuple):
        return shape, ()
    dtype, size = shape
    return dtype, (head_size if size == "D" else int(size),)
