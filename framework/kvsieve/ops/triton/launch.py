"""How kernels are launched: block sizes, warps and stages by head size and type, pieces of a row.

Plain rules, to be tuned on a machine; no autotuner, which synchronises and cannot be captured in a graph.
"""

import functools
import os
from typing import NamedTuple

import torch
import triton

PROGRAMS_PER_SM = 4  # of the split kernel: what shared memory lets run at once, so that one wave does it all
SLOTS_PER_SPLIT = 128  # at least: below this, merging costs more than it spreads


class Launch(NamedTuple):
    """Slots (or keys) in a block, query rows in a block where there are many, warps, pipeline stages."""

    slots: int
    rows: int
    warps: int
    stages: int


def decode(head_size: int, dtype: torch.dtype) -> Launch:
    """For one query token: 32 KiB of keys and values a stage; 16 rows, the least that tensor cores take."""
    bytes_per_slot = 2 * triton.next_power_of_2(head_size) * dtype.itemsize
    slots = min(128, max(16, 2**15 // bytes_per_slot))
    if dtype == torch.float32:  # no tensor cores: the products live in registers
        return Launch(min(slots, 32), 16, 4, 1 if backend() == "hip" else 2)
    return Launch(slots, 16, 4, 1 if backend() == "hip" else 3)


def prompt(head_size: int, dtype: torch.dtype) -> Launch:
    """For many query tokens."""
    if dtype == torch.float32:
        return Launch(32, 32, 4 if head_size <= 128 else 8, 1)
    if backend() == "hip":  # 64 KiB of shared memory
        return Launch(32, 64, 4, 1)
    return Launch(64, 128, 4 if head_size <= 64 else 8, 2)


def splits(pairs: int, slots: int, device: torch.device) -> int:
    """Into how many pieces each of `pairs` = B * K rows is cut, so that a small batch fills the GPU too.

    Depends on sizes alone, not on lengths, which the host does not know; programs beyond a row's end return
    early.
    """
    return max(1, min(PROGRAMS_PER_SM * multiprocessors(device) // pairs, slots // SLOTS_PER_SPLIT))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 4  # the interpreter: a few, so that rows are split
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU; it asked the same when they were defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def backend() -> str:
    """ "cuda" or "hip", or "cpu" for the interpreter."""
    return "cpu" if interpreting() else str(triton.runtime.driver.active.get_current_target().backend)
