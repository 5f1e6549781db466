"""The slot with the lowest priority, which a new token overwrites: one program a row and KV head."""

import torch
import triton
import triton.language as tl

from .storage import head_start, strides

_BLOCK = 1024
_NOWHERE = tl.constexpr(2**31 - 1)


def lowest(
    priority: torch.Tensor,
    lengths: torch.Tensor,
    *,
    positions: torch.Tensor | None = None,
    seen: torch.Tensor | None = None,
    newest: int = 0,
    oldest: int = 0,
) -> torch.Tensor:
    """`reference.lowest`."""
    rows, heads = lengths.shape
    slots = torch.empty(rows, heads, dtype=torch.int64, device=lengths.device)
    _lowest[(rows * heads,)](
        priority=priority,
        **strides("priority", priority, "row head slot"),
        positions=positions,
        **strides("position", positions, "row head slot"),
        lengths=lengths.contiguous(),
        seen=None if seen is None else seen.contiguous(),
        newest=newest,
        oldest=oldest,
        size=priority.shape[2],
        slots=slots,
        heads=heads,
        BLOCK=_BLOCK,
        num_warps=4,
    )
    return slots


@triton.jit(do_not_specialize=["newest", "oldest", "size"])
def _lowest(
    priority,  # [B, K, T]
    priority_row,
    priority_head,
    priority_slot,
    positions,  # [B, K, T] or None: the newest and the oldest do not matter
    position_row,
    position_head,
    position_slot,
    lengths,  # [B, K]
    seen,  # [B, K] or None
    newest,
    oldest,
    size,  # T
    slots,  # [B, K]
    heads,
    BLOCK: tl.constexpr,
):
    pair = tl.program_id(0).to(tl.int64)
    length = tl.minimum(tl.load(lengths + pair), size)
    priority += head_start(pair, heads, priority_row, priority_head)
    if positions is not None:
        positions += head_start(pair, heads, position_row, position_head)
        newest = tl.load(seen + pair) - newest  # they have this position, or a higher one
    number = tl.float64 if priority.dtype.element_ty.primitive_bitwidth == 64 else tl.float32
    n = tl.arange(0, BLOCK)
    least, where = tl.full([BLOCK], float("inf"), number), tl.full([BLOCK], _NOWHERE, tl.int32)
    for first in range(0, length, BLOCK):
        slot = first + n
        live = slot < length
        rank = tl.load(priority + slot.to(tl.int64) * priority_slot, mask=live, other=0).to(number)
        rank = tl.where(rank == rank, rank, float("inf"))
        if positions is not None:
            position = tl.load(positions + slot.to(tl.int64) * position_slot, mask=live, other=0)
            rank = tl.where((position >= newest) | (position < oldest), float("inf"), rank)
        better = live & ((rank < least) | (where == _NOWHERE))
        least, where = tl.where(better, rank, least), tl.where(better, slot.to(tl.int32), where)
    found = tl.min(tl.where(least == tl.min(least, 0), where, _NOWHERE), 0)
    tl.store(slots + pair, tl.where(found == _NOWHERE, 0, found).to(tl.int64))
