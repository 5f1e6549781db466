"""Scores of slots by vectors in four bits, two numbers to a byte: see `four_bits`."""

from typing import Any

import numpy as np
from numba import prange

from .loops import PIECE, compiled, inlined
from .numbers import LANES, take_apart, widen

_TILE = 128  # slots whose codes are taken apart together


@inlined
def _score_codes(
    job: Any,
    query: Any,
    codes: Any,
    code_starts: Any,
    code_place: Any,
    ranges: Any,
    range_starts: Any,
    range_place: Any,
    lengths: Any,
    slots: Any,
    counts: Any,
    scores: Any,
) -> None:
    """Score a piece of the first `counts [P]` of `slots [P, S]` by their codes, two numbers to a byte.

    All live slots where S is 0. `query [P, G, r]` float32, scaled; `scores [P, G, T or S]` of slots outside
    [0, length) mean nothing, those beyond the piece's end stay as they are.
    """
    _, group, size = scores.shape
    half, by_list = query.shape[2] // 2, slots.shape[1] > 0
    p, piece = divmod(job, (size + PIECE - 1) // PIECE)
    end = min(min(counts[p], size) if by_list else lengths[p], (piece + 1) * PIECE)
    rows = (2 * half + 3) // 4 * 4  # four at a time: what is missing is zero
    asked, numbers = np.zeros((group, rows), np.float32), np.zeros(rows * _TILE, np.float32)
    sums = np.zeros(group, np.float32)
    begins, lows, steps = np.empty(_TILE, np.int64), np.empty(_TILE, np.float32), np.empty(_TILE, np.float32)
    for g in range(group):
        for c in range(2 * half):
            asked[g, c] = query[p, g, c]
            sums[g] += asked[g, c]
    for first in range(piece * PIECE, end, _TILE):
        count = min(_TILE, end - first)
        for i in range(_TILE):
            slot = slots[p, first + min(i, count - 1)] if by_list else first + min(i, count - 1)
            slot = slot if 0 <= slot < lengths[p] else 0
            begins[i], at = code_starts[p] + slot * code_place[1], range_starts[p] + slot * range_place[1]
            lows[i], steps[i] = widen(ranges[at]), widen(ranges[at + 1])
        _take_apart(codes, begins, half, numbers)
        # The step and the lowest number of a vector come in at the end.
        for g in range(group):
            products = scores[p, g, first : first + count]
            products[:] = 0
            for c in range(0, rows, 4):
                r0, r1 = numbers[c * _TILE :], numbers[(c + 1) * _TILE :]
                r2, r3 = numbers[(c + 2) * _TILE :], numbers[(c + 3) * _TILE :]
                q0, q1, q2, q3 = asked[g, c], asked[g, c + 1], asked[g, c + 2], asked[g, c + 3]
                for i in range(count):
                    products[i] += q0 * r0[i] + q1 * r1[i] + q2 * r2[i] + q3 * r3[i]
            for i in range(count):
                products[i] = products[i] * steps[i] + sums[g] * lows[i]


@inlined
def _take_apart(codes: Any, begins: Any, half: Any, numbers: Any) -> None:
    """Write number c of the i-th of _TILE vectors, `half` bytes from `begins[i]` on, to `c * _TILE + i`."""
    for c in range(0, half - 3, 4):
        for i in range(0, _TILE, LANES):
            take_apart(numbers, c * _TILE + i, _TILE, half * _TILE, codes, begins[i : i + LANES], c)
    for c in range(half // 4 * 4, half):
        for i in range(_TILE):
            byte = codes[begins[i] + c]
            numbers[c * _TILE + i], numbers[(half + c) * _TILE + i] = byte & 15, byte >> 4


@compiled
def score_codes(jobs: int, *given: Any) -> None:
    for job in prange(jobs):
        _score_codes(np.int64(job), *given)
