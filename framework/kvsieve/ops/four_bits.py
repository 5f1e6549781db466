"""Vectors in four bits a number, two to a byte, each between its own lowest and highest number.

Byte i of a vector of n numbers holds number i in its low and number i + n/2 in its high half. Made of a few
numbers of one token, so plain torch on every device.
"""

import torch

_HIGHEST = 15


def quantised(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes `[..., n/2]` uint8, and the lowest number and the step `[..., 2]`, of the type of `vectors`.

    `vectors [..., n]`, n even. Codes are the nearest that the rounded range has.
    """
    low, high = vectors.float().aminmax(dim=-1, keepdim=True)
    ranges = torch.cat([low, (high - low) / _HIGHEST], -1).to(vectors.dtype)
    low, step = ranges.float().split(1, -1)
    step = torch.where(step > 0, step, 1)
    codes = ((vectors.float() - low) / step).round().clamp(0, _HIGHEST).to(torch.uint8)
    first, second = codes.chunk(2, -1)
    return first | second << 4, ranges


def unquantised(codes: torch.Tensor, ranges: torch.Tensor) -> torch.Tensor:
    """The numbers `[..., n]` float32 that codes `[..., n/2]` and `ranges [..., 2]` stand for."""
    low, step = ranges.float().split(1, -1)
    return torch.cat([codes & _HIGHEST, codes >> 4], -1) * step + low
