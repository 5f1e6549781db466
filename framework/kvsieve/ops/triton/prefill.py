"""Attention of a prompt, and the mass that each slot receives from it, without a T x T matrix.

Plain causal attention of a whole prompt is torch's. Soft-capping, sinks, windows and chunks that follow other
slots need a flash kernel of our own, and so does the mass: it is the column sums of the attention weights,
recomputed from the log-sum-exps that the first kernel leaves. Query heads of a group share rows: row i * G +
g is head g of token i.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import launch
from .attend import LOG2_E, capped, with_sinks
from .storage import head_start, slot_start, strides


def prefill(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    starts: torch.Tensor,
    counts: torch.Tensor,
    *,
    fresh: bool,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    since: torch.Tensor | None = None,
    visible: torch.Tensor | None = None,
    want_mass: bool = False,
    by_head: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`reference.prefill`."""
    rows, heads, group, new, size = query.shape
    plain = softcap is None and sinks is None and since is None and visible is None
    if fresh and plain and not want_mass:
        flat = query.reshape(rows, heads * group, new, size)
        gqa = group > 1
        output = F.scaled_dot_product_attention(
            flat, keys, values, is_causal=True, scale=scale, enable_gqa=gqa
        )
        real = torch.arange(new, device=query.device) < counts[:, None]
        return output.view(query.shape).masked_fill(~real[:, None, None, :, None], 0), None

    pairs, total = rows * heads, keys.shape[2]
    plan = launch.prompt(size, keys.dtype, visible is not None)
    starts, counts = starts.contiguous(), counts.contiguous()
    output = torch.empty_like(query)
    lse = query.new_empty(pairs, new * group, dtype=torch.float32) if want_mass else None
    shared = {
        "query": query,
        **strides("query", query, "row head g token channel"),
        "keys": keys,
        **strides("key", keys, "row head slot channel"),
        "starts": starts,
        "counts": counts,
        "new": new,
        "since": None if since is None else since.contiguous(),
        "allowed": None if visible is None else visible.contiguous(),
        "total": total,
        "lse": lse,
        "scale": scale,
        "softcap": softcap,
        "KV_HEADS": heads,
        "G": group,
        "D": size,
        "BLOCK_D": triton.next_power_of_2(size),
        "ROWS": plan.rows,
        "BLOCK": plan.slots,
        "num_warps": plan.warps,
        "num_stages": plan.stages,
    }
    _attend_prompt[(triton.cdiv(new * group, plan.rows), pairs)](
        values=values,
        **strides("value", values, "row head slot channel"),
        output=output,
        **strides("output", output, "row head g token channel"),
        sinks=None if sinks is None else sinks.contiguous(),
        **shared,
    )
    if lse is None:
        return output, None
    each = (rows, heads, group, total) if by_head else (rows, heads, total)
    mass = query.new_empty(each, dtype=torch.float32)
    apart = group if by_head else 1
    _sum_columns[(triton.cdiv(total, plan.slots), pairs, apart)](
        mass=mass,
        APART=apart,
        **shared | {"ROWS": min(plan.rows, 64)},  # more would spill
    )
    return output, mass


