"""Where a model is put, in which type it computes, and what memory is left beside it."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch

from ..errors import UserError, unknown

_TYPES = {name: getattr(torch, name) for name in ("float32", "bfloat16", "float16", "float64")}
_AUTO = "auto"  # the checkpoint's own type
_SPREADING = ("auto", "balanced", "balanced_low_0", "sequential")  # accelerate's ways to use several devices


def device(given: object) -> torch.device:
    """The device that was named; None is the first GPU if there is one, else the CPU.

    Raises:
        UserError: no device, one that this machine does not have, or one that holds no numbers.
    """
    if given is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        if isinstance(given, bool) or not isinstance(given, str | int | torch.device):
            raise TypeError
        named = torch.device(given)
    except (RuntimeError, TypeError):
        raise UserError(f"device {_shown(given)} is none that PyTorch knows here. {_present()}") from None
    if named.type == "meta":
        raise UserError(
            f"device 'meta' holds shapes but no numbers, so nothing can be computed. {_present()}"
        )
    try:
        module = torch.get_device_module(named)
        count = module.device_count() if module.is_available() else 0
    except (RuntimeError, AttributeError):
        count = 0
    if count == 0:
        raise UserError(f"device {str(named)!r}: PyTorch finds no {named.type} on this machine. {_present()}")
    if named.index is not None and named.index >= count:
        raise UserError(f"device {str(named)!r}: this machine has {count} of the kind. {_present()}")
    return named


def _present() -> str:
    names = ["cpu"]
    if torch.accelerator.is_available():
        kind = torch.accelerator.current_accelerator()
        names += [f"{kind}:{i}" for i in range(torch.accelerator.device_count())]
    return f"Legal: {', '.join(names)}"


def dtype(given: object, target: torch.device) -> str | torch.dtype:
    """The type that was named; None is float32 on a CPU and the checkpoint's own type elsewhere.

    Raises:
        UserError: a type in which PyTorch does not compute.
    """
    if given is None:
        return torch.float32 if target.type == "cpu" else _AUTO
    if given == _AUTO:
        return _AUTO
    found = getattr(torch, given, None) if isinstance(given, str) else given
    if isinstance(found, torch.dtype) and found in _TYPES.values():
        return found
    is_float = isinstance(found, torch.dtype) and found.is_floating_point
    why = "is for storage: PyTorch does not compute in it" if is_float else "is not a floating-point type"
    raise UserError(f"dtype {_shown(given)} {why}. Legal: {', '.join(_TYPES)}, {_AUTO}")


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


def check_device_map(device_map: object, given: object) -> None:
    """Check a device_map, beside which no device may be given.

    Raises:
        UserError: a device was given too, accelerate is missing, or it names what is no device.
    """
    if given is not None:
        raise UserError(f"device {str(given)!r} and a device_map were given: leave one out")
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("device_map needs the package accelerate: pip install accelerate")
    if isinstance(device_map, dict):
        for place in device_map.values():
            if place != "disk":
                device(place)
    elif not isinstance(device_map, str):
        raise UserError(f"device_map must be a name or a dictionary, not {_shown(device_map)}")
    elif device_map not in _SPREADING:
        try:
            device(device_map)
        except UserError:
            raise UserError(unknown("device_map", device_map[:60], [*_SPREADING, "a device"])) from None


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
