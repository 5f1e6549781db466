"""Attention over all slots or chosen ones, piece by piece; and the pieces joined."""

from typing import Any

import numpy as np
from numba import prange

from .loops import LOG2_E, cap, compiled, copy_slot, inlined, scale_pieces, weights_of
from .numbers import LANES, LOWEST, prefetch, widen

_ROWS_AHEAD = 4  # the processor does not foresee chosen rows: they are asked for so many slots ahead


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
    first = piece * width
    count = min(width, (min(counts[p], slots.shape[1]) if by_list else lengths[p]) - first)
    blended = partial[p, piece]
    blended[:] = 0
    if count <= 0:
        peaks[p, :, piece], sums[p, :, piece] = LOWEST, 0
        return
    row, logits, scaled = np.empty(size, np.float32), weights[p], np.empty((group, size), np.float32)
    for g in range(group):
        for d in range(size):
            scaled[g, d] = widen(query[p, g, d]) * (scale if softcap > 0 else scale * LOG2_E)
    for i in range(count):
        slot = slots[p, first + i] if by_list else first + i
        if slot < 0 or slot >= lengths[p]:
            logits[:, first + i] = LOWEST
            continue
        _prefetch_chosen(keys, key_starts[p], key_place, slots, p, first + i, size)
        copy_slot(keys, key_starts[p], key_place, slot, row)
        for g in range(group):
            q, logit = scaled[g], np.float32(0)
            for d in range(size):
                logit += q[d] * row[d]
            logits[g, first + i] = logit
    for g in range(group):
        head = logits[g, first : first + count]
        cap(head, softcap)
        peaks[p, g, piece], sums[p, g, piece] = weights_of(head)
    for i in range(count):
        slot = slots[p, first + i] if by_list else first + i
        if slot < 0 or slot >= lengths[p]:
            continue
        _prefetch_chosen(values, value_starts[p], value_place, slots, p, first + i, size)
        copy_slot(values, value_starts[p], value_place, slot, row)
        for g in range(group):
            out, weight = blended[g], logits[g, first + i]
            for d in range(size):
                out[d] += weight * row[d]


@inlined
def _prefetch_chosen(stored: Any, start: Any, place: Any, slots: Any, p: Any, i: Any, size: Any) -> None:
    """Ask for what stands in the slot `slots [P, S]` that comes soon after the i-th; nothing where S is 0."""
    if slots.shape[1] == 0:
        return
    slot = slots[p, min(i + _ROWS_AHEAD, slots.shape[1] - 1)]
    block, step, channel, n = place[0], place[1], place[2], place[3]
    begin = start + slot // n * block + slot % n * step
    for d in range(0, size, LANES if channel == 1 else 1):
        prefetch(stored, begin + d * channel)


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
