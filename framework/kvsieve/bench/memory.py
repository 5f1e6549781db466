"""Memory that a measurement needs, computed before anything is allocated; and that it took."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch

from ..cache.slots import Slots
from ..errors import UserError
from ..hf import placement
from ..policy import Policy
from .shapes import Heads


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


class Peak:
    """The most memory in use from here on, over what is in use now: allocated on a GPU, resident on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._before = self._read("VmRSS", torch.cuda.memory_allocated)
        self.forget()

    def forget(self) -> None:
        """Leave out what was in use until now."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            try:
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the resident peak, Linux
            except OSError:
                self._before = None

    def bytes(self) -> int | None:
        """None where the system does not say."""
        most = self._read("VmHWM", torch.cuda.max_memory_allocated)
        return None if self._before is None or most is None else max(0, most - self._before)

    def _read(self, resident: str, allocated: Callable[[torch.device], int]) -> int | None:
        if self.device.type == "cuda":
            return allocated(self.device)
        try:
            lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        except OSError:
            return None
        return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{resident}:")), None)


def check(need: int, device: torch.device, what: str) -> None:
    """Raise UserError if it does not fit."""
    free = placement.free_memory(device)
    if need > free:
        raise UserError(
            f"{what} needs {need / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free on {device}: "
            "take a smaller --batch or --context, fewer policies or layouts, or a shorter --dtype"
        )
