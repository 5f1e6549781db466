"""The loops of a decode step, compiled: every number of the cache is read once, and nothing large is written.

Pairs are rows times KV heads. A piece of a pair is what one thread works on at a time, small enough for the
cache beside it. Weights stand relative to the largest logit of their piece; whoever joins pieces scales them.
Logits are in base 2. Letters: P pairs, G query heads of a pair, N pieces, T slots, S chosen slots, D head
size, r channels.

A `place [4]` says where a slot stands in the memory of a pair: `block, slot, channel, n`: three strides in
numbers and the slots in a block; the number of slot t and channel c is at
`t // n * block + t % n * slot + c * channel`.
"""

from typing import Any

import numpy as np
from numba import njit, prange

from .numbers import LANES, LOWEST, add_products, bounded, exp2, finite, larger, prefetch, take_apart, widen

PIECE = 1024  # slots
SOFTMAX, LOGITS, MAX = range(3)  # what ranks a slot: see `reference.top_by_channels`
# The processor foresees runs of memory, but not the channels of a block or chosen rows: they are asked for
# so many slots ahead.
_AHEAD, _ROWS_AHEAD = 2 * LANES, 4
_TILE = 128  # slots whose codes are taken apart together
_BLOCK = 64  # slots of a ranking of which only the best is looked at first
_FORCED = np.float32(3e38)
_LOG2_E = np.float32(1.4426950408889634)
NOT_BLOCKED = 2**40  # more slots than any block has

_compiled = njit(parallel=True, fastmath=True, nogil=True, cache=True, error_model="numpy")
_compiled_alone = njit(fastmath=True, nogil=True, cache=True, error_model="numpy")
_compiled_exactly = njit(nogil=True, cache=True, error_model="numpy")  # infinities are numbers here
_inlined = njit(fastmath=True, nogil=True, error_model="numpy")


@_inlined
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
    taken, chosen = _tempered(query[p], channels[p], scale if softcap > 0 else scale * _LOG2_E)
    if place[3] < NOT_BLOCKED:
        _by_block(chosen, taken, keys, starts[p], place, first, count, weights[p])
    elif place[1] == 1:
        _by_channel(chosen, taken, keys, starts[p], place, first, count, weights[p])
    else:
        _by_token(chosen, taken, keys, starts[p], place, first, count, weights[p])
    ranks = ranking[p, first : first + count]
    for g in range(group):
        row = weights[p, g, first : first + count]
        _cap(row, softcap)
        if g == 0 and group_score != SOFTMAX:
            ranks[:] = row
        elif group_score == LOGITS:
            for i in range(count):
                ranks[i] += row[i]
        elif group_score == MAX:
            for i in range(count):
                ranks[i] = larger(ranks[i], row[i])
        peaks[p, g, piece], sums[p, g, piece] = _weights_of(row)


@_inlined
def _weights_of(logits: Any) -> Any:
    """Turn logits into weights relative to the largest, LOWEST into 0; return the largest and their sum."""
    peak, total = LOWEST, np.float32(0)
    for i in range(logits.shape[0]):
        peak = larger(peak, logits[i])
    for i in range(logits.shape[0]):
        logits[i] = exp2(logits[i] - peak) if logits[i] > LOWEST else np.float32(0)
        total += logits[i]
    return peak, total


@_inlined
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


@_inlined
def _cap(logits: Any, softcap: Any) -> None:
    """Cap logits softly, where `softcap` is not 0, and bring them to base 2; not finite ones to LOWEST."""
    if softcap > 0:
        for i in range(logits.shape[0]):
            if logits[i] > LOWEST:
                logits[i] = softcap * np.tanh(logits[i] / softcap) * _LOG2_E
    for i in range(logits.shape[0]):
        logits[i] = finite(logits[i])


@_inlined
def _by_channel(
    chosen: Any, channels: Any, keys: Any, start: Any, place: Any, first: Any, count: Any, logits: Any
) -> None:
    """Write the `logits [G, T]` of `count` slots, four channels at a time: a channel lies side by side."""
    group = logits.shape[0]
    rows = np.empty((4, PIECE), np.float32)
    logits[:, first : first + count] = 0
    for c in range(0, channels.shape[0], 4):
        for j in range(4):
            begin = start + channels[c + j] * place[2] + first
            stored, row = keys[begin : begin + count], rows[j]
            for i in range(count):
                row[i] = widen(stored[i])
        r0, r1, r2, r3 = rows[0], rows[1], rows[2], rows[3]
        for g in range(group):
            row = logits[g, first : first + count]
            q0, q1, q2, q3 = chosen[g, c], chosen[g, c + 1], chosen[g, c + 2], chosen[g, c + 3]
            for i in range(count):
                row[i] += q0 * r0[i] + q1 * r1[i] + q2 * r2[i] + q3 * r3[i]


