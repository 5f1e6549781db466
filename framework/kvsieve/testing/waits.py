"""Find what makes the host wait for the device: a step that does so cannot be a CUDA graph."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

# Operators that read a value on the host, or whose result has a shape that depends on data.
_WAITS = {
    "_local_scalar_dense",
    "_unique2",
    "equal",
    "is_nonzero",
    "item",
    "masked_select",
    "multinomial",
    "nonzero",
    "unique",
}


class FindsWaits(TorchDispatchMode):
    """Notes in `found` every torch operator inside that would wait for the device.

    >>> with FindsWaits() as trace:
    ...     torch.arange(3).sum().item()
    3
    >>> trace.found
    ['_local_scalar_dense']
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        indexes_by_mask = name.startswith("index") and any(
            isinstance(index, torch.Tensor) and index.dtype is torch.bool
            for arg in args
            if isinstance(arg, list | tuple)
            for index in arg
        )
        if name in _WAITS or indexes_by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))
