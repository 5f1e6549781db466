"""The new token of a step: the slot that it overwrites, and all that is written."""

from typing import Any

import numpy as np

from .loops import compiled_alone, compiled_exactly
from .numbers import widen


@compiled_exactly
def find_lowest(
    ranks: Any, lengths: Any, positions: Any, seen: Any, newest: Any, oldest: Any, slots: Any
) -> None:
    """The first of the live slots with the lowest `ranks [P, T]`, for each pair, into `slots [P]`; else 0.

    NaN is as high as infinity; where `positions [P, T]` are given, so are those below `oldest` and the last
    `newest` of `seen [P]`.
    """
    for p in range(slots.shape[0]):
        slots[p], least = 0, np.inf
        for i in range(min(lengths[p], ranks.shape[1])):
            kept = positions.shape[0] and (positions[p, i] >= seen[p] - newest or positions[p, i] < oldest)
            if ranks[p, i] < least and not kept:
                slots[p], least = i, ranks[p, i]


@compiled_alone
def place_token(
    lengths: Any, seen: Any, limits: Any, lowest: Any, active: Any, slots: Any, written: Any
) -> None:
    """Count one more token in `lengths [P]` and `seen [P]`, and say in which of the `slots [P]` it stands.

    A pair that holds its `limits [P]` has it in its `lowest [P]`, where P is not 0. `written [P]` is the
    same, and -1 in rows that are not `active [B]`, where B is not 0: those stay as they are.
    """
    pairs, rows = slots.shape[0], active.shape[0]
    for p in range(pairs):
        slots[p] = lowest[p] if lowest.shape[0] and lengths[p] >= limits[p] else lengths[p]
        written[p] = -1 if rows and not active[p // (pairs // rows)] else slots[p]
        if written[p] >= 0:
            seen[p] += 1
            lengths[p] += slots[p] == lengths[p]


@compiled_alone
def put_token(stored: Any, starts: Any, place: Any, rooms: Any, new: Any, slots: Any) -> None:
    """Write `new [P, D]` at `slots [P]` of a store, as the bits that they are; not outside [0, rooms [P])."""
    block, step, channel, n = place[0], place[1], place[2], place[3]
    for p in range(slots.shape[0]):
        slot = slots[p]
        if slot < 0 or slot >= rooms[p]:
            continue
        begin = starts[p] + slot // n * block + slot % n * step
        for d in range(new.shape[1]):
            stored[begin + d * channel] = new[p, d]


@compiled_alone
def update_mean(mean: Any, new: Any, slots: Any, seen: Any) -> None:
    """Bring a mean `[P, D]` of `seen [P]` up to date with the last, `new [P, D]`; not at slots below 0."""
    for p in range(mean.shape[0]):
        if slots[p] >= 0:
            for d in range(mean.shape[1]):
                mean[p, d] += (widen(new[p, d]) - mean[p, d]) / np.float32(seen[p])
