"""Exact top-k by radix select on two levels, without a host synchronisation and without sorting a row.

Rankings become integers of the same order. First every chunk of a row keeps its k best, and at most a few
more, so no winner is lost. Then one program a row and KV head takes the k best of what the chunks kept. Each
level finds the k-th best value eight bits at a time, from a histogram of those that agree with it so far, and
stops when no more agree than may stay; then it writes those that are not worse, in the order of slots. Of
equal values at the edge the newest slots are taken: those with the highest numbers. So a result is always the
same, bit for bit.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from . import launch
from .attend import LOG2_E
from .scores import Pieces, score_pieces
from .storage import head_start, slot_start, strides

_NOTHING = tl.constexpr(0)  # a key lower than any slot's
_HIGHEST = tl.constexpr(2**32 - 1)


def top_slots(
    ranking: torch.Tensor,
    lengths: torch.Tensor,
    k: int,
    *,
    newest: int = 0,
    forced: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`reference.top_slots`, the slots in ascending order; of equal ones at the edge the newest are taken."""
    size = ranking.shape[2]
    ranking = ranking.float().expand(*lengths.shape, size)
    slots, counts, _ = _select(ranking, None, None, lengths, size, 1, min(k, size), "logits", newest, forced)
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
    """`reference.top_by_channels`, in three kernels.

    Scores are written once and read once, in float16 where keys have 16 bits; their sum over the group is
    never stored: each head's weights have another divisor, which is known only when the whole row is scored.
    """
    pieces = score_pieces(query, keys, lengths, channels, scale=scale, softcap=softcap)
    slots, counts, missed = _select(
        None, pieces, sinks, lengths, size, query.shape[2], min(k, size), group_score, newest, forced
    )
    assert missed is not None
    return slots, counts, missed


