"""Attention of one query token: flash decoding, split over the sequence.

One program takes a piece of a row and KV head with the whole query group, so that every key and value is read
once; a second, small kernel merges the pieces by their log-sum-exps. The grid depends on the capacity alone
and lengths are read by pointer: the host never waits, and the cost of a step follows the lengths. Logits are
kept in base 2.
"""

from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from . import launch
from .storage import first_slot, head_start, in_block, shaped, slot_start, slot_strides, strides

LOG2_E = tl.constexpr(1.4426950408889634)
_LOWEST = tl.constexpr(-3.4e38)  # finite, for rows without a slot to read: -inf - -inf is NaN
_MASS_BLOCK = 512


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor,
    *,
    scale: float,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
    slots: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
    tail_weight: torch.Tensor | None = None,
    tail_value: torch.Tensor | None = None,
    far: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    want_mass: bool = False,
    by_head: bool = False,
    add_mass_to: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
    total: int = 0,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`reference.attend`. Slots that are not live, or not chosen, are never read.

    The mass comes from the same pass: logits are stored once, G * 4 bytes a slot, and a last kernel turns
    them into weights when the log-sum-exp of the whole row is known. Their sum over the group cannot be taken
    earlier, because each head's weights have another divisor; reading the keys again would move D * 2 bytes a
    slot. For G = 4, D = 128 in 16 bit it is 36 bytes beside the 512 that attention reads, mostly in the L2
    cache.
    """
    rows, heads, group, size = query.shape
    total, pairs = values.shape[2] if starts is None else total, rows * heads
    plan = launch.decode(size, keys.dtype, in_block(keys) > 1)
    near, far_query = 0, None
    if far is not None:
        assert slots is not None
        assert counts is not None
        near, far_query = triton.cdiv(slots.shape[2], plan.slots) * plan.slots, far[2].contiguous()
        slots = torch.cat([_or_none(slots, counts, near), _or_none(*far[:2], far[0].shape[2])], 2)
        counts = counts.new_full(counts.shape, slots.shape[2])
    many = total if slots is None else slots.shape[2]
    splits = launch.splits(pairs, many, query.device)
    aligned = triton.cdiv(many, 16) * 16  # one compiled kernel serves a growing cache
    query, lengths = query.contiguous(), lengths.contiguous()
    if slots is not None:
        assert counts is not None
        slots, counts = shaped(slots, rows, heads, many), shaped(counts, rows, heads)

    new: dict[str, Any] = {"device": query.device, "dtype": torch.float32}
    output = torch.empty_like(query)
    lse = torch.empty(pairs, group, **new)
    logits = torch.empty(pairs, group, aligned, **new) if want_mass else None
    pieces = torch.empty(pairs, splits, group, size, **new) if splits > 1 else None
    piece_lse = torch.empty(pairs, splits, group, **new) if splits > 1 else None
    read: dict[str, Any] = {"lengths": lengths, "counts": counts, "many": many}
    ending: dict[str, Any] = {
        "output": output,
        "lse": lse,
        "splits": splits,
        "sinks": None if sinks is None else sinks.contiguous(),
        "tail_weight": None if tail_weight is None else shaped(tail_weight, rows, heads, group),
        "tail_value": None if tail_value is None else shaped(tail_value, rows, heads, size),
        "KV_HEADS": heads,
        "G": group,
        "D": size,
        "BLOCK_D": triton.next_power_of_2(size),
        "BLOCK": plan.slots,
    }
    _attend_piece[(pairs, splits)](
        query=query,
        far_query=far_query,
        near=near,
        keys=keys,
        **slot_strides("key", keys),
        values=values,
        **strides("value", values, "row head slot channel"),
        slots=slots,
        starts=starts,
        **read,
        pieces=pieces,
        piece_lse=piece_lse,
        logits=logits,
        aligned=aligned,
        scale=scale,
        softcap=softcap,
        **ending,
        ROWS=max(plan.rows, triton.next_power_of_2(group)),
        num_warps=plan.warps,
        num_stages=plan.stages,
    )
    if splits > 1:
        _merge_pieces[(pairs, group)](
            pieces=pieces,
            piece_lse=piece_lse,
            **read,
            **ending,
            MERGED=launch.merge(size),
        )
    if not want_mass:
        return output, None
    mass = add_mass_to
    if mass is None:
        shape = (rows, heads, group, total) if by_head else (rows, heads, total)
        mass = (torch.empty if slots is None else torch.zeros)(shape, **new)
    places = strides("mass", mass, "row head group slot" if by_head else "row head slot")
    _mass_from_logits[(pairs, triton.cdiv(many, _MASS_BLOCK))](
        logits=logits,
        aligned=aligned,
        lse=lse,
        slots=slots,
        **read,
        mass=mass,
        **{"mass_group": 0} | places,
        KV_HEADS=heads,
        G=group,
        GROUP=triton.next_power_of_2(group),
        BLOCK=_MASS_BLOCK,
        BY_HEAD=by_head,
        ADD=add_mass_to is not None,
    )
    return output, None if add_mass_to is not None else mass


def _or_none(slots: torch.Tensor, counts: torch.Tensor, size: int) -> torch.Tensor:
    """`slots [B, K, S]` as `[B, K, size]`, -1 beyond the counts: one query reads whole blocks of places."""
    real = torch.arange(slots.shape[2], device=slots.device) < counts[..., None]
    return F.pad(slots.where(real, -1), (0, size - slots.shape[2]), value=-1)


@triton.jit
def capped(logits, softcap):
    """softcap * tanh(logits / softcap); where its exponential overflows it has the right limit."""
    return softcap * (1 - 2 / (1 + tl.exp2(logits * (2 * LOG2_E / softcap))))


@triton.jit
def with_sinks(blend, peak, total, sinks, mask):
    """A logit per head that takes weight and gives no value: joins `total` = sum of exp2(logit - peak)."""
    sink = tl.load(sinks, mask=mask, other=0.0).to(tl.float32) * LOG2_E
    top = tl.maximum(peak, sink)
    fade = tl.exp2(peak - top)
    return blend * fade[:, None], top, total * fade + tl.exp2(sink - top)


@triton.jit
def _places_to_read(lengths, counts, many, pair):
    """The number of places that a row reads: live slots, or chosen ones, clamped to [0, many]."""
    if counts is not None:
        places = tl.minimum(tl.maximum(tl.load(counts + pair), 0), many)
    else:
        places = tl.load(lengths + pair)
    return places.to(tl.int32)


@triton.jit
def _share(length, splits, BLOCK: tl.constexpr):
    """The number of places in a piece of a row: whole blocks."""
    return tl.cdiv(tl.cdiv(length, BLOCK), splits) * BLOCK


@triton.jit
def _finish(
    blend,  # [N, BLOCK_D], sum of exp2(logit - peak) * value
    peak,
    total,
    pair,
    g,  # [N], the heads within their group
    output,
    lse,
    sinks,
    tail_weight,
    tail_value,
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store the result of whole rows: sinks, division, tail. A row without slots gives zero."""
    real, d = g < G, tl.arange(0, BLOCK_D)
    if sinks is not None:
        blend, peak, total = with_sinks(blend, peak, total, sinks + (pair % KV_HEADS) * G + g, real)
    some = total > 0
    total = tl.where(some, total, 1.0)
    result = blend / total[:, None]
    head = pair * G + g
    tl.store(lse + head, tl.where(some, peak + tl.log2(total), float("-inf")), mask=real)
    if tail_weight is not None:
        weight = tl.load(tail_weight + head, mask=real, other=0.0)[:, None]
        value = tl.load(tail_value + pair * D + d, mask=d < D, other=0.0).to(tl.float32)
        result = (1 - weight) * result + weight * value[None, :]
    mask = real[:, None] & (d < D)[None, :]
    tl.store(output + head[:, None] * D + d[None, :], result.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["splits"])
