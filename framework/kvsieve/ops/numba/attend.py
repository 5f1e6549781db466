"""Attention over all slots or chosen ones, piece by piece; and the pieces joined."""

from typing import Any

import numpy as np
from numba import prange

from .loops import LOG2_E, cap, compiled, copy_row, inlined, place_of, scale_pieces, weights_of
from .numbers import LANES, LOWEST, add_products, prefetch, put_dots, widen

_AHEAD = 4  # chosen rows are asked for so many slots before they are read


@inlined
def _attend_piece(
    job: Any,
    query: Any,
    keys: Any,
    key_starts: Any,
    key_place: Any,
    values: Any,
    value_starts: Any,
    value_place: Any,
    lengths: Any,
    slots: Any,
    counts: Any,
    scale: Any,
    softcap: Any,
    weights: Any,
    peaks: Any,
    sums: Any,
    partial: Any,
) -> None:
    """Attend with `query [P, G, D]` to a piece of the first `counts [P]` of `slots [P, S]`.

    To all live slots where S is 0. Slots outside [0, length) are not read. Writes the blended values
    `partial [P, N, G, D]` and the weights `[P, G, S]`, both relative to `peaks [P, G, N]`, and their `sums`.
    """
    _, group, pieces = peaks.shape
    size, width, by_list = query.shape[2], weights.shape[2] // pieces, slots.shape[1] > 0
    p, piece = divmod(job, pieces)
    first, length = piece * width, lengths[p]
    count = min(width, (min(counts[p], slots.shape[1]) if by_list else length) - first)
    listed = slots.ravel()[p * slots.shape[1] + first :][: max(count, 0) if by_list else 0]
    spare = _first_live(listed, length) if by_list else 0
    blended = partial[p, piece]
    blended[:] = 0
    if count <= 0 or spare < 0:
        peaks[p, :, piece], sums[p, :, piece] = LOWEST, 0
        return
    logits, scaled = weights[p, :, first : first + width], np.empty((group, size), np.float32)
    for g in range(group):
        for d in range(size):
            scaled[g, d] = widen(query[p, g, d]) * (scale if softcap > 0 else scale * LOG2_E)
    # Four slots at a time; what is not live stands for the spare one, and weighs nothing.
    begins = np.empty((count + 3) // 4 * 4, np.int64)
    _find(begins, key_starts[p], key_place, listed, first, count, length, spare)
    _weigh(logits, scaled, keys, key_place, begins, count, by_list)
    for i in range(count if by_list else 0):
        if listed[i] < 0 or listed[i] >= length:
            logits[:, i] = LOWEST
    for g in range(group):
        head = logits[g, :count]
        cap(head, softcap)
        peaks[p, g, piece], sums[p, g, piece] = weights_of(head)
        logits[g, count : (count + 3) // 4 * 4] = 0
    _find(begins, value_starts[p], value_place, listed, first, count, length, spare)
    _blend(blended, logits, values, value_place, begins, count, by_list)


@inlined
def _first_live(slots: Any, length: Any) -> Any:
    """The first of `slots [S]` in [0, length); -1: none is."""
    for slot in slots:
        if 0 <= slot < length:
            return slot
    return np.int64(-1)


@inlined
def _find(
    begins: Any, start: Any, place: Any, slots: Any, first: Any, count: Any, length: Any, spare: Any
) -> None:
    """Write where each of `count` slots begins, of `slots [S]` or, where S is 0, of those from `first` on.

    And where the `spare` one does, for those that are not live and to make whole fours.
    """
    for i in range(begins.shape[0]):
        slot = spare
        if i < count:
            slot = slots[i] if slots.shape[0] else first + i
            slot = slot if 0 <= slot < length else spare
        begins[i] = place_of(slot, start, place)


@inlined
def _weigh(logits: Any, query: Any, keys: Any, place: Any, begins: Any, count: Any, by_list: Any) -> None:
    """Write the products of `query [G, D]` with `count` keys to `logits [G, S]`."""
    group, size = query.shape
    if place[2] == 1 and size % LANES == 0:
        for i in range(0, count, 4):
            _prefetch(keys, begins, i + _AHEAD, 1, size, by_list)
            for g in range(group):
                put_dots(logits[g], i, query[g], keys, begins[i], begins[i + 1], begins[i + 2], begins[i + 3])
        return
    row = np.empty(size, np.float32)
    for i in range(count):
        if i % 4 == 0:
            _prefetch(keys, begins, i + _AHEAD, place[2], size, by_list)
        copy_row(keys, begins[i], place[2], row)
        for g in range(group):
            q, logit = query[g], np.float32(0)
            for d in range(size):
                logit += q[d] * row[d]
            logits[g, i] = logit


@inlined
def _blend(
    blended: Any, weights: Any, values: Any, place: Any, begins: Any, count: Any, by_list: Any
) -> None:
    """Add to `blended [G, D]` the `count` values by their `weights [G, S]`."""
    group, size = blended.shape
    if place[2] == 1 and size % LANES == 0:
        for i in range(0, count, 4):
            _prefetch(values, begins, i + _AHEAD, 1, size, by_list)
            b0, b1, b2, b3 = begins[i], begins[i + 1], begins[i + 2], begins[i + 3]
            for g in range(group):
                # Weights that stay in registers: the compiler cannot know that `out` does not hold them.
                out, w0, w1 = blended[g], weights[g, i], weights[g, i + 1]
                w2, w3 = weights[g, i + 2], weights[g, i + 3]
                for d in range(0, size, LANES):
                    add_products(out, d, values, b0 + d, b1 + d, b2 + d, b3 + d, w0, w1, w2, w3)
        return
    row = np.empty(size, np.float32)
    for i in range(count):
        if i % 4 == 0:
            _prefetch(values, begins, i + _AHEAD, place[2], size, by_list)
        copy_row(values, begins[i], place[2], row)
        for g in range(group):
            out, weight = blended[g], weights[g, i]
            for d in range(size):
                out[d] += weight * row[d]


@inlined
def _prefetch(stored: Any, begins: Any, i: Any, channel: Any, size: Any, by_list: Any) -> None:
    """Ask for four chosen rows from the i-th on: the processor foresees only rows that follow each other."""
    if by_list and i + 3 < begins.shape[0]:
        for j in range(4):
            for d in range(0, size, LANES if channel == 1 else 1):
                prefetch(stored, begins[i + j] + d * channel)


@inlined
def _join_pieces(
    p: Any,
    partial: Any,
    weights: Any,
    peaks: Any,
    sums: Any,
    sinks: Any,
    slots: Any,
    counts: Any,
    lengths: Any,
    tail_weight: Any,
    tail_value: Any,
    output: Any,
    mass: Any,
) -> None:
    """Join the pieces of `attend_pieces` into `output [P, G, D]`, and `mass [P, G or 1, T]` unless T is 0.

    `tail_weight [P, G]` and `tail_value [P, D]` where P is not 0.
    """
    _, group, pieces = peaks.shape
    scales = np.empty((group, pieces), np.float32)
    for g in range(group):
        scale_pieces(peaks[p, g], sums[p, g], sinks[p, g], scales[g])
        out = output[p, g]
        out[:] = 0
        for n in range(pieces):
            scale, blended = scales[g, n], partial[p, n, g]
            for d in range(out.shape[0]):
                out[d] += scale * blended[d]
        if tail_weight.shape[0]:
            share, value = tail_weight[p, g], tail_value[p]
            for d in range(out.shape[0]):
                out[d] = (np.float32(1) - share) * out[d] + share * widen(value[d])
    if mass.shape[2]:
        _collect_mass(weights[p], scales, slots, p, counts[p], lengths[p], mass[p])


@inlined
def _collect_mass(weights: Any, scales: Any, slots: Any, p: Any, count: Any, length: Any, mass: Any) -> None:
    """Add the weights of heads to the `mass [G, T]` of slots, or their mean to `mass [1, T]`."""
    group, pieces = scales.shape
    width, by_list = weights.shape[1] // pieces, slots.shape[1] > 0
    share = np.float32(1) if mass.shape[0] == group else np.float32(1) / np.float32(group)
    for g in range(group):
        row = mass[g % mass.shape[0]]
        for i in range(min(count, slots.shape[1]) if by_list else length):
            slot = slots[p, i] if by_list else i
            if 0 <= slot < length:
                row[slot] += weights[g, i] * scales[g, i // width] * share


@compiled
def attend_pieces(jobs: int, *given: Any) -> None:
    for job in prange(jobs):
        _attend_piece(np.int64(job), *given)


@compiled
def join_pieces(jobs: int, *given: Any) -> None:
    for job in prange(jobs):
        _join_pieces(np.int64(job), *given)
