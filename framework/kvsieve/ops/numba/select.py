"""The search for the best: channels, and slots by weights or by a ranking."""

from typing import Any

import numpy as np
from numba import prange

from .loops import PIECE, compiled, compiled_alone, inlined, scale_pieces
from .numbers import bounded, larger, widen
from .scores import SOFTMAX

_BLOCK = 64  # slots of a ranking of which only the best is looked at first
_FORCED = np.float32(3e38)


@compiled_alone
def choose_channels(query: Any, channels: Any) -> None:
    """The `channels [P, r]` with the _largest sum of abs(q) over the group's `query [P, G, D]`."""
    pairs, group, size = query.shape
    r = channels.shape[1]
    for p in range(pairs):
        total = np.zeros(size, np.float32)
        for g in range(group):
            for d in range(size):
                total[d] += abs(widen(query[p, g, d]))
        if r == size:
            channels[p] = np.arange(size)
        else:
            _largest(total, channels[p])


@inlined
def _choose_slots(
    p: Any,
    weights: Any,
    peaks: Any,
    sums: Any,
    lengths: Any,
    newest: Any,
    forced: Any,
    sinks: Any,
    group_score: Any,
    ranking: Any,
    slots: Any,
    missed: Any,
) -> None:
    """Choose the k best live `slots [P, k]` of a pair; the others have the weight `missed [P, G]`.

    The last `newest` slots are in, or those that `forced [P, T]` marks, where T is not 0. `sinks [P, G]`,
    where not LOWEST, take weight and are no slots.
    """
    group, k, length = peaks.shape[1], slots.shape[1], lengths[p]
    if length <= k:
        slots[p] = np.arange(k)
        missed[p] = 0
        return
    pieces = (length + PIECE - 1) // PIECE
    scales = np.empty((group, pieces), np.float32)
    for g in range(group):
        missed[p, g] = scale_pieces(peaks[p, g], sums[p, g], sinks[p, g], scales[g])
    ranks = ranking[p, :length]
    if group_score == SOFTMAX:
        _rank_by_weights(weights[p], scales, ranks)
    _force(ranks, length, newest, forced, p)
    _largest(ranks, slots[p])
    for g in range(group):
        held = np.float32(0)
        for slot in slots[p]:
            held += weights[p, g, slot] * scales[g, slot // PIECE]
        missed[p, g] = max(missed[p, g] - held, np.float32(0))


@inlined
def _choose_ranked(
    p: Any, ranking: Any, lengths: Any, newest: Any, forced: Any, ranks: Any, slots: Any
) -> None:
    """Choose the k best of a pair's live `slots [P, k]` by a `ranking [P, T]`, which `ranks [P, T]` bounds.

    The last `newest` slots are in, or those that `forced [P, T]` marks, where T is not 0.
    """
    length, k = min(lengths[p], ranking.shape[1]), slots.shape[1]
    if length <= k:
        slots[p] = np.arange(k)
        return
    own = ranks[p, :length]
    for i in range(length):
        own[i] = bounded(ranking[p, i])
    _force(own, length, newest, forced, p)
    _largest(own, slots[p])


@inlined
def _force(ranks: Any, length: Any, newest: Any, forced: Any, p: Any) -> None:
    """Rank the last `newest` of `length` slots highest, or those that `forced [P, T]` marks, T not 0."""
    if forced.shape[1]:
        for i in range(length):
            if forced[p, i]:
                ranks[i] = _FORCED
    else:
        ranks[max(length - newest, 0) :] = _FORCED


@inlined
def _rank_by_weights(weights: Any, scales: Any, ranks: Any) -> None:
    """Rank slots `[T]` by the sum of their `weights [G, T]` over the group; `scales [G, N]` of pieces."""
    ranks[:] = 0
    for n in range(scales.shape[1]):
        first, last = n * PIECE, min((n + 1) * PIECE, ranks.shape[0])
        part = ranks[first:last]
        for g in range(scales.shape[0]):
            row, scale = weights[g, first:last], scales[g, n]
            for i in range(part.shape[0]):
                part[i] += row[i] * scale


@inlined
def _largest(ranks: Any, places: Any) -> None:
    """The places of the k _largest of more than k `ranks`: exactly those, each once, whatever the numbers."""
    length, k = ranks.shape[0], places.shape[0]
    blocks = (length + _BLOCK - 1) // _BLOCK
    best = np.empty(blocks, np.float32)
    for b in range(blocks):
        part = ranks[b * _BLOCK : min((b + 1) * _BLOCK, length)]
        most = part[0]
        for i in range(part.shape[0]):
            most = larger(most, part[i])
        best[b] = most
    # The k blocks with the best maxima hold k ranks that are no worse than the k-th of them.
    bar = np.partition(best, blocks - k)[blocks - k] if blocks > k else -_FORCED
    found, values, count = np.empty(length, np.int64), np.empty(length, np.float32), 0
    for b in range(blocks):
        if best[b] >= bar:
            for i in range(b * _BLOCK, min((b + 1) * _BLOCK, length)):
                if ranks[i] >= bar:
                    found[count], values[count] = i, ranks[i]
                    count += 1
    bar = np.partition(values[:count], count - k)[count - k]
    chosen = 0
    for i in range(count):
        if values[i] > bar and chosen < k:
            places[chosen] = found[i]
            chosen += 1
    for i in range(count):
        if values[i] == bar and chosen < k:
            places[chosen] = found[i]
            chosen += 1


@compiled
def best_slots(jobs: int, *given: Any) -> None:
    for job in prange(jobs):
        _choose_slots(np.int64(job), *given)


@compiled
def ranked_slots(jobs: int, *given: Any) -> None:
    for job in prange(jobs):
        _choose_ranked(np.int64(job), *given)
