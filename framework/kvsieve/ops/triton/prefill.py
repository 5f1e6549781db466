"""Attention of a prompt, and the mass that each slot receives from it, without a T x T matrix.

Plain causal attention of a whole prompt is torch's. Soft-capping, sinks and chunks that follow other slots
need a flash kernel of our own, and so does the mass: it is the column sums of the attention weights,
recomputed from the log-sum-exps that the first kernel leaves. Query heads of a group share rows: row i * G +
g is head g of token i.
"""

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import launch
from .attend import LOG2_E, capped, with_sinks


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
    want_mass: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """As `reference.prefill`."""
    rows, heads, group, new, size = query.shape
    if fresh and softcap is None and sinks is None and not want_mass:
        flat = query.reshape(rows, heads * group, new, size)
        gqa = group > 1
        output = F.scaled_dot_product_attention(
            flat, keys, values, is_causal=True, scale=scale, enable_gqa=gqa
        )
        real = torch.arange(new, device=query.device) < counts[:, None]
        return output.view(query.shape).masked_fill(~real[:, None, None, :, None], 0), None

    pairs, total = rows * heads, keys.shape[2]
    plan = launch.prompt(size, keys.dtype)
    starts, counts = starts.contiguous(), counts.contiguous()
    output = torch.empty_like(query)
    lse = torch.empty(pairs, new * group, device=query.device) if want_mass else None
    scoring = (scale, softcap)
    sizes = {
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
        *(query, keys, values, starts, counts, output, lse),
        None if sinks is None else sinks.contiguous(),
        *scoring,
        *query.stride(),
        *keys.stride(),
        *values.stride(),
        *output.stride(),
        new,
        **sizes,
    )
    if lse is None:
        return output, None
    mass = torch.empty(rows, heads, total, device=query.device)
    _sum_columns[(triton.cdiv(total, plan.slots), pairs)](
        *(query, keys, starts, counts, lse, mass),
        *scoring,
        *query.stride(),
        *keys.stride(),
        *(new, total),
        **sizes | {"ROWS": min(plan.rows, 64)},  # more would spill
    )
    return output, mass


@triton.jit
def _rows_of_query(query, row, many, stride_g, stride_token, stride_d, d, G: tl.constexpr, D: tl.constexpr):
    """`[ROWS, BLOCK_D]` of one KV head; zero from row `many` on."""
    place = (row // G).to(tl.int64) * stride_token + (row % G) * stride_g
    mask = (row < many)[:, None] & (d < D)[None, :]
    return tl.load(query + place[:, None] + d[None, :] * stride_d, mask=mask, other=0.0)


@triton.jit(do_not_specialize=["new"])
def _attend_prompt(
    query,  # [B, K, G, Q, D]
    keys,  # [B, K, T, D]
    values,
    starts,  # [B, K]
    counts,  # [B]
    output,
    lse,  # [B, K, Q * G] or None
    sinks,
    scale,
    softcap,
    query_row,
    query_head,
    query_g,
    query_token,
    query_d,
    key_row,
    key_head,
    key_slot,
    key_d,
    value_row,
    value_head,
    value_slot,
    value_d,
    output_row,
    output_head,
    output_g,
    output_token,
    output_d,
    new,
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
    q = _rows_of_query(
        query + b * query_row + h * query_head, row, count * G, query_g, query_token, query_d, d, G, D
    )
    keys += b * key_row + h * key_head
    values += b * value_row + h * value_head

    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    blend = tl.zeros([ROWS, BLOCK_D], tl.float32)
    end = start + tl.minimum((first_row + ROWS - 1) // G + 1, count)
    if first_row >= count * G:
        end = 0  # padding: nothing to see
    for first in range(0, end, BLOCK):
        slot = first + n
        place, mask = slot.to(tl.int64)[:, None], (slot < end)[:, None] & (d < D)[None, :]
        k = tl.load(keys + place * key_slot + d[None, :] * key_d, mask=mask, other=0.0)
        v = tl.load(values + place * value_slot + d[None, :] * value_d, mask=mask, other=0.0)
        logit = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if softcap is not None:
            logit = capped(logit, softcap)
        visible = slot[None, :] <= tl.minimum(start + token, end - 1)[:, None]
        # slot 0 is visible to every row: none is without a peak
        logit = tl.where(visible, logit * LOG2_E, float("-inf"))
        top = tl.maximum(peak, tl.max(logit, 1))
        fade = tl.exp2(peak - top)
        weight = tl.exp2(logit - top[:, None])
        total = total * fade + tl.sum(weight, 1)
        blend = blend * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        peak = top

    real = token < count
    if sinks is not None:
        blend, peak, total = with_sinks(blend, peak, total, sinks + h * G + row % G, real)
    total = tl.where(real, total, 1.0)
    blend = tl.where(real[:, None], blend / total[:, None], 0.0)
    if lse is not None:
        tl.store(lse + pair * new * G + row, peak + tl.log2(total), mask=real)
    place = b * output_row + h * output_head + token.to(tl.int64) * output_token + (row % G) * output_g
    mask = (token < new)[:, None] & (d < D)[None, :]
    tl.store(output + place[:, None] + d[None, :] * output_d, blend.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["new", "total"])
def _sum_columns(
    query,
    keys,
    starts,
    counts,
    lse,
    mass,  # [B, K, total]
    scale,
    softcap,
    query_row,
    query_head,
    query_g,
    query_token,
    query_d,
    key_row,
    key_head,
    key_slot,
    key_d,
    new,
    total,
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
    first_slot = tl.program_id(0) * BLOCK  # seen by the most queries first
    slot, d = first_slot + tl.arange(0, BLOCK), tl.arange(0, BLOCK_D)
    query += b * query_row + h * query_head
    keys += b * key_row + h * key_head
    mask = (slot < start + count)[:, None] & (d < D)[None, :]
    k = tl.load(keys + slot.to(tl.int64)[:, None] * key_slot + d[None, :] * key_d, mask=mask, other=0.0)

    sums = tl.zeros([BLOCK], tl.float32)
    first_token = tl.maximum(first_slot - start, 0)  # earlier ones do not see this block
    for first in range(first_token * G, count * G, ROWS):
        row = first + tl.arange(0, ROWS)
        q = _rows_of_query(query, row, count * G, query_g, query_token, query_d, d, G, D)
        logit = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if softcap is not None:
            logit = capped(logit, softcap)
        peak = tl.load(lse + pair * new * G + row, mask=row < count * G, other=0.0)
        visible = (slot[None, :] <= (start + row // G)[:, None]) & (row < count * G)[:, None]
        sums += tl.sum(tl.where(visible, tl.exp2(logit * LOG2_E - peak[:, None]), 0.0), 0)
    tl.store(mass + pair * total + slot, sums / G, mask=slot < total)
