"""Weights of all slots by a few channels of their keys, piece by piece."""

from typing import Any

import numpy as np
from numba import prange

from .loops import LOG2_E, NOT_BLOCKED, PIECE, cap, compiled, copy_row, inlined, weights_of
from .numbers import LANES, LOWEST, add_products, larger, prefetch, put_dots, widen

# The processor foresees runs of memory, but not the channels of a block: they are asked for so many slots
# ahead.
_AHEAD = 2 * LANES
SOFTMAX, LOGITS, MAX = range(3)  # what ranks a slot: see `reference.top_by_channels`


@inlined
def _weigh_piece(
    job: Any,
    query: Any,
    channels: Any,
    keys: Any,
    starts: Any,
    place: Any,
    lengths: Any,
    scale: Any,
    softcap: Any,
    group_score: Any,
    weights: Any,
    peaks: Any,
    sums: Any,
    ranking: Any,
) -> None:
    """Weigh a piece's live slots, `weights [P, G, T]`, by `channels [P, r]` of keys and `query [P, G, D]`.

    With the largest logit and the sum of weights, `[P, G, N]`; and, unless the `group_score` is
    SOFTMAX, the `ranking [P, T]` of slots by the sum or the largest of their logits. `softcap` 0 is none.
    """
    _, group, pieces = peaks.shape
    p, piece = divmod(job, pieces)
    first = piece * PIECE
    count = min(PIECE, lengths[p] - first)
    if count <= 0:
        peaks[p, :, piece], sums[p, :, piece] = LOWEST, 0
        return
    taken, chosen = _tempered(query[p], channels[p], scale if softcap > 0 else scale * LOG2_E)
    if place[3] < NOT_BLOCKED:
        _by_block(chosen, taken, keys, starts[p], place, first, count, weights[p])
    elif place[1] == 1:
        _by_channel(chosen, taken, keys, starts[p], place, first, count, weights[p])
    else:
        _by_token(chosen, taken, keys, starts[p], place, first, count, weights[p])
    ranks = ranking[p, first : first + count]
    for g in range(group):
        row = weights[p, g, first : first + count]
        cap(row, softcap)
        if g == 0 and group_score != SOFTMAX:
            ranks[:] = row
        elif group_score == LOGITS:
            for i in range(count):
                ranks[i] += row[i]
        elif group_score == MAX:
            for i in range(count):
                ranks[i] = larger(ranks[i], row[i])
        peaks[p, g, piece], sums[p, g, piece] = weights_of(row)


@inlined
def _tempered(query: Any, channels: Any, scale: Any) -> Any:
    """The channels that a head reads and the query in them `[G, r]`, scaled and tempered for those missing.

    Their number is rounded up to four: one is repeated, with a query of zero. So is one outside [0, D).
    """
    (group, size), r = query.shape, channels.shape[0]
    taken = np.empty((r + 3) // 4 * 4, np.int64)
    chosen = np.zeros((group, taken.shape[0]), np.float32)
    for c in range(taken.shape[0]):
        taken[c] = min(max(channels[c if c < r else 0], 0), size - 1)
    for g in range(group):
        whole, part = np.float32(0), np.float32(0)
        for d in range(size):
            whole += abs(widen(query[g, d]))
        for c in range(r):
            if taken[c] == channels[c]:
                chosen[g, c] = widen(query[g, taken[c]])
                part += abs(chosen[g, c])
        if whole > 0:
            chosen[g] *= scale / np.sqrt(max(part / whole, np.float32(1e-6)))
    return taken, chosen


@inlined
def _by_channel(
    chosen: Any, channels: Any, keys: Any, start: Any, place: Any, first: Any, count: Any, logits: Any
) -> None:
    """Write the `logits [G, T]` of `count` slots, four channels at a time: a channel lies side by side."""
    group, whole = logits.shape[0], count // LANES * LANES
    logits[:, first : first + count] = 0
    for c in range(0, channels.shape[0], 4):
        begin = start + first
        c0, c1 = begin + channels[c] * place[2], begin + channels[c + 1] * place[2]
        c2, c3 = begin + channels[c + 2] * place[2], begin + channels[c + 3] * place[2]
        for g in range(group):
            row = logits[g, first : first + count]
            q0, q1, q2, q3 = chosen[g, c], chosen[g, c + 1], chosen[g, c + 2], chosen[g, c + 3]
            for i in range(0, whole, LANES):
                add_products(row, i, keys, c0 + i, c1 + i, c2 + i, c3 + i, q0, q1, q2, q3)
            for i in range(whole, count):
                row[i] += q0 * widen(keys[c0 + i]) + q1 * widen(keys[c1 + i])
                row[i] += q2 * widen(keys[c2 + i]) + q3 * widen(keys[c3 + i])


@inlined
def _by_block(
    chosen: Any, channels: Any, keys: Any, start: Any, place: Any, first: Any, count: Any, logits: Any
) -> None:
    """Write the `logits [G, T]` of `count` slots, a block at a time: in it a channel lies side by side."""
    group = logits.shape[0]
    block, channel, n = place[0], place[2], place[3]
    sums = np.empty(group * LANES, np.float32)
    for slot in range(first, first + count, LANES):
        begin = start + slot // n * block + slot % n
        ahead = start + (slot + _AHEAD) // n * block + (slot + _AHEAD) % n
        for c in range(channels.shape[0]):
            prefetch(keys, ahead + channels[c] * channel)
        sums[:] = 0
        for c in range(0, channels.shape[0], 4):
            c0, c1 = begin + channels[c] * channel, begin + channels[c + 1] * channel
            c2, c3 = begin + channels[c + 2] * channel, begin + channels[c + 3] * channel
            for g in range(group):
                q = chosen[g]
                add_products(sums, g * LANES, keys, c0, c1, c2, c3, q[c], q[c + 1], q[c + 2], q[c + 3])
        for g in range(group):
            for i in range(min(LANES, first + count - slot)):
                logits[g, slot + i] = sums[g * LANES + i]


@inlined
def _by_token(
    chosen: Any, channels: Any, keys: Any, start: Any, place: Any, first: Any, count: Any, logits: Any
) -> None:
    """Write the `logits [G, T]` of `count` slots, token by token: each key is read whole."""
    group = logits.shape[0]
    size = np.int64(place[1])
    query = np.zeros((group, size), np.float32)
    for c in range(channels.shape[0]):
        for g in range(group):
            query[g, channels[c]] += chosen[g, c]
    begin, done = start + first * size, 0
    if size % LANES == 0:
        done = count // 4 * 4
        for i in range(0, done, 4):
            k = begin + i * size
            for g in range(group):
                put_dots(logits[g], first + i, query[g], keys, k, k + size, k + 2 * size, k + 3 * size)
    key = np.empty(size, np.float32)
    for i in range(done, count):
        copy_row(keys, begin + i * size, 1, key)
        for g in range(group):
            row, logit = query[g], np.float32(0)
            for d in range(size):
                logit += row[d] * key[d]
            logits[g, first + i] = logit


@compiled
def channel_weights(jobs: int, *given: Any) -> None:
    for job in prange(jobs):
        _weigh_piece(np.int64(job), *given)
