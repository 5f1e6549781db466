"""Addresses in storage of any layout: the strides that a launch passes, and where a slot begins in a kernel.

In every layout slot s stands at slot s % n of block s // n. Where n is 1, a block is a slot.
"""

import torch
import triton
import triton.language as tl


def strides(name: str, tensor: torch.Tensor | None, dimensions: str) -> dict[str, int]:
    """Launch arguments `{name}_{dimension}`, one for each of the `dimensions`; zeros for None."""
    names = [f"{name}_{dimension}" for dimension in dimensions.split()]
    return dict(zip(names, (0,) * len(names) if tensor is None else tensor.stride(), strict=True))


def slot_strides(name: str, storage: torch.Tensor) -> dict[str, int]:
    """Launch arguments for `[B, K, C, D]`, blocks `[B, K, C/n, n, D]`, or a column `[B, K, C]` (one channel).

    `{name}_row`, `{name}_head`, `{name}_block`, `{name}_slot` (within a block), `{name}_channel`; and n, the
    constant `{NAME}_BLOCK`.
    """
    row, head, block, *rest = storage.stride()
    slot, channel = rest if len(rest) == 2 else (0, *(rest or [0]))
    values = {"row": row, "head": head, "block": block, "slot": slot, "channel": channel}
    return {f"{name}_{key}": value for key, value in values.items()} | {
        f"{name.upper()}_BLOCK": in_block(storage)
    }


def in_block(storage: torch.Tensor) -> int:
    """n: the number of slots in a block."""
    return storage.shape[3] if storage.dim() == 5 else 1


def shaped(tensor: torch.Tensor, *shape: int) -> torch.Tensor:
    """The tensor, contiguous, in the shape that kernels rely on.

    Raises:
        RuntimeError: it does not broadcast to that shape.
    """
    return tensor.expand(shape).contiguous()


@triton.jit
def head_start(pair, heads, row_stride, head_stride):
    """Where a row and KV head begin; `pair` is row * heads + head."""
    return (pair // heads) * row_stride + (pair % heads) * head_stride


@triton.jit
def first_slot(starts, pair, heads, row_stride, head_stride, slot_stride):
    """`head_start`, in packed storage too, where `starts` says it."""
    if starts is None:
        start = head_start(pair, heads, row_stride, head_stride)
    else:
        start = tl.load(starts + pair) * slot_stride
    return start


@triton.jit
def slot_start(slot, block_stride, slot_stride, BLOCK: tl.constexpr):
    """Where a slot begins within its row and KV head; 64 bits, for storage of more than 2 ** 31 numbers."""
    slot = slot.to(tl.int64)
    if BLOCK == 1:
        start = slot * block_stride
    else:
        start = (slot // BLOCK) * block_stride + (slot % BLOCK) * slot_stride
    return start
