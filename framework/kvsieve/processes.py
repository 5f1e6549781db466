"""The processes that torchrun started: which one this is, and what all of them bring."""

from __future__ import annotations

import os
from typing import Any, TypeVar

import torch

from .errors import UserError

Value = TypeVar("Value")


def gather(value: Value) -> list[Value]:
    """Gather a value of every process, in the order of their ranks; `[value]` where there is only one.

    All processes must call it, in the same order.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def join(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Join a tensor of every process along `dim`, in the order of their ranks; they are of one shape.

    All processes must call it, in the same order.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return tensor
    parts = [torch.empty_like(tensor) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(parts, tensor.contiguous())
    return torch.cat(parts, dim)


def rank() -> int:
    """The rank of this process; 0 where there is only one, and for the one that writes and prints."""
    return int(os.environ.get("RANK", "0"))


def check_alone() -> None:
    """Refuse, in each of several processes, work that is not shared and that each would do.

    Raises:
        UserError: torchrun started this process and others.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if "TORCHELASTIC_RUN_ID" in os.environ and processes > 1:
        raise UserError(
            f"torchrun started {processes} processes, each of which would run the whole comparison: put "
            "tensor_parallel: true into it, or start it without torchrun"
        )
