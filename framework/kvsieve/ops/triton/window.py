"""Attention weights of the last prompt queries, summed per slot and query head.

Two launches: the log-sum-exps of the queries, in splits of the slots so that few rows fill a GPU, and then
the column sums of the weights recomputed from them. Only prompts need it: no decode step does.
"""

import torch
import triton
import triton.language as tl

from . import launch
from .attend import LOG2_E, capped
from .storage import head_start, slot_start, strides


def window_weights(
    query: torch.Tensor,
    keys: torch.Tensor,
    lengths: torch.Tensor,
    counts: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """`reference.window_weights`."""
    (rows, heads, group, window, size), total = query.shape, keys.shape[2]
    pairs = rows * heads
    plan = launch.prompt(size, keys.dtype)
    many = min(plan.rows, 64)  # query rows at once; more would spill
    splits = launch.splits(pairs, total, query.device)
    lse = query.new_empty(splits, rows, heads, group, window, dtype=torch.float32)
    shared = {
        "query": query,
        **strides("query", query, "row head g token channel"),
        "keys": keys,
        **strides("key", keys, "row head slot channel"),
        "lengths": lengths.contiguous(),
        "counts": counts.contiguous(),
        "window": window,
        "scale": scale,
        "softcap": softcap,
        "KV_HEADS": heads,
        "G": group,
        "D": size,
        "BLOCK_D": triton.next_power_of_2(size),
        "ROWS": many,
        "BLOCK": plan.slots,
        "num_warps": plan.warps,
        "num_stages": plan.stages,
    }
    per_split = triton.cdiv(triton.cdiv(total, plan.slots), splits) * plan.slots
    _log_sum_exps[(splits, triton.cdiv(window, many), pairs * group)](
        lse=lse, per_split=per_split, pairs=pairs, **shared
    )
    whole = torch.logsumexp(lse, 0)
    if sinks is not None:
        whole = torch.logaddexp(whole, sinks.float()[..., None])
    weights = query.new_empty(rows, heads, group, total, dtype=torch.float32)
    _sum_columns[(triton.cdiv(total, plan.slots), pairs * group)](
        lse=whole.contiguous(), weights=weights, total=total, **shared
    )
    return weights


@triton.jit
def _logits(
    query, query_token, query_channel, keys, key_slot, key_channel, row, count, slot, length,
    scale, softcap, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`[ROWS, BLOCK]` in base 2, -inf where a query does not see a slot; `query`, `keys`: of one head."""
    d = tl.arange(0, BLOCK_D)
    at = row.to(tl.int64)[:, None] * query_token + d[None, :] * query_channel
    q = tl.load(query + at, mask=(row < count)[:, None] & (d < D)[None, :], other=0.0)
    at = slot_start(slot, key_slot, 0, 1)[:, None] + d[None, :] * key_channel
    k = tl.load(keys + at, mask=(slot < length)[:, None] & (d < D)[None, :], other=0.0)
    logit = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
    if softcap is not None:
        logit = capped(logit, softcap)
    visible = (slot[None, :] <= (length - count + row)[:, None]) & (row < count)[:, None]
    return tl.where(visible, logit * LOG2_E, float("-inf"))


@triton.jit(do_not_specialize=["window", "per_split", "pairs"])
def _log_sum_exps(
    query,  # [B, K, G, W, D]
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
    lengths,  # [B, K]
    counts,  # [B]
    window,
    lse,  # [splits, B, K, G, W], natural logarithms
    per_split,
    pairs,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(2).to(tl.int64)  # of the query
    pair = head // G
    length = tl.load(lengths + pair).to(tl.int32)
    count = tl.load(counts + pair // KV_HEADS).to(tl.int32)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    query += head_start(pair, KV_HEADS, query_row, query_head) + (head % G) * query_g
    keys += head_start(pair, KV_HEADS, key_row, key_head)
    peak = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    begin = tl.program_id(0) * per_split
    for first in range(begin, tl.minimum(begin + per_split, length), BLOCK):
        slot = first + tl.arange(0, BLOCK)
        logit = _logits(
            query, query_token, query_channel, keys, key_slot, key_channel, row, count, slot, length,
            scale, softcap, D, BLOCK_D,
        )  # fmt: skip
        top = tl.maximum(peak, tl.max(logit, 1))
        some = top > float("-inf")  # else -inf - -inf
        total = total * tl.where(some, tl.exp2(peak - top), 0.0)
        total += tl.sum(tl.where(some[:, None], tl.exp2(logit - top[:, None]), 0.0), 1)
        peak = top
    found = tl.where(total > 0, (peak + tl.log2(total)) / LOG2_E, float("-inf"))
    place = (tl.program_id(0).to(tl.int64) * pairs * G + head) * window + row
    tl.store(lse + place, found, mask=row < window)


@triton.jit(do_not_specialize=["window", "total"])
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
    lengths,
    counts,
    window,
    lse,  # [B, K, G, W], of all slots
    weights,  # [B, K, G, total]
    total,
    scale,
    softcap,
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    head = tl.program_id(1).to(tl.int64)
    pair = head // G
    length = tl.load(lengths + pair).to(tl.int32)
    count = tl.load(counts + pair // KV_HEADS).to(tl.int32)
    slot = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    query += head_start(pair, KV_HEADS, query_row, query_head) + (head % G) * query_g
    keys += head_start(pair, KV_HEADS, key_row, key_head)
    sums = tl.zeros([BLOCK], tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        logit = _logits(
            query, query_token, query_channel, keys, key_slot, key_channel, row, count, slot, length,
            scale, softcap, D, BLOCK_D,
        )  # fmt: skip
        whole = tl.load(lse + head * window + row, mask=row < count, other=0.0) * LOG2_E
        sums += tl.sum(tl.exp2(logit - whole[:, None]), 0)
    tl.store(weights + head * total + slot, sums, mask=slot < total)
