"""Scores from few channels of the keys, split over the sequence; and which channels to take.

One program takes a piece of a row and KV head with the whole query group, so every number of the keys is read once.
What it reads of the keys is r numbers a slot: runs of slots in channel-major keys, whole sectors of blocks. Of
token-major keys it reads all: r single numbers of a key touch nearly every sector of it (docs/performance.md).
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from . import launch
from .attend import LOG2_E, capped
from .storage import head_start, shaped, slot_start, slot_strides


class Pieces(NamedTuple):
    """Scores as the selection takes them: in base 2, and unwritten where no slot is live."""

    scores: torch.Tensor  # [B * K, G, T'], float16 for keys in 16 bits, T' a multiple of 16
    lse: torch.Tensor  # [B * K, splits, G] float32, log2 of the sum of 2 ** score over a piece


def top_channels(query: torch.Tensor, r: int) -> torch.Tensor:
    """`reference.top_channels`; of equal channels the first."""
    rows, heads, group, size = query.shape
    block = triton.next_power_of_2(size)
    channels = torch.empty(rows, heads, r, dtype=torch.int64, device=query.device)
    _top_channels[(rows * heads,)](
        query=query.contiguous(),
        channels=channels,
        r=r,
        G=group,
        D=size,
        BLOCK_D=block,
        num_warps=launch.warps(block),  # a thread a channel: one barrier, few registers
    )
    return channels


def channel_scores(
    query: torch.Tensor,
    keys: torch.Tensor,
    lengths: torch.Tensor,
    channels: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """`reference.channel_scores`. Writes every slot of T, but reads live ones only."""
    total = keys.shape[2:-1].numel()
    scores = torch.empty(*query.shape[:3], total, dtype=torch.float32, device=query.device)
    _score(query, keys, lengths, channels, scores.flatten(0, 1), None, total, scale, softcap)
    return scores


def score_pieces(
    query: torch.Tensor,
    keys: torch.Tensor,
    lengths: torch.Tensor,
    channels: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
) -> Pieces:
    """`channel_scores` for the selection: half the bytes for keys in 16 bits, and the sums that a softmax needs."""
    rows, heads, group, _ = query.shape
    total = keys.shape[2:-1].numel()
    splits = launch.splits(rows * heads, total, query.device)
    precise = keys.dtype == torch.float32
    scores = torch.empty(
        *(rows * heads, group, triton.cdiv(total, 16) * 16),
        dtype=torch.float32 if precise else torch.float16,
        device=query.device,
    )
    lse = torch.empty(rows * heads, splits, group, dtype=torch.float32, device=query.device)
    _score(query, keys, lengths, channels, scores, lse, total, scale, softcap)
    return Pieces(scores, lse)


def _score(
    query: torch.Tensor,
    keys: torch.Tensor,
    lengths: torch.Tensor,
    channels: torch.Tensor,
    scores: torch.Tensor,
    lse: torch.Tensor | None,
    total: int,
    scale: float,
    softcap: float | None,
) -> None:
    rows, heads, group, size = query.shape
    r = channels.shape[2]
    token_major = keys.dim() == 4 and keys.stride(3) == 1
    splits = launch.splits(rows * heads, total, query.device)
    plan = launch.score(size if token_major else r, keys.dtype)
    _score_piece[(rows * heads, splits)](
        query=query.contiguous(),
        keys=keys,
        **slot_strides("key", keys),
        total=total,
        lengths=lengths.contiguous(),
        channels=shaped(channels, rows, heads, r),
        scores=scores,
        aligned=scores.shape[-1],
        lse=lse,
        splits=splits,
        scale=scale,
        softcap=softcap,
        KV_HEADS=heads,
        G=group,
        D=size,
        BLOCK_D=triton.next_power_of_2(size),
        R=r,
        BLOCK_R=max(16, triton.next_power_of_2(r)),
        EVERY=token_major,
        BLOCK=plan.slots,
        ROWS=max(plan.rows, triton.next_power_of_2(group)),
        WHOLE=_holds_whole_vectors(keys),
        num_warps=plan.warps,
        num_stages=plan.stages,
    )


def _holds_whole_vectors(keys: torch.Tensor) -> bool:
    """Whether slots beyond the last, up to a multiple of 16, are storage too: blocks, and channel-major rows."""
    return keys.dim() == 5 or (keys.stride(2) == 1 and keys.stride(3) % 16 == 0)


@triton.jit
def _top_channels(
    query,  # [B, K, G, D]
    channels,  # [B, K, r]
    r,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A channel's rank is how many are larger: D * D comparisons, no sorting.

    The heads are added up one by one, never by `tl.sum`: each channel is compared with all, itself included, and a sum
    whose order depends on the layout of threads would differ from itself and leave places unwritten.
    """
    pair, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    size = tl.zeros([BLOCK_D], tl.float32)
    for g in tl.static_range(G):
        q = tl.load(query + (pair * G + g) * D + d, mask=d < D, other=0.0)
        size += tl.abs(q.to(tl.float32))
    size = tl.where(size == size, size, float("inf"))  # NaN has no rank, and every place must be written
    size = tl.where(d < D, size, -1.0)
    larger = (size[:, None] > size[None, :]) | ((size[:, None] == size[None, :]) & (d[:, None] < d[None, :]))
    rank = tl.sum(larger.to(tl.int32), 0)
    tl.store(channels + pair * r + rank, d.to(tl.int64), mask=(d < D) & (rank < r))