@_inlined
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


@_inlined
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
    key = np.empty(size, np.float32)
    for i in range(count):
        begin = start + (first + i) * size
        stored = keys[begin : begin + size]
        for d in range(size):
            key[d] = widen(stored[d])
        for g in range(group):
            row, logit = query[g], np.float32(0)
            for d in range(size):
                logit += row[d] * key[d]
            logits[g, first + i] = logit


@_inlined
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
        missed[p, g] = _scale_pieces(peaks[p, g], sums[p, g], sinks[p, g], scales[g])
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


@_inlined
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


@_inlined
def _force(ranks: Any, length: Any, newest: Any, forced: Any, p: Any) -> None:
    """Rank the last `newest` of `length` slots highest, or those that `forced [P, T]` marks, T not 0."""
    if forced.shape[1]:
        for i in range(length):
            if forced[p, i]:
                ranks[i] = _FORCED
    else:
        ranks[max(length - newest, 0) :] = _FORCED


@_inlined
def _scale_pieces(peaks: Any, sums: Any, sink: Any, scales: Any) -> Any:
    """Find the `scales` that make the weights of a head's pieces one softmax, its sink counted in.

    Returns the weight of all slots: 1 without a sink.
    """
    sink = sink * _LOG2_E
    peak, total = sink, np.float32(0)
    for n in range(scales.shape[0]):
        peak = larger(peak, peaks[n])
    for n in range(scales.shape[0]):
        scales[n] = exp2(peaks[n] - peak)
        total += scales[n] * sums[n]
    everything = total + (exp2(sink - peak) if sink > LOWEST else np.float32(0))
    everything = max(everything, np.float32(1e-30))  # no slot at all
    for n in range(scales.shape[0]):
        scales[n] /= everything
    return total / everything


@_inlined
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


@_inlined
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


