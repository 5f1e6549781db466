"""Writing to storage of any layout: the tokens of a prompt, and kept ones."""

import torch
import triton
import triton.language as tl

from .storage import first_slot, head_start, in_block, slot_start, slot_strides

_TILE = 4096  # numbers that a program moves


def append(
    storage: torch.Tensor,
    new: torch.Tensor,
    slots: torch.Tensor,
    active: torch.Tensor | None = None,
    starts: torch.Tensor | None = None,
) -> None:
    """`reference.append`."""
    rows, heads, count = slots.shape
    width = new.shape[3] if new.dim() == 4 else 1
    columns = triton.next_power_of_2(width)
    block = max(1, min(triton.next_power_of_2(count), _TILE // columns))
    _append[(rows * heads, triton.cdiv(count, block))](
        storage=storage,
        **slot_strides("storage", storage),
        new=new,
        **slot_strides("new", new),
        slots=slots.contiguous(),
        active=active,
        starts=starts,
        heads=heads,
        count=count,
        capacity=storage.shape[2] * in_block(storage),
        WIDTH=width,
        COLUMNS=columns,
        BLOCK=block,
        num_warps=1 if block * columns <= 256 else 4,
    )


def compact(storage: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """`reference.compact`."""
    rows, heads, count = slots.shape
    width = 1 if storage.dim() == 3 else storage.shape[-1]
    columns = triton.next_power_of_2(width)
    block = max(1, min(triton.next_power_of_2(count), _TILE // columns))
    _compact[(rows * heads, triton.cdiv(count, block))](
        storage=storage,
        **slot_strides("storage", storage),
        slots=slots.contiguous(),
        out=out,
        **slot_strides("out", out),
        heads=heads,
        count=count,
        capacity=storage.shape[2] * in_block(storage),
        WIDTH=width,
        COLUMNS=columns,
        BLOCK=block,
    )


@triton.jit(do_not_specialize=["count", "capacity"])
def _append(
    storage,
    storage_row,
    storage_head,
    storage_block,
    storage_slot,
    storage_channel,
    new,  # [B, K, Q, D]
    new_row,
    new_head,
    new_block,
    new_slot,
    new_channel,
    slots,  # [B, K, Q]
    active,  # [B] or None
    starts,  # [B * K + 1] of packed storage, or None
    heads,
    count,
    capacity,
    STORAGE_BLOCK: tl.constexpr,
    NEW_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    if active is not None:
        if tl.load(active + pair // heads) == 0:
            return
    token, d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    slot = tl.load(slots + pair * count + token, mask=token < count, other=-1)
    new += head_start(pair, heads, new_row, new_head)
    storage += first_slot(starts, pair, heads, storage_row, storage_head, storage_block)
    if starts is not None:
        capacity = tl.load(starts + pair + 1) - tl.load(starts + pair)
    mask = ((slot >= 0) & (slot < capacity))[:, None] & (d < WIDTH)[None, :]
    source = slot_start(token, new_block, new_slot, NEW_BLOCK)[:, None] + d[None, :] * new_channel
    target = (
        slot_start(slot, storage_block, storage_slot, STORAGE_BLOCK)[:, None] + d[None, :] * storage_channel
    )
    value = tl.load(new + source, mask=mask, other=0)
    tl.store(storage + target, value.to(storage.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count", "capacity"])
def _compact(
    storage,
    storage_row,
    storage_head,
    storage_block,
    storage_slot,
    storage_channel,
    slots,  # [B, K, S]
    out,
    out_row,
    out_head,
    out_block,
    out_slot,
    out_channel,
    heads,
    count,
    capacity,
    STORAGE_BLOCK: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    to, d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    slot = tl.load(slots + pair * count + to, mask=to < count, other=-1)
    read = ((slot >= 0) & (slot < capacity))[:, None] & (d < WIDTH)[None, :]
    written = (to < count)[:, None] & (d < WIDTH)[None, :]
    storage += head_start(pair, heads, storage_row, storage_head)
    out += head_start(pair, heads, out_row, out_head)
    source = (
        slot_start(slot, storage_block, storage_slot, STORAGE_BLOCK)[:, None] + d[None, :] * storage_channel
    )
    target = slot_start(to, out_block, out_slot, OUT_BLOCK)[:, None] + d[None, :] * out_channel
    tl.store(out + target, tl.load(storage + source, mask=read, other=0), mask=written)
