"""Launch parameters: block sizes, warps and stages by head size and type; pieces of a row.

Plain rules, to be tuned on a machine; no autotuner, which synchronises and cannot be captured in a graph.
"""

import functools
import os
from typing import NamedTuple

import torch
import triton

# Split programs on a multiprocessor: as many as an H100's shared memory holds, so that all run in one wave.
PROGRAMS_PER_SM = 3
# Slots kept by chunks in one tile of the last search, with a score of each head; a larger tile spills.
KEPT_TILE = 1024
# Slots that a chunk may keep beyond the k best, so that it need not find the edge to the last bit.
SPARE = 16
# At least; below this, merging costs more than splitting gains.
SLOTS_PER_SPLIT = 128


class Launch(NamedTuple):
    """Slots (or keys) in a block, query rows in a block where there are many, warps, pipeline stages."""

    slots: int
    rows: int
    warps: int
    stages: int


def decode(head_size: int, dtype: torch.dtype, scattered: bool) -> Launch:
    """For one query token: 16 or 32 KiB of keys and values a stage; 16 rows, as few as tensor cores take.

    `scattered`: keys lie in blocks, and each number of a key is loaded from an address of its own, held in
    registers.
    """
    if dtype == torch.float32:  # no tensor cores: the products live in registers
        return Launch(16, 16, 8, 2) if head_size > 64 else Launch(32, 16, 4, 2)
    slots = (2**12 if scattered else 2**13) // triton.next_power_of_2(head_size)
    slots = min(128, max(16, slots))  # tensor cores take no fewer
    return Launch(slots, 16, 4, 2 if backend() == "hip" else 3)


def prompt(head_size: int, dtype: torch.dtype, masked: bool = False) -> Launch:
    """For many query tokens; a mask of its own takes registers."""
    if head_size > 256:  # a stage of 32 KiB, or 64 of float32; as many rows as registers hold
        return Launch(16, 16, 8, 1) if dtype == torch.float32 else Launch(16, 32, 8, 2)
    if dtype == torch.float32:
        return Launch(32, 16, 8, 1) if head_size > 64 else Launch(32, 32, 4, 1)
    if backend() == "hip":  # 64 KiB of shared memory
        return Launch(32, 64, 4, 1)
    if masked:
        return Launch(64, 32, 8, 1)
    return Launch(64, 128 if head_size <= 128 else 64, 8, 2)


def merge(head_size: int) -> int:
    """Pieces of a row merged at once: 32 KiB of them, held in registers."""
    return min(64, 2**13 // triton.next_power_of_2(head_size))


def score(r: int, dtype: torch.dtype) -> Launch:
    """For the scores of one query token from r channels: 8 or 16 KiB of keys a stage.

    The query's heads are the short side of the product; tensor cores take at least 8 of them, AMD's 16.
    """
    hip = backend() == "hip"
    numbers = 2**11 if dtype == torch.float32 else 2**13
    slots = min(256, max(16, numbers // max(16, triton.next_power_of_2(r))))
    return Launch(slots, 16 if hip else 8, 4, 2 if dtype == torch.float32 or hip else 3)


def chunk(slots: int) -> int:
    """Slots per top-k chunk: a few dozen chunks a row, whose best slots one program can search."""
    return 2048 if slots <= 2**16 else 4096


def splits(pairs: int, slots: int, device: torch.device) -> int:
    """Pieces that each of `pairs` = B * K rows is cut into, so that a small batch fills the GPU too.

    Depends on sizes alone, not on lengths, which the host does not know; programs beyond a row's end return
    early.
    """
    return max(1, min(PROGRAMS_PER_SM * multiprocessors(device) // pairs, slots // SLOTS_PER_SPLIT))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    if device.type == "cpu":
        return 4  # the interpreter: a few, so that rows are split
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def warps(threads: int) -> int:
    """The warps that hold so many threads, a power of 2."""
    return max(1, threads // (64 if backend() == "hip" else 32))


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU; Triton read the same variable when they were defined."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def backend() -> str:
    """The target: "cuda" or "hip", or "cpu" for the interpreter."""
    return "cpu" if interpreting() else str(triton.runtime.driver.active.get_current_target().backend)
