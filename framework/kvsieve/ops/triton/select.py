"""Exact top-k by radix select on two levels, without looking at the device and without a row of sorted numbers.

Rankings become integers of the same order. First every chunk of a row keeps its k best: whatever is among the k best
of the row is among them. Then one program a row and KV head takes the k best of what the chunks kept. Each level finds
the k-th best value eight bits at a time, from a histogram of those that agree with it so far, and then writes what is
better, in the order of slots. Of equal values at the edge the newest slots are taken: those with the highest numbers.
So a result is always the same, bit for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from . import launch
from .attend import LOG2_E
from .scores import Pieces, score_pieces

_LOWEST = tl.constexpr(-(2**31))
_HIGHEST = tl.constexpr(2**31 - 1)


def top_slots(
    ranking: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    *,
    newest: int = 0,
    forced: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """As `reference.top_slots`, the slots in ascending order; of equal ones at the edge the newest are taken."""
    slots, counts, _ = _select(ranking.float(), None, None, lengths, 1, k, "logits", newest, forced)
    return slots, counts


def top_by_channels(
    query: torch.Tensor,
    keys: torch.Tensor,
    lengths: torch.Tensor,
    channels: torch.Tensor,
    k: int,
    *,
    size: int,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    group_score: str = "softmax",
    newest: int = 0,
    forced: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """As `reference.top_by_channels`, in three kernels.

    Scores are written once and read once, in float16 where keys have 16 bits; their sum over the group is never
    stored: each head's weights have another divisor, which is known only when the whole row is scored.
    """
    pieces = score_pieces(query, keys, lengths, channels, scale=scale, softcap=softcap)
    slots, counts, missed = _select(
        None, pieces, sinks, lengths, query.shape[2], k, group_score, newest, forced
    )
    assert missed is not None
    return slots, counts, missed


def _select(
    ranking: torch.Tensor | None,
    pieces: Pieces | None,
    sinks: torch.Tensor | None,
    lengths: torch.Tensor,
    group: int,
    k: int,
    group_score: str,
    newest: int,
    forced: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    rows, heads = lengths.shape
    pairs, device = rows * heads, lengths.device
    if pieces is None:
        assert ranking is not None
        scores, lse, aligned, splits, total = None, None, 0, 0, ranking.shape[2]
    else:
        (scores, lse), aligned, splits = pieces, pieces.scores.shape[2], pieces.lse.shape[1]
        total = aligned
    chunk = launch.chunk(total)
    chunks, kept = triton.cdiv(total, chunk), min(k, chunk)
    kept_keys = torch.empty(pairs, chunks * kept, dtype=torch.int32, device=device)
    kept_slots = torch.empty_like(kept_keys)
    slots = torch.empty(rows, heads, k, dtype=torch.int64, device=device)
    counts = torch.empty_like(lengths, memory_format=torch.contiguous_format)
    missed = None
    if pieces is not None:
        missed = torch.empty(rows, heads, group, dtype=torch.float32, device=device)
    lengths = lengths.contiguous()
    group_shape: dict[str, Any] = {"G": group, "GROUP": triton.next_power_of_2(group)}
    _best_of_chunk[(pairs, chunks)](
        *(ranking, scores, lse, lengths, forced, kept_keys, kept_slots),
        *((0, 0, 0) if ranking is None else ranking.stride()),
        *((0, 0, 0) if forced is None else forced.stride()),
        *(heads, aligned, splits, chunks, kept, newest),
        **group_shape,
        CHUNK=chunk,
        SOFTMAX=group_score == "softmax",
        num_warps=max(4, chunk // 512),
    )
    _best_of_kept[(pairs,)](
        *(kept_keys, kept_slots, scores, lse, sinks if sinks is None else sinks.contiguous(), lengths),
        *(slots, counts, missed),
        *(heads, aligned, splits, chunks, kept, k),
        **group_shape,
        CHUNK=chunk,
        TILE=launch.KEPT_TILE,
        num_warps=8,
    )
    return slots, counts, missed


@triton.jit
def _ordered(x):
    """An int32 with the order of a float32; both zeros are one."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _histogram(keys, mask, prefix, DIGIT: tl.constexpr):
    """How many of the masked keys whose higher digits are `prefix` have each value of digit 3, 2, 1 or 0."""
    biased = keys ^ _LOWEST  # unsigned order
    digit = (biased >> (8 * DIGIT)) & 255
    if DIGIT < 3:
        mask &= ((biased >> (8 * DIGIT + 8)) & ((1 << (24 - 8 * DIGIT)) - 1)) == prefix
    others = tl.sum(1 - mask.to(tl.int32))
    found = tl.histogram(tl.where(mask, digit, 0), 256)
    return found - tl.where(tl.arange(0, 256) == 0, others, 0)


