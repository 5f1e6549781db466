"""Memory that a measurement needs, computed before anything is allocated, and memory that is free."""

from __future__ import annotations

import torch

from ..cache.slots import Slots
from ..errors import UserError
from ..policy import Policy
from .shapes import Heads


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on the device without swapping."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            found = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in file}
        return found["MemAvailable"]
    except (OSError, KeyError):
        return 2**63 - 1  # the system does not say


def plain_bytes(batch: int, context: int, heads: Heads, dtype: torch.dtype) -> int:
    """Keys and values of one layer, once."""
    return 2 * batch * heads.kv * context * heads.size * dtype.itemsize


def cache_bytes(
    policy: Policy, batch: int, context: int, heads: Heads, dtype: torch.dtype, device: torch.device
) -> int:
    """Bytes that one layer's cache holds for `context` tokens under a policy, positions included."""
    slots = min(context, policy.keeps or context)
    one = torch.empty(1, 1, 1, heads.size, dtype=dtype, device="meta")
    storage = Slots(policy.key_layout.on(device), policy.columns, {})
    storage.allocate(one, one, slots, heads.group)
    return (storage.memory() + slots * torch.int64.itemsize) * batch * heads.kv


def check(need: int, device: torch.device, what: str) -> None:
    """Raise UserError if it does not fit."""
    free = free_memory(device)
    if need > free:
        raise UserError(
            f"{what} needs {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free on {device}: "
            "take a smaller --batch or --context, fewer policies or layouts, or a shorter --dtype"
        )