def _attend_piece(
    query,  # [B, K, G, D]
    far_query,  # the same for the places from `near` on, or None; `near` is a multiple of BLOCK
    near,
    keys,  # [B, K, T, D] or [B, K, T/n, n, D]
    key_row,
    key_head,
    key_block,
    key_slot,
    key_channel,
    values,  # [B, K, T, D]
    value_row,
    value_head,
    value_slot,
    value_channel,
    slots,  # [B, K, many], or None: all slots
    starts,  # [B * K + 1] of packed keys and values, or None
    lengths,  # [B, K]
    counts,  # [B, K] or None
    many,
    pieces,  # [B, K, splits, G, D] float32, or None: this is the only piece
    piece_lse,
    logits,  # [B, K, G, aligned] float32 or None
    aligned,
    scale,
    softcap,
    output,
    lse,  # [B, K, G]
    splits,
    sinks,
    tail_weight,
    tail_value,
    KEY_BLOCK: tl.constexpr,
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
):
    pair, piece = tl.program_id(0).to(tl.int64), tl.program_id(1)
    places = _places_to_read(lengths, counts, many, pair)
    share = _share(places, splits, BLOCK)
    begin = piece * share
    end = tl.minimum(begin + share, places)
    if pieces is not None:
        if begin >= end:
            return
    g, d, n = tl.arange(0, ROWS), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK)
    real = g < G
    number, inside = (pair * G + g)[:, None] * D + d[None, :], real[:, None] & (d < D)[None, :]
    q = tl.load(query + number, mask=inside, other=0.0)
    keys += first_slot(starts, pair, KV_HEADS, key_row, key_head, key_block)
    values += first_slot(starts, pair, KV_HEADS, value_row, value_head, value_slot)
    if slots is not None:
        length = tl.load(lengths + pair)

    peak = tl.full([ROWS], _LOWEST, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    blend = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for first in range(begin, end, BLOCK):
        index = first + n
        live = index < end
        if slots is not None:
            slot = tl.load(slots + pair * many + index, mask=live, other=-1)
            live = (slot >= 0) & (slot < length)
        else:
            slot = index
        mask = live[:, None] & (d < D)[None, :]
        key = slot_start(slot, key_block, key_slot, KEY_BLOCK)
        value = slot_start(slot, value_slot, 0, 1)
        k = tl.load(keys + key[:, None] + d[None, :] * key_channel, mask=mask, other=0.0)
        v = tl.load(values + value[:, None] + d[None, :] * value_channel, mask=mask, other=0.0)
        if far_query is not None:  # loaded anew: two queries in registers would spill
            q = tl.load((query if first < near else far_query) + number, mask=inside, other=0.0)
        logit = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        if softcap is not None:
            logit = capped(logit, softcap)
        logit = tl.where(live[None, :], logit * LOG2_E, float("-inf"))
        if logits is not None:
            head = (pair * G + g)[:, None] * aligned
            tl.store(logits + head + index[None, :], logit, mask=real[:, None] & live[None, :])
        top = tl.maximum(peak, tl.max(logit, 1))
        fade = tl.exp2(peak - top)
        weight = tl.exp2(logit - top[:, None])
        total = total * fade + tl.sum(weight, 1)
        blend = blend * fade[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        peak = top

    if pieces is None:
        _finish(
            blend, peak, total, pair, g, output, lse, sinks, tail_weight, tail_value, KV_HEADS, G, D, BLOCK_D
        )
    else:
        head = (pair * splits + piece) * G + g
        tl.store(piece_lse + head, peak + tl.log2(total), mask=real)
        mask = real[:, None] & (d < D)[None, :]
        blend /= tl.where(total > 0, total, 1.0)[:, None]
        tl.store(pieces + head[:, None] * D + d[None, :], blend, mask=mask)


@triton.jit(do_not_specialize=["splits", "many"])
def _merge_pieces(
    pieces,
    piece_lse,
    lengths,
    counts,
    many,
    output,
    lse,
    splits,
    sinks,
    tail_weight,
    tail_value,
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    MERGED: tl.constexpr,
):
    pair, g = tl.program_id(0).to(tl.int64), tl.program_id(1) + tl.arange(0, 1)
    d, s = tl.arange(0, BLOCK_D), tl.arange(0, MERGED)
    places = _places_to_read(lengths, counts, many, pair)
    written = tl.cdiv(places, tl.maximum(_share(places, splits, BLOCK), 1))
    peak = tl.full([1], _LOWEST, tl.float32)
    total = tl.zeros([1], tl.float32)
    blend = tl.zeros([1, BLOCK_D], tl.float32)
    for first in range(0, written, MERGED):
        live = first + s < written
        head = (pair * splits + first + s) * G + tl.program_id(1)
        logit = tl.load(piece_lse + head, mask=live, other=float("-inf"))
        mask = live[:, None] & (d < D)[None, :]
        piece = tl.load(pieces + head[:, None] * D + d[None, :], mask=mask, other=0.0)
        top = tl.maximum(peak, tl.max(logit, 0))
        fade = tl.exp2(peak - top)
        weight = tl.exp2(logit - top)
        total = total * fade + tl.sum(weight, 0)
        blend = blend * fade[:, None] + tl.sum(weight[:, None] * piece, 0)[None, :]
        peak = top
    _finish(blend, peak, total, pair, g, output, lse, sinks, tail_weight, tail_value, KV_HEADS, G, D, BLOCK_D)


@triton.jit(do_not_specialize=["many"])
def _mass_from_logits(
    logits,
    aligned,
    lse,
    slots,
    lengths,
    counts,
    many,
    mass,  # [B, K, T], or [B, K, G, T] BY_HEAD; zero already if there are slots, or to ADD to
    mass_row,
    mass_head,
    mass_slot,
    mass_group,
    KV_HEADS: tl.constexpr,
    G: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
    BY_HEAD: tl.constexpr,
    ADD: tl.constexpr,
):
    pair, g = tl.program_id(0).to(tl.int64), tl.arange(0, GROUP)
    index = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = index < _places_to_read(lengths, counts, many, pair)
    slot = index
    if slots is not None:
        slot = tl.load(slots + pair * many + index, mask=live, other=-1)
        live = (slot >= 0) & (slot < tl.load(lengths + pair))
    head = pair * G + g
    mask = (g < G)[:, None] & live[None, :]
    logit = tl.load(logits + head[:, None] * aligned + index[None, :], mask=mask, other=0.0)
    peak = tl.load(lse + head, mask=g < G, other=0.0)
    weight = tl.where(mask, tl.exp2(logit - peak[:, None]), 0.0)
    written = live
    if slots is None and not ADD:
        written = index < many
    target = mass + head_start(pair, KV_HEADS, mass_row, mass_head) + slot.to(tl.int64) * mass_slot
    if BY_HEAD:
        target = target[None, :] + g[:, None] * mass_group
        written = (g < G)[:, None] & written[None, :]
    else:
        weight = tl.sum(weight, 0) / G
    if ADD:
        weight += tl.load(target, mask=written, other=0.0)
    tl.store(target, weight, mask=written)