@triton.jit
def _digit(histogram, wanted):
    """The digit of the `wanted`-th best, how many are still wanted among those that share it, and how many do."""
    d = tl.arange(0, 256)
    at_least = tl.sum(histogram) - tl.cumsum(histogram, 0) + histogram
    digit = tl.max(tl.where(at_least >= wanted, d, 0))
    above = tl.sum(tl.where(d > digit, histogram, 0))
    return digit, wanted - above, tl.sum(tl.where(d == digit, histogram, 0))


@triton.jit
def _row_lse(lse, pair, splits, G: tl.constexpr, GROUP: tl.constexpr):
    """[GROUP]: the log-sum-exp, base 2, of each head over all pieces of its row."""
    g, s = tl.arange(0, GROUP), tl.arange(0, 64)
    peak = tl.full([GROUP], float("-inf"), tl.float32)
    total = tl.zeros([GROUP], tl.float32)
    for first in range(0, splits, 64):
        at = (pair * splits + first + s)[None, :] * G + g[:, None]
        piece = tl.load(lse + at, mask=(g < G)[:, None] & (first + s < splits)[None, :], other=float("-inf"))
        top = tl.maximum(tl.maximum(peak, tl.max(piece, 1)), -1e30)  # finite, where nothing is live
        total = total * tl.exp2(peak - top) + tl.sum(tl.exp2(piece - top[:, None]), 1)
        peak = top
    return peak + tl.log2(tl.maximum(total, 1e-37))


@triton.jit(do_not_specialize=["splits", "chunks", "newest"])
def _best_of_chunk(
    ranking,  # [B, K, T] float32, or None: made from the scores
    scores,  # [B, K, G, aligned]
    lse,  # [B, K, splits, G]
    lengths,
    forced,  # [B, K, T] bool, or None: the last `newest` slots
    kept_keys,  # [B, K, chunks, kept]
    kept_slots,
    ranking_row,
    ranking_head,
    ranking_slot,
    forced_row,
    forced_head,
    forced_slot,
    heads,
    aligned,
    splits,
    chunks,
    kept,
    newest,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    SOFTMAX: tl.constexpr,
):
    pair, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + pair).to(tl.int32)
    begin = chunk * CHUNK
    if begin >= length:
        return
    index = begin + tl.arange(0, CHUNK)
    live = index < length
    b, h = pair // heads, pair % heads
    if ranking is not None:
        at = b * ranking_row + h * ranking_head + index.to(tl.int64) * ranking_slot
        value = tl.load(ranking + at, mask=live, other=0.0)
    else:
        g = tl.arange(0, GROUP)
        whole = _row_lse(lse, pair, splits, G, GROUP)
        value = tl.zeros([CHUNK], tl.float32)
        whole_vectors = index < tl.cdiv(length, 16) * 16
        for i in tl.static_range(G):
            score = tl.load(scores + (pair * G + i) * aligned + index, mask=whole_vectors, other=0.0)
            score = score.to(tl.float32)
            if SOFTMAX:
                score = tl.exp2(score - tl.sum(tl.where(g == i, whole, 0.0)))
            value += score
    key = _ordered(value)
    if forced is not None:
        at = b * forced_row + h * forced_head + index.to(tl.int64) * forced_slot
        key = tl.where(tl.load(forced + at, mask=live, other=0) != 0, _HIGHEST, key)
    else:
        key = tl.where(index >= length - newest, _HIGHEST, key)

    wanted = tl.minimum(kept, length - begin)
    prefix = 0
    same = 0
    for i in tl.static_range(4):
        digit, wanted, same = _digit(_histogram(key, live, prefix, 3 - i), wanted)
        prefix = prefix * 256 + digit
    edge = prefix ^ _LOWEST
    equal = live & (key == edge)
    chosen = (live & (key > edge)) | (equal & (tl.cumsum(equal.to(tl.int32), 0) > same - wanted))
    place = (pair * chunks + chunk) * kept + tl.cumsum(chosen.to(tl.int32), 0) - 1
    tl.store(kept_keys + place, key, mask=chosen)
    tl.store(kept_slots + place, index, mask=chosen)


