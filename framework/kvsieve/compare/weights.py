"""A digest of all bytes of a model's weights, reduced on the device where they are."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from .. import processes
from ..errors import UserError
from ..hf import parallel

_WORD = 8  # bytes
_CHUNK = 2**20  # words that are reduced at a time, which bounds the memory


def weights_digest(model: PreTrainedModel) -> str:
    """Sixteen hexadecimal digits that depend on every byte of every parameter and buffer.

    Nothing is cached: weights that were changed in place have another digest at once. Processes that share a
    model digest their own shares, and agree.

    Raises:
        UserError: some weights are not in memory.
    """
    tensors = model.state_dict() | dict(model.named_buffers())
    digest = hashlib.sha256()
    known: dict[tuple[object, ...], bytes] = {}  # tied weights are read once
    for name, tensor in sorted(tensors.items()):
        for part in _parts(tensor.detach()):
            if part.device.type == "meta":
                raise UserError(
                    f"the weights {name} are not in memory (offloaded to a disk?): without them results "
                    "cannot be told from those of other weights. Load the model whole"
                )
            place = part.data_ptr(), part.device, part.dtype, part.shape, part.stride()
            if place not in known:
                known[place] = _reduce(part)
            digest.update(f"{name} {part.dtype} {tuple(part.shape)} ".encode() + known[place])
    if parallel.is_split(model):
        digest = hashlib.sha256("".join(processes.gather(digest.hexdigest())).encode())
    return digest.hexdigest()[:16]


def _parts(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The plain tensors of which a tensor consists: itself, this process's share, or values and scales."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield tensor
        return
    for part in (getattr(tensor, name) for name in flatten()[0]):
        if isinstance(part, torch.Tensor):
            yield from _parts(part)


def _reduce(tensor: torch.Tensor) -> bytes:
    """Two sums of 64 bits for each chunk.

    The first is linear with odd factors, so that it cannot stay the same when a single word changes. The
    second is not linear: changes in several words, such as two signs, do not cancel each other.
    """
    data = tensor.contiguous().view(-1).view(torch.uint8)
    size = _CHUNK * _WORD
    factors = _factors(min(_CHUNK, -(-len(data) // _WORD)), data.device)
    sums = [_sums(_words(data[first : first + size]), factors) for first in range(0, len(data), size)]
    return torch.cat(sums).cpu().numpy().tobytes() if sums else b""


def _words(data: torch.Tensor) -> torch.Tensor:
    """Bytes as int64, filled up with zeros."""
    missing = -len(data) % _WORD
    if missing:
        data = torch.cat([data, data.new_zeros(missing)])
    elif data.data_ptr() % _WORD or data.storage_offset() % _WORD:
        data = data.clone()
    return data.view(torch.int64)


def _sums(words: torch.Tensor, factors: torch.Tensor) -> torch.Tensor:
    """int64 arithmetic wraps around."""
    mixed = words * factors[: len(words)]
    linear = mixed.sum()
    mixed ^= mixed >> 31
    mixed *= _signed(0xBF58476D1CE4E5B9)
    mixed ^= mixed >> 27
    return torch.stack([linear, mixed.sum()])


def _factors(count: int, device: torch.device) -> torch.Tensor:
    """An odd number for each position of a chunk, the same on every device."""
    factors = torch.arange(1, count + 1, device=device) * _signed(0x9E3779B97F4A7C15)
    factors ^= factors >> 32
    return factors | 1


def _signed(number: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return number - 2**64 if number >= 2**63 else number