def _select(
    ranking: torch.Tensor | None,
    pieces: Pieces | None,
    sinks: torch.Tensor | None,
    lengths: torch.Tensor,
    size: int,
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
        scores, lse, aligned, splits = None, None, 0, 0
    else:
        (scores, lse), aligned, splits = pieces, pieces.scores.shape[2], pieces.lse.shape[1]
    chunk = launch.chunk(size)
    chunks, kept = triton.cdiv(size, chunk), min(k, chunk)
    room = min(chunk, kept + launch.SPARE)
    best = torch.empty(pairs, chunks * room, dtype=torch.int64, device=device)
    slots = torch.empty(rows, heads, k, dtype=torch.int64, device=device)
    counts = torch.empty_like(lengths, memory_format=torch.contiguous_format)
    missed = None
    if pieces is not None:
        missed = torch.empty(rows, heads, group, dtype=torch.float32, device=device)
    shared: dict[str, Any] = {
        "scores": scores,
        "aligned": aligned,
        "lse": lse,
        "splits": splits,
        "lengths": lengths.contiguous(),
        "size": size,
        "best": best,
        "chunks": chunks,
        "room": room,
        "heads": heads,
        "G": group,
        "GROUP": triton.next_power_of_2(group),
        "CHUNK": chunk,
    }
    _best_of_chunk[(pairs, chunks)](
        ranking=ranking,
        **strides("ranking", ranking, "row head slot"),
        forced=forced,
        **strides("forced", forced, "row head slot"),
        newest=newest,
        kept=kept,
        **shared,
        ROOM=triton.next_power_of_2(room),
        SOFTMAX=group_score == "softmax",
        LARGEST=group_score == "max",
        num_warps=max(4, chunk // 512),
    )
    _best_of_kept[(pairs,)](
        sinks=None if sinks is None else sinks.contiguous(),
        slots=slots,
        k=k,
        counts=counts,
        missed=missed,
        **shared,
        TILE=launch.KEPT_TILE,
        SEARCHED=min(4096, max(launch.KEPT_TILE, triton.next_power_of_2(chunks * room))),
        num_warps=8,
    )
    return slots, counts, missed


@triton.jit
def _ordered(x):
    """Keys: uint32 in the order of float32, never _NOTHING; both zeros are equal, NaN is above infinity."""
    bits = (x + 0.0).to(tl.uint32, bitcast=True)
    return tl.where(x < 0, ~bits, bits | 0x80000000)


@triton.jit
def _count_digits(key, among, shift):
    """The number of keys for each value of the eight bits from `shift` on."""
    return tl.histogram(((key >> shift) & 255).to(tl.int32), 256, mask=among)


@triton.jit
def _digit(histogram, wanted):
    """The digit of the `wanted`-th best, the number still wanted of those that share it, and their number."""
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


@triton.jit(do_not_specialize=["size", "splits", "chunks", "newest"])
def _best_of_chunk(
    ranking,  # [B, K, T] float32, or None: made from the scores
    ranking_row,
    ranking_head,
    ranking_slot,
    scores,  # [B, K, G, aligned]
    aligned,
    lse,  # [B, K, splits, G]
    splits,
    lengths,
    size,  # T
    forced,  # [B, K, T] bool, or None: the last `newest` slots
    forced_row,
    forced_head,
    forced_slot,
    newest,
    best,  # [B, K, chunks, room]: key and slot of those kept, then nothing
    chunks,
    kept,
    room,
    heads,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    ROOM: tl.constexpr,
    SOFTMAX: tl.constexpr,
    LARGEST: tl.constexpr,
):
    pair, chunk = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.minimum(tl.load(lengths + pair).to(tl.int32), size)
    begin = chunk * CHUNK
    if begin >= length:
        return
    index = begin + tl.arange(0, CHUNK)
    live = index < length
    if ranking is not None:
        at = head_start(pair, heads, ranking_row, ranking_head) + slot_start(index, ranking_slot, 0, 1)
        value = tl.load(ranking + at, mask=live, other=0.0)
    else:
        g = tl.arange(0, GROUP)
        whole = _row_lse(lse, pair, splits, G, GROUP)
        value = tl.full([CHUNK], float("-inf") if LARGEST else 0.0, tl.float32)
        whole_vectors = index < tl.cdiv(length, 16) * 16
        for i in tl.static_range(G):
            score = tl.load(scores + (pair * G + i) * aligned + index, mask=whole_vectors, other=0.0)
            score = score.to(tl.float32)
            if SOFTMAX:
                score = tl.exp2(score - tl.sum(tl.where(g == i, whole, 0.0)))
            value = tl.maximum(value, score) if LARGEST else value + score
    key = _ordered(value)
    if forced is not None:
        at = head_start(pair, heads, forced_row, forced_head) + slot_start(index, forced_slot, 0, 1)
        key = tl.where(tl.load(forced + at, mask=live, other=0) != 0, _HIGHEST, key)
    else:
        key = tl.where(index >= length - newest, _HIGHEST, key)

    same = tl.minimum(length - begin, CHUNK)
    many = tl.minimum(same, kept)
    wanted = many
    known, edge, shift = tl.full([], 0, tl.uint32), tl.full([], 0, tl.uint32), 24
    while (same > wanted + room - kept) & (shift >= 0):
        histogram = _count_digits(key, live & ((key & known) == edge), shift)
        digit, wanted, same = _digit(histogram, wanted)
        known |= tl.full([], 255, tl.uint32) << shift
        edge |= digit.to(tl.uint32) << shift
        shift -= 8
    limit = wanted + room - kept
    chosen = live & ((key & known) >= edge)
    if same > limit:  # equal to the last bit
        equal = live & (key == edge)
        chosen &= (key > edge) | (tl.cumsum(equal.to(tl.int32), 0) > same - limit)
    best += (pair * chunks + chunk) * room
    place = tl.where(chosen, tl.cumsum(chosen.to(tl.int32), 0) - 1, -1)
    tl.store(best + place, (key.to(tl.int64) << 32) | index, mask=place >= 0)
    n, written = tl.arange(0, ROOM), many - wanted + tl.minimum(same, limit)
    tl.store(best + n, tl.zeros([ROOM], tl.int64), mask=(n >= written) & (n < room))


@triton.jit(do_not_specialize=["size", "splits", "chunks"])
def _best_of_kept(
    best,  # [B, K, chunks, room]
    chunks,
    room,
    scores,
    aligned,
    lse,
    splits,
    sinks,  # [K, G] or None
    lengths,
    size,
    slots,  # [B, K, k] int64
    k,
    counts,  # [B, K] int64
    missed,  # [B, K, G] float32 or None
    heads,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    SEARCHED: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    length = tl.load(lengths + pair).to(tl.int32)
    if missed is None:  # a ranking of any size; elsewhere it spills, and rows are no longer than the keys
        length = tl.minimum(length, size)
    many = tl.cdiv(length, CHUNK) * room
    count = tl.minimum(length, k)
    tl.store(counts + pair, count.to(tl.int64))
    best += pair * chunks * room
    n, m = tl.arange(0, TILE), tl.arange(0, SEARCHED)

    wanted, same = count, length
    known, edge, shift = tl.full([], 0, tl.uint32), tl.full([], 0, tl.uint32), 24
    while (same > wanted) & (shift >= 0):
        histogram = tl.zeros([256], tl.int32)
        for first in range(0, many, SEARCHED):
            key = (tl.load(best + first + m, mask=first + m < many, other=0) >> 32).to(tl.uint32)
            histogram += _count_digits(key, (key != _NOTHING) & ((key & known) == edge), shift)
        digit, wanted, same = _digit(histogram, wanted)
        known |= tl.full([], 255, tl.uint32) << shift
        edge |= digit.to(tl.uint32) << shift
        shift -= 8

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
        both = tl.load(best + first + n, mask=first + n < many, other=0)
        key, slot = (both >> 32).to(tl.uint32), both & 0xFFFFFFFF
        equal = (key != _NOTHING) & ((key & known) == edge)
        nth_equal = equal_before + tl.cumsum(equal.to(tl.int32), 0)
        chosen = ((key & known) > edge) | (equal & (nth_equal > same - wanted))
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