@triton.jit(do_not_specialize=["splits"])
def _score_piece(  # noqa: PLR0912 - variants that the compiler leaves out
    query,  # [B, K, G, D]
    keys,  # [B, K, T, D] or [B, K, T/n, n, D]
    key_row,
    key_head,
    key_block,
    key_slot,
    key_channel,
    total,
    lengths,  # [B, K]
    channels,  # [B, K, r]
    scores,  # [B, K, G, aligned]
    aligned,
    lse,  # [B, K, splits, G], or None: natural logits, -inf where not live
    splits,
    scale,
    softcap,
    KEY_BLOCK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    R: tl.constexpr,
    BLOCK_R: tl.constexpr,
    EVERY: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    WHOLE: tl.constexpr,
):
    pair, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    length = tl.load(lengths + pair).to(tl.int32)
    span = length
    if lse is None:
        span = total
    share = tl.cdiv(tl.cdiv(span, BLOCK), splits) * BLOCK
    begin = piece * share
    end = tl.minimum(begin + share, span)

    g, d, c, n = tl.arange(0, ROWS), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_R), tl.arange(0, BLOCK)
    real = g < G
    head = pair * G + g
    if lse is not None:
        if begin >= end:
            tl.store(lse + (pair * splits + piece) * G + g, float("-inf"), mask=real)
            return
    whole = tl.load(query + head[None, :] * D + d[:, None], mask=real[None, :] & (d < D)[:, None], other=0.0)
    norm = tl.sum(tl.abs(whole.to(tl.float32)), 0)
    channel = tl.load(channels + pair * R + c, mask=c < R, other=-1)
    inside = (channel >= 0) & (channel < D)
    q = tl.load(query + head[None, :] * D + channel[:, None], mask=real[None, :] & inside[:, None], other=0.0)
    held = tl.sum(tl.abs(q.to(tl.float32)), 0)
    if EVERY:  # the products of the other channels are left out of the query instead of the keys
        member = tl.sum((channel[:, None] == d[None, :]).to(tl.int32), 0) > 0
        q = tl.where(member[:, None], whole, 0.0).to(whole.dtype)
        channel = d.to(tl.int64)
        needed = d < D
    else:  # any channel serves where the query is zero
        channel = tl.where(inside, channel, 0)
        needed = c < R
    coverage = tl.where(norm > 0, held / tl.where(norm > 0, norm, 1.0), 1.0)
    factor = scale / tl.sqrt(tl.maximum(coverage, 1e-6))
    if lse is not None:
        if softcap is None:
            factor *= LOG2_E

    keys_of_channel = keys + head_start(pair, KV_HEADS, key_row, key_head) + channel[None, :] * key_channel
    # Loads of 16 bytes need a mask that is the same for all of them: what lies beyond the last live slot is then read
    # with it, and left out afterwards.
    readable = length
    if WHOLE:
        readable = tl.cdiv(length, 16) * 16
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    weight = tl.zeros([ROWS], tl.float32)
    for first in range(begin, end, BLOCK):
        index = first + n
        live = index < length
        key = slot_start(index, key_block, key_slot, KEY_BLOCK)
        mask = needed[None, :] & (index < readable)[:, None]
        k = tl.load(keys_of_channel + key[:, None], mask=mask, other=0.0)
        logit = tl.dot(k, q, input_precision="ieee") * factor[None, :]
        if softcap is not None:
            logit = capped(logit, softcap)
            if lse is not None:
                logit *= LOG2_E
        target = scores + head[None, :] * aligned + index[:, None]
        if lse is None:
            logit = tl.where(live[:, None], logit, float("-inf"))
            tl.store(target, logit, mask=real[None, :] & (index < total)[:, None])
        else:
            if scores.dtype.element_ty == tl.float16:
                logit = tl.minimum(logit, 65504.0)
            stored = logit.to(scores.dtype.element_ty)
            tl.store(target, stored, mask=real[None, :] & (index < tl.cdiv(length, 16) * 16)[:, None])
            logit = tl.where(live[:, None], stored.to(tl.float32), float("-inf"))  # the sum of what is stored
            top = tl.maximum(tl.maximum(peak, tl.max(logit, 0)), -1e30)  # finite, whatever the scores
            weight = weight * tl.exp2(peak - top) + tl.sum(tl.exp2(logit - top[None, :]), 0)
            peak = top
    if lse is not None:
        tl.store(lse + (pair * splits + piece) * G + g, peak + tl.log2(weight), mask=real)