@triton.jit(do_not_specialize=["splits", "chunks"])
def _best_of_kept(
    kept_keys,  # [B, K, chunks * kept], without gaps: only the last chunk of a row keeps fewer
    kept_slots,
    scores,
    lse,
    sinks,  # [K, G] or None
    lengths,
    slots,  # [B, K, k] int64
    counts,  # [B, K] int64
    missed,  # [B, K, G] float32 or None
    heads,
    aligned,
    splits,
    chunks,
    kept,
    k,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + pair).to(tl.int32)
    full = length // CHUNK
    many = full * kept + tl.minimum(length - full * CHUNK, kept)
    count = tl.minimum(length, k)
    tl.store(counts + pair, count.to(tl.int64))
    kept_keys += pair * chunks * kept
    kept_slots += pair * chunks * kept
    n = tl.arange(0, TILE)

    wanted = count
    prefix = 0
    same = 0
    for i in tl.static_range(4):
        histogram = tl.zeros([256], tl.int32)
        for first in range(0, many, TILE):
            key = tl.load(kept_keys + first + n, mask=first + n < many, other=0)
            histogram += _histogram(key, first + n < many, prefix, 3 - i)
        digit, wanted, same = _digit(histogram, wanted)
        prefix = prefix * 256 + digit
    edge = prefix ^ _LOWEST

    g = tl.arange(0, GROUP)
    if missed is not None:
        live_lse = _row_lse(lse, pair, splits, G, GROUP)
        whole = live_lse
        if sinks is not None:
            sink = tl.load(sinks + (pair % heads) * G + g, mask=g < G, other=0.0).to(tl.float32) * LOG2_E
            top = tl.maximum(whole, sink)
            whole = top + tl.log2(tl.exp2(whole - top) + tl.exp2(sink - top))
    held = tl.zeros([GROUP], tl.float32)
    written = 0
    equal_before = 0
    for first in range(0, many, TILE):
        there = first + n < many
        key = tl.load(kept_keys + first + n, mask=there, other=0)
        slot = tl.load(kept_slots + first + n, mask=there, other=0).to(tl.int64)
        equal = there & (key == edge)
        nth_equal = equal_before + tl.cumsum(equal.to(tl.int32), 0)
        chosen = (there & (key > edge)) | (equal & (nth_equal > same - wanted))
        place = written + tl.cumsum(chosen.to(tl.int32), 0) - 1
        tl.store(slots + pair * k + place, slot, mask=chosen)
        if missed is not None:
            at = (pair * G + g)[:, None] * aligned + slot[None, :]
            score = tl.load(scores + at, mask=(g < G)[:, None] & chosen[None, :], other=float("-inf"))
            held += tl.sum(tl.exp2(score.to(tl.float32) - whole[:, None]), 1)
        written += tl.sum(chosen.to(tl.int32))
        equal_before += tl.sum(equal.to(tl.int32))
    for first in range(count, k, TILE):  # what stands behind the live ones must be slots too
        tl.store(slots + pair * k + first + n, tl.zeros([TILE], tl.int64), mask=first + n < k)
    if missed is not None:
        rest = tl.maximum(tl.exp2(live_lse - whole) - held, 0.0)
        tl.store(missed + pair * G + g, tl.where(length <= k, 0.0, rest), mask=g < G)
