"""Vectors in four bits a number, two to a byte, each between its own lowest and highest number."""

import torch

_HIGHEST = 15


def quantised(numbers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `[..., n]` uint8 from 0 to 15, and the lowest number and the step `[..., 2]` float32."""
    low, high = numbers.float().aminmax(dim=-1, keepdim=True)
    step = torch.where(high > low, (high - low) / _HIGHEST, 1)
    return ((numbers.float() - low) / step).round().to(torch.uint8), torch.cat([low, step], -1)


def exact(codes: torch.Tensor, span: torch.Tensor) -> torch.Tensor:
    """The numbers `[..., n]` float32 that codes and span stand for."""
    return codes * span[..., 1:] + span[..., :1]


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Codes `[..., n]`, two to a byte: `[..., n / 2]`."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpacked(pairs: torch.Tensor) -> torch.Tensor:
    """The codes `[..., n]` in bytes `[..., n / 2]`."""
    return torch.stack([pairs & _HIGHEST, pairs >> 4], -1).flatten(-2)