@triton.jit
def _rows_of_query(
    query, query_g, query_token, query_channel, row, many, d, G: tl.constexpr, D: tl.constexpr
):
    """`[ROWS, BLOCK_D]` of one KV head; zero from row `many` on."""
    start = (row // G).to(tl.int64) * query_token + (row % G) * query_g
    mask = (row < many)[:, None] & (d < D)[None, :]
    return tl.load(query + start[:, None] + d[None, :] * query_channel, mask=mask, other=0.0)


@triton.jit
def _allowed(allowed, b, new, total, token, count, slot, end):
    """`[ROWS, BLOCK]` of `allowed [B, Q, total]`: whether these new tokens may see these slots."""
    place = (b * new + token)[:, None] * total + slot[None, :]
    return tl.load(allowed + place, mask=(token < count)[:, None] & (slot < end)[None, :], other=0) != 0


@triton.jit
def _since(since, pair, new, token, count, beyond):
    """Of `since [B, K, Q]`, those of these new tokens of a pair; `beyond` where they are not real."""
    return tl.load(since + pair * new + token, mask=token < count, other=beyond).to(tl.int32)


@triton.jit(do_not_specialize=["new", "total"])
def _attend_prompt(
    query,  # [B, K, G, Q, D]
    query_row,
    query_head,
    query_g,
    query_token,
    query_channel,
    keys,  # [B, K, T, D]
    key_row,
    key_head,
    key_slot,
    key_channel,
    values,  # [B, K, T, D]
    value_row,
    value_head,
    value_slot,
    value_channel,
    output,  # [B, K, G, Q, D]
    output_row,
    output_head,
    output_g,
    output_token,
    output_channel,
    starts,  # [B, K]
    counts,  # [B]
    new,
    since,  # [B, K, Q] or None
    allowed,  # [B, Q, total] bool or None
    total,
    lse,  # [B, K, Q * G] or None
    sinks,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(1).to(tl.int64)
    b, h = pair // KV_HEADS, pair % KV_HEADS
    start, count = tl.load(starts + pair).to(tl.int32), tl.load(counts + b).to(tl.int32)
    first_row = (tl.num_programs(0) - 1 - tl.program_id(0)) * ROWS  # the longest first
    row, d, n = first_row + tl.arange(0, ROWS), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK)
    token = row // G
    query += head_start(pair, KV_HEADS, query_row, query_head)
    keys += head_start(pair, KV_HEADS, key_row, key_head)
    values += head_start(pair, KV_HEADS, value_row, value_head)
    output += head_start(pair, KV_HEADS, output_row, output_head)
    q = _rows_of_query(query, query_g, query_token, query_channel, row, count * G, d, G, D)

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    weights = tl.zeros([ROWS], tl.float32)
    blend = tl.zeros([ROWS, BLOCK_D], tl.float32)
    end = start + tl.minimum((first_row + ROWS - 1) // G + 1, count)
    if first_row >= count * G:
        end = 0  # padding: nothing to see
    begin = 0
    if since is not None:
        low = _since(since, pair, new, token, count, end)
        begin = tl.min(low, 0)
    for first in range(begin, end, BLOCK):
        slot = first + n
        mask = (slot < end)[:, None] & (d < D)[None, :]
        key, value = slot_start(slot, key_slot, 0, 1), slot_start(slot, value_slot, 0, 1)
        k = tl.load(keys + key[:, None] + d[None, :] * key_channel, mask=mask, other=0.0)
        v = tl.load(values + value[:, None] + d[None, :] * value_channel, mask=mask, other=0.0)
        logit = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if softcap is not None:
            logit = capped(logit, softcap)
        visible = slot[None, :] <= tl.minimum(start + token, end - 1)[:, None]
        if since is not None:
            visible &= slot[None, :] >= low[:, None]
        if allowed is not None:
            visible &= _allowed(allowed, b, new, total, token, count, slot, end)
        logit = tl.where(visible, logit * LOG2_E, float("-inf"))
        top = tl.maximum(peak, tl.max(logit, 1))
        base = top
        if (since is not None) or (allowed is not None):
            # Without them slot 0 is visible to every row, so that none is without a peak.
            base = tl.where(top == float("-inf"), 0.0, top)
        fade = tl.exp2(peak - base)
        weight = tl.exp2(logit - base[:, None])
        weights = weights * fade + tl.sum(weight, 1)
        blend = blend * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        peak = top

    real = token < count
    if sinks is not None:
        blend, peak, weights = with_sinks(blend, peak, weights, sinks + h * G + row % G, real)
    weights = tl.where(real, weights, 1.0)
    blend = tl.where(real[:, None], blend / weights[:, None], 0.0)
    if lse is not None:
        tl.store(lse + pair * new * G + row, peak + tl.log2(weights), mask=real)
    start = token.to(tl.int64) * output_token + (row % G) * output_g
    mask = (token < new)[:, None] & (d < D)[None, :]
    blend = blend.to(output.dtype.element_ty)
    tl.store(output + start[:, None] + d[None, :] * output_channel, blend, mask=mask)


@triton.jit(do_not_specialize=["new", "total"])
def _sum_columns(
    query,
    query_row,
    query_head,
    query_g,
    query_token,
    query_channel,
    keys,
    key_row,
    key_head,
    key_slot,
    key_channel,
    starts,
    counts,
    new,
    since,
    allowed,
    total,
    lse,
    mass,  # [B, K, total], or [B, K, G, total]
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    APART: tl.constexpr,  # G: a program sums the rows of one head; 1: those of all
):
    pair, g = tl.program_id(1).to(tl.int64), tl.program_id(2)
    start, count = tl.load(starts + pair).to(tl.int32), tl.load(counts + pair // KV_HEADS).to(tl.int32)
    first_slot = tl.program_id(0) * BLOCK  # seen by the most queries first
    slot, d = first_slot + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    query += head_start(pair, KV_HEADS, query_row, query_head)
    keys += head_start(pair, KV_HEADS, key_row, key_head)
    mask = (slot < start + count)[:, None] & (d < D)[None, :]
    key = slot_start(slot, key_slot, 0, 1)
    k = tl.load(keys + key[:, None] + d[None, :] * key_channel, mask=mask, other=0.0)

    sums = tl.zeros([BLOCK], tl.float32)
    first_token = tl.maximum(first_slot - start, 0)  # earlier ones do not see this block
    for first in range(first_token * G // APART, count * G // APART, ROWS):
        row = (first + tl.arange(0, ROWS)) * APART + g
        q = _rows_of_query(query, query_g, query_token, query_channel, row, count * G, d, G, D)
        logit = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if softcap is not None:
            logit = capped(logit, softcap)
        peak = tl.load(lse + pair * new * G + row, mask=row < count * G, other=0.0)
        visible = (slot[None, :] <= (start + row // G)[:, None]) & (row < count * G)[:, None]
        if since is not None:
            visible &= slot[None, :] >= _since(since, pair, new, row // G, count, total)[:, None]
        if allowed is not None:
            visible &= _allowed(allowed, pair // KV_HEADS, new, total, row // G, count, slot, start + count)
        sums += tl.sum(tl.where(visible, tl.exp2(logit * LOG2_E - peak[:, None]), 0.0), 0)
    tl.store(mass + (pair * APART + g) * total + slot, sums / (G // APART), mask=slot < total)
