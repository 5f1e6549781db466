"""Scores from vectors in four bits: half a byte a number, read once for the whole query group.

A number is its code times the step plus the lowest number of its vector. So a product with the query is the
product with the codes, which are small integers, times the step, plus the lowest times the query's sum.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .attend import capped
from .storage import head_start, shaped, slot_start, strides


def code_scores(
    query: torch.Tensor,
    codes: torch.Tensor,
    ranges: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    slots: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """`reference.code_scores`."""
    rows, heads, group, size = query.shape
    many = codes.shape[2]
    if slots is not None:
        assert counts is not None
        many = slots.shape[2]
        slots, counts = shaped(slots, rows, heads, many), shaped(counts, rows, heads)
    scores = torch.empty(rows, heads, group, many, dtype=torch.float32, device=query.device)
    plan = launch.score(size, query.dtype)
    block = min(128, plan.slots)
    _code_scores[(rows * heads, triton.cdiv(many, block))](
        query=query.contiguous(),
        codes=codes,
        **strides("code", codes, "row head slot byte"),
        ranges=ranges,
        **strides("range", ranges, "row head slot number"),
        lengths=lengths.contiguous(),
        slots=slots,
        counts=counts,
        scores=scores,
        many=many,
        scale=scale,
        softcap=softcap,
        KV_HEADS=heads,
        G=group,
        HALF=size // 2,
        BLOCK_HALF=max(16, triton.next_power_of_2(size // 2)),
        BLOCK=block,
        ROWS=max(plan.rows, triton.next_power_of_2(group)),
        num_warps=plan.warps,
    )
    return scores


@triton.jit(do_not_specialize=["many"])
def _code_scores(
    query,  # [B, K, G, 2 * HALF]
    codes,  # [B, K, T, HALF] uint8
    code_row,
    code_head,
    code_slot,
    code_byte,
    ranges,  # [B, K, T, 2]
    range_row,
    range_head,
    range_slot,
    range_number,
    lengths,  # [B, K]
    slots,  # [B, K, many], or None: all slots
    counts,  # [B, K] or None
    scores,  # [B, K, G, many]
    many,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    length = tl.load(lengths + pair)
    if slots is not None:
        count = tl.minimum(tl.load(counts + pair), many)
        slot = tl.load(slots + pair * many + index, mask=index < count, other=-1)
        live = (slot >= 0) & (slot < length)
    else:
        slot = index
        live = index < tl.minimum(length, many)
    g, c = tl.arange(0, ROWS), tl.arange(0, BLOCK_HALF)
    head = pair * G + g
    mask = (c < HALF)[:, None] & (g < G)[None, :]
    at = query + head[None, :] * (2 * HALF) + c[:, None]
    first, second = tl.load(at, mask=mask, other=0.0), tl.load(at + HALF, mask=mask, other=0.0)
    total = tl.sum(first.to(tl.float32), 0) + tl.sum(second.to(tl.float32), 0)
    codes += head_start(pair, KV_HEADS, code_row, code_head)
    ranges += head_start(pair, KV_HEADS, range_row, range_head)
    start = slot_start(slot, code_slot, 0, 1)[:, None] + c[None, :] * code_byte
    byte = tl.load(codes + start, mask=live[:, None] & (c < HALF)[None, :], other=0)
    start = slot_start(slot, range_slot, 0, 1)
    lowest = tl.load(ranges + start, mask=live, other=0.0).to(tl.float32)
    step = tl.load(ranges + start + range_number, mask=live, other=0.0).to(tl.float32)
    product = tl.dot((byte & 15).to(first.dtype), first, input_precision="ieee")
    product += tl.dot((byte >> 4).to(first.dtype), second, input_precision="ieee")
    logit = (product * step[:, None] + lowest[:, None] * total[None, :]) * scale
    if softcap is not None:
        logit = capped(logit, softcap)
    logit = tl.where(live[:, None], logit, float("-inf"))
    mask = (index < many)[:, None] & (g < G)[None, :]
    tl.store(scores + head[None, :] * many + index[:, None], logit, mask=mask)
