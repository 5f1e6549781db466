"""Tensors to try kernels on: NaN where they must not read, and where they have not written."""

import contextlib
from collections.abc import Iterator

import pytest
import torch

from kvsieve.cache.layouts import KeyLayout, first_slots
from kvsieve.ops import reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NAN = float("nan")
TOLERANCE = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}

needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")]


def on_gpu(*values: object) -> object:
    """A parameter of a test that runs on a GPU only."""
    return pytest.param(*values, marks=needs_gpu)


@contextlib.contextmanager
def unwritten_is_nan() -> Iterator[None]:
    """torch fills new memory with NaN, so that a number which a kernel leaves out shows."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float32).to(DEVICE, dtype)


def slots_of(
    shape: tuple[int, ...], lengths: torch.Tensor, dtype: torch.dtype, seed: int = 0
) -> torch.Tensor:
    """`[B, K, T, D]` with NaN from each row's length on: a view of larger storage, as a cache gives."""
    rows, heads, total, size = shape
    storage = normal(rows, heads, total + 13, size, dtype=dtype, seed=seed)
    dead = torch.arange(total + 13, device=DEVICE) >= lengths[..., None]
    return storage.masked_fill_(dead[..., None], NAN)[:, :, :total]


def laid_out(layout: str, block: int, keys: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Keys `[B, K, T, D]` as a cache of this layout gives them to be read by channels, with NaN in dead slots."""
    total = keys.shape[2]
    name, store = list(KeyLayout(layout, block).stores(keys, total + 13).items())[-1]
    store.fill_(NAN)
    view = first_slots(name, store, total)
    slots = torch.arange(total, device=DEVICE)
    alive = keys.masked_fill((slots >= lengths[..., None])[..., None], NAN)
    reference.append(view, alive, slots.expand(keys.shape[:3]))
    return view


def clean(tensor: torch.Tensor) -> torch.Tensor:
    """The reference's copy: in float32, and zero where it must not matter."""
    return tensor.float().nan_to_num(0)