@_inlined
def _take_apart(codes: Any, begins: Any, half: Any, numbers: Any) -> None:
    """Write number c of the i-th of _TILE vectors, `half` bytes from `begins[i]` on, to `c * _TILE + i`."""
    for c in range(0, half - 3, 4):
        for i in range(0, _TILE, LANES):
            take_apart(numbers, c * _TILE + i, _TILE, half * _TILE, codes, begins[i : i + LANES], c)
    for c in range(half // 4 * 4, half):
        for i in range(_TILE):
            byte = codes[begins[i] + c]
            numbers[c * _TILE + i], numbers[(half + c) * _TILE + i] = byte & 15, byte >> 4


@_inlined
def _score_pages(
    p: Any,
    query: Any,
    low: Any,
    low_starts: Any,
    low_place: Any,
    high: Any,
    high_starts: Any,
    high_place: Any,
    lengths: Any,
    scores: Any,
) -> None:
    """The largest product of `query [P, G, D]` with any key in a page's bounds, `scores [P, G, N]`.

    Of a pair's first `lengths [P]` pages; the others' scores stay as they are.
    """
    group, size = query.shape[1:]
    above, below = np.empty((group, size), np.float32), np.empty((group, size), np.float32)
    for g in range(group):
        for d in range(size):
            above[g, d] = larger(widen(query[p, g, d]), np.float32(0))
            below[g, d] = widen(query[p, g, d]) - above[g, d]
    least, most = np.empty(size, np.float32), np.empty(size, np.float32)
    for page in range(min(lengths[p], scores.shape[2])):
        _copy_slot(low, low_starts[p], low_place, page, least)
        _copy_slot(high, high_starts[p], high_place, page, most)
        for g in range(group):
            up, down, score = above[g], below[g], np.float32(0)
            for d in range(size):
                score += up[d] * most[d] + down[d] * least[d]
            scores[p, g, page] = score


@_compiled_alone
def top_channels(query: Any, channels: Any) -> None:
    """The `channels [P, r]` with the largest sum of abs(q) over the group's `query [P, G, D]`."""
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


@_inlined
def _largest(ranks: Any, places: Any) -> None:
    """The places of the k largest of more than k `ranks`: exactly those, each once, whatever the numbers."""
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


@_inlined
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
            scaled[g, d] = widen(query[p, g, d]) * (scale if softcap > 0 else scale * _LOG2_E)
    for i in range(count):
        slot = slots[p, first + i] if by_list else first + i
        if slot < 0 or slot >= lengths[p]:
            logits[:, first + i] = LOWEST
            continue
        _prefetch_chosen(keys, key_starts[p], key_place, slots, p, first + i, size)
        _copy_slot(keys, key_starts[p], key_place, slot, row)
        for g in range(group):
            q, logit = scaled[g], np.float32(0)
            for d in range(size):
                logit += q[d] * row[d]
            logits[g, first + i] = logit
    for g in range(group):
        head = logits[g, first : first + count]
        _cap(head, softcap)
        peaks[p, g, piece], sums[p, g, piece] = _weights_of(head)
    for i in range(count):
        slot = slots[p, first + i] if by_list else first + i
        if slot < 0 or slot >= lengths[p]:
            continue
        _prefetch_chosen(values, value_starts[p], value_place, slots, p, first + i, size)
        _copy_slot(values, value_starts[p], value_place, slot, row)
        for g in range(group):
            out, weight = blended[g], logits[g, first + i]
            for d in range(size):
                out[d] += weight * row[d]


@_inlined
def _prefetch_chosen(stored: Any, start: Any, place: Any, slots: Any, p: Any, i: Any, size: Any) -> None:
    """Ask for what stands in the slot `slots [P, S]` that comes soon after the i-th; nothing where S is 0."""
    if slots.shape[1] == 0:
        return
    slot = slots[p, min(i + _ROWS_AHEAD, slots.shape[1] - 1)]
    block, step, channel, n = place[0], place[1], place[2], place[3]
    begin = start + slot // n * block + slot % n * step
    for d in range(0, size, LANES if channel == 1 else 1):
        prefetch(stored, begin + d * channel)


@_inlined
def _copy_slot(stored: Any, start: Any, place: Any, slot: Any, row: Any) -> None:
    """Widen what stands in a slot into `row [D]`."""
    block, step, channel, n = place[0], place[1], place[2], place[3]
    begin = start + slot // n * block + slot % n * step
    if channel == 1:
        numbers = stored[begin : begin + row.shape[0]]
        for d in range(row.shape[0]):
            row[d] = widen(numbers[d])
    else:
        for d in range(row.shape[0]):
            row[d] = widen(stored[begin + d * channel])


@_inlined
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
        _scale_pieces(peaks[p, g], sums[p, g], sinks[p, g], scales[g])
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


@_inlined
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


@_compiled_exactly
def lowest(ranks: Any, lengths: Any, positions: Any, seen: Any, newest: Any, oldest: Any, slots: Any) -> None:
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


@_compiled_alone
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


@_compiled_alone
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


@_compiled_alone
def update_mean(mean: Any, new: Any, slots: Any, seen: Any) -> None:
    """Bring a mean `[P, D]` of `seen [P]` up to date with the last, `new [P, D]`; not at slots below 0."""
    for p in range(mean.shape[0]):
        if slots[p] >= 0:
            for d in range(mean.shape[1]):
                mean[p, d] += (widen(new[p, d]) - mean[p, d]) / np.float32(seen[p])


# Loops over jobs, side by side: pairs and their pieces, or pairs.
@_compiled
def channel_weights(jobs: int, *given: Any) -> None:
    for job in prange(jobs):
        _weigh_piece(np.int64(job), *given)


@_compiled
def best_slots(jobs: int, *given: Any) -> None:
    for job in prange(jobs):
        _choose_slots(np.int64(job), *given)


@_compiled
def ranked_slots(jobs: int, *given: Any) -> None:
    for job in prange(jobs):
        _choose_ranked(np.int64(job), *given)


@_compiled
def attend_pieces(jobs: int, *given: Any) -> None:
    for job in prange(jobs):
        _attend_piece(np.int64(job), *given)


@_compiled
def join_pieces(jobs: int, *given: Any) -> None:
    for job in prange(jobs):
        _join_pieces(np.int64(job), *given)


@_compiled
def code_scores(jobs: int, *given: Any) -> None:
    for job in prange(jobs):
        _score_codes(np.int64(job), *given)


@_compiled
def page_scores(jobs: int, *given: Any) -> None:
    for job in prange(jobs):
        _score_pages(np.int64(job), *given)
