"""Writing to storage of any layout: new tokens, kept ones, and the running mean of what came."""

import torch
import triton
import triton.language as tl

_TILE = 4096  # numbers a program moves


def slot_strides(storage: torch.Tensor) -> tuple[int, int, int, int, int]:
    """Of rows, heads, blocks of slots, slots within a block, and channels.

    Of `[B, K, C, D]` a block is one slot; of a column `[B, K, C]` what a slot holds is one channel.
    """
    row, head, block, *rest = storage.stride()
    if storage.dim() == 5:
        return row, head, block, rest[0], rest[1]
    return row, head, block, 0, rest[0] if rest else 0


def append(
    storage: torch.Tensor, new: torch.Tensor, slots: torch.Tensor, active: torch.Tensor | None = None
) -> None:
    """As `reference.append`. A slot beyond the storage is left out."""
    rows, heads, count = slots.shape
    width = new.shape[3] if new.dim() == 4 else 1
    columns = triton.next_power_of_2(width)
    block = max(1, min(triton.next_power_of_2(count), _TILE // columns))
    row, head, token, *channel = new.stride()
    _append[(rows * heads, triton.cdiv(count, block))](
        *(storage, new, slots.contiguous(), active),
        *slot_strides(storage),
        *(row, head, token, channel[0] if channel else 0),
        *(heads, count, storage.shape[2] * (storage.shape[3] if storage.dim() == 5 else 1)),
        WIDTH=width,
        COLUMNS=columns,
        BLOCK=block,
        IN_BLOCK=storage.shape[3] if storage.dim() == 5 else 1,
        num_warps=1 if block * columns <= 256 else 4,
    )


def compact(storage: torch.Tensor, slots: torch.Tensor, out: torch.Tensor) -> None:
    """As `reference.compact`."""
    rows, heads, count = slots.shape
    width = 1 if storage.dim() == 3 else storage.shape[-1]
    columns = triton.next_power_of_2(width)
    block = max(1, min(triton.next_power_of_2(count), _TILE // columns))
    _compact[(rows * heads, triton.cdiv(count, block))](
        *(storage, slots.contiguous(), out),
        *slot_strides(storage),
        *slot_strides(out),
        *(heads, count),
        WIDTH=width,
        COLUMNS=columns,
        BLOCK=block,
        IN_BLOCK=storage.shape[3] if storage.dim() == 5 else 1,
        OUT_BLOCK=out.shape[3] if out.dim() == 5 else 1,
    )


def running_mean(
    mean: torch.Tensor, new: torch.Tensor, counts: torch.Tensor, seen: torch.Tensor
) -> torch.Tensor:
    """As `reference.running_mean`. One kernel for one new token; the sum over a prompt is torch's."""
    rows, heads, count, size = new.shape
    total = new[:, :, 0] if count == 1 else new.sum(2, dtype=torch.float32)
    result = torch.empty_like(mean, memory_format=torch.contiguous_format)
    _running_mean[(rows * heads,)](
        *(mean.contiguous(), total, counts.contiguous(), seen.contiguous(), result),
        *total.stride(),
        heads,
        D=size,
        BLOCK_D=triton.next_power_of_2(size),
        num_warps=1,
    )
    return result


@triton.jit
def _place(slot, block, within, IN_BLOCK: tl.constexpr):
    """Where a slot begins. The slot is int64: storage may be larger than 2 ** 31 numbers."""
    if IN_BLOCK == 1:
        place = slot * block
    else:
        place = (slot // IN_BLOCK) * block + (slot % IN_BLOCK) * within
    return place


@triton.jit(do_not_specialize=["count", "capacity"])
def _append(
    storage,
    new,  # [B, K, Q, D]
    slots,  # [B, K, Q]
    active,  # [B] or None
    row,
    head,
    block,
    within,
    channel,
    new_row,
    new_head,
    new_token,
    new_channel,
    heads,
    count,
    capacity,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    b, h = pair // heads, pair % heads
    if active is not None:
        if tl.load(active + b) == 0:
            return
    token, d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    slot = tl.load(slots + pair * count + token, mask=token < count, other=-1)
    mask = ((slot >= 0) & (slot < capacity))[:, None] & (d < WIDTH)[None, :]
    source = b * new_row + h * new_head + token.to(tl.int64)[:, None] * new_token + d[None, :] * new_channel
    place = _place(slot, block, within, IN_BLOCK)[:, None] + d[None, :] * channel
    value = tl.load(new + source, mask=mask, other=0)
    tl.store(storage + b * row + h * head + place, value.to(storage.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["count"])
def _compact(
    storage,
    slots,  # [B, K, S]
    out,
    row,
    head,
    block,
    within,
    channel,
    out_row,
    out_head,
    out_block,
    out_within,
    out_channel,
    heads,
    count,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    IN_BLOCK: tl.constexpr,
    OUT_BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    b, h = pair // heads, pair % heads
    to, d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    slot = tl.load(slots + pair * count + to, mask=to < count, other=0)
    mask = (to < count)[:, None] & (d < WIDTH)[None, :]
    source = _place(slot, block, within, IN_BLOCK)[:, None] + d[None, :] * channel
    target = _place(to.to(tl.int64), out_block, out_within, OUT_BLOCK)[:, None] + d[None, :] * out_channel
    value = tl.load(storage + b * row + h * head + source, mask=mask, other=0)
    tl.store(out + b * out_row + h * out_head + target, value, mask=mask)


@triton.jit
def _running_mean(
    mean,  # [B, K, D]
    total,  # [B, K, D], the sum of the new vectors
    counts,  # [B]
    seen,  # [B]
    result,
    total_row,
    total_head,
    total_channel,
    heads,
    D: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    pair, d = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)
    b, h = pair // heads, pair % heads
    before = tl.load(mean + pair * D + d, mask=d < D, other=0.0)
    new = tl.load(total + b * total_row + h * total_head + d * total_channel, mask=d < D, other=0.0)
    count = tl.load(counts + b).to(tl.float32)
    many = tl.maximum(tl.load(seen + b), 1).to(tl.float32)
    tl.store(result + pair * D + d, before + (new.to(tl.float32) - count * before) / many, mask=d < D)
