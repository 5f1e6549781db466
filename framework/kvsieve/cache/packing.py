"""Packed storage: heads that keep different numbers stand one after another, each with room for its own.

A padded store is `[B, K, C, ...]`: as long in every head as the longest needs. A packed one is `[1, 1, S,
...]`: row b and KV head k have its slots `starts[b * K + k]` to `starts[b * K + k + 1]`, and no others.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from .. import ops


class Packing:
    """The room of every row and head in packed stores.

    Args:
        rooms: slots of each row and head: B lists of K.
        grows: of each of the K heads, whether its room grows with the context.
        capacity: slots in use (of the longest head) up to which no head needs more room.
    """

    starts: torch.Tensor  # [B * K + 1] int64

    def __init__(
        self, rooms: list[list[int]], grows: Sequence[bool], capacity: int, device: torch.device
    ) -> None:
        self.rooms, self.grows, self.capacity = rooms, grows, capacity
        self.starts = torch.tensor([0, *itertools.accumulate(itertools.chain(*rooms))], device=device)

    def grown(self, extra: int) -> Packing:
        """With `extra` more slots for every head that grows."""
        rooms = [
            [room + extra * grows for room, grows in zip(row, self.grows, strict=True)] for row in self.rooms
        ]
        return Packing(rooms, self.grows, self.capacity + extra, self.starts.device)

    def of_rows(self, rows: Sequence[int]) -> Packing:
        """Of these rows, in this order."""
        return Packing([self.rooms[row] for row in rows], self.grows, self.capacity, self.starts.device)

    def pack(self, store: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
        """Copy a padded store's slots `kept [B, K, T]` of each head, in this order, into its room.

        In room beyond T stand copies of the last.
        """
        head, slot = self._every_slot()
        slot = kept.flatten(0, 1)[head, slot.clamp(max=kept.shape[2] - 1)]
        return store.flatten(0, 1)[head, slot][None, None]

    def unpack(self, store: torch.Tensor, size: int) -> torch.Tensor:
        """A copy `[B, K, T, ...]` of the first T = `size` slots of every head; finite beyond its room."""
        return ops.reference.places.unpacked(store, self.starts, (len(self.rooms), len(self.grows)), size)

    def repack(self, store: torch.Tensor, old: Packing, heads: torch.Tensor) -> torch.Tensor:
        """Copy a store that is packed as `old` says: every head from the one of `heads [B * K]` there.

        What it has no slot for is zero.
        """
        head, slot = self._every_slot()
        there = heads[head]
        held = slot < old.starts.diff()[there]
        taken = store[0, 0, (old.starts[there] + slot) * held]
        return taken.masked_fill(~held.view(-1, *[1] * (taken.dim() - 1)), 0)[None, None]

    def _every_slot(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The head `b * K + k` of every packed slot, and its number within that head: `[S]` each."""
        heads = torch.arange(len(self.starts) - 1, device=self.starts.device)
        head = heads.repeat_interleave(self.starts.diff(), output_size=sum(map(sum, self.rooms)))
        return head, torch.arange(len(head), device=head.device) - self.starts[head]
