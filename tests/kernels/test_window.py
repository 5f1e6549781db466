"""The last queries' weights equal the reference, and the mass of a prefill: ragged, sinks, soft-cap."""

import importlib
from types import ModuleType

import pytest
import torch

from kvsieve.ops import cpu, reference
from kvsieve.ops import triton as triton_ops
from kvsieve.ops.triton import launch

from .tensors import DEVICE, clean, normal, on_gpu, slots_of, unwritten_is_nan

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = [  # group, head size, type, soft-cap, sinks
    (1, 64, F32, None, False),
    (2, 80, F16, 3.0, True),
    (3, 64, F32, 3.0, False),
    (4, 64, F32, None, True),
    *[on_gpu(4, d, dtype, 30.0, True) for d in (64, 80, 128, 256) for dtype in (F32, F16, BF16)],
]
LENGTHS = [[70, 41], [33, 9], [5, 5], [0, 3]]
COUNTS = [33, 9, 5, 0]  # a row's slots may be fewer than the window, or none


@pytest.mark.parametrize(("group", "size", "dtype", "softcap", "with_sinks"), SHAPES)
def test_triton_gives_what_the_reference_gives(
    monkeypatch: pytest.MonkeyPatch,
    group: int,
    size: int,
    dtype: torch.dtype,
    softcap: float | None,
    with_sinks: bool,
) -> None:
    monkeypatch.setattr(launch, "SLOTS_PER_SPLIT", 16)
    lengths, counts = (torch.tensor(numbers, device=DEVICE) for numbers in (LENGTHS, COUNTS))
    query = normal(4, 2, group, 40, size, dtype=dtype)
    query[2, :, :, 5:] = torch.nan  # a row's real queries come first, the rest may be anything
    keys = slots_of((4, 2, 75, size), lengths, dtype)
    sinks = normal(2, group, dtype=dtype) if with_sinks else None
    how = {"scale": size**-0.5, "softcap": softcap, "sinks": sinks}
    with unwritten_is_nan():
        weights = triton_ops.window_weights(query, keys, lengths, counts, **how)
    right = reference.window_weights(clean(query), clean(keys), lengths, counts, **how)
    torch.testing.assert_close(weights, right, atol=1e-4 if dtype == F32 else 3e-2, rtol=1e-3)
    if not with_sinks:
        torch.testing.assert_close(weights.sum(-1), counts[:, None, None].expand(4, 2, group).float())


@pytest.mark.parametrize("ops", [reference, cpu, triton_ops])
def test_the_weights_of_all_queries_are_the_mass_of_a_prefill(ops: ModuleType) -> None:
    counts = torch.tensor([21, 13], device=DEVICE)
    starts = torch.tensor([[6, 0], [3, 9]], device=DEVICE)
    query, keys, values = normal(2, 2, 3, 21, 64), normal(2, 2, 30, 64, seed=1), normal(2, 2, 30, 64, seed=2)
    _, mass = reference.prefill(query, keys, values, starts, counts, fresh=False, scale=0.2, want_mass=True)
    weights = ops.window_weights(query, keys, starts + counts[:, None], counts, scale=0.2)
    torch.testing.assert_close(weights.mean(2), mass, atol=1e-4, rtol=1e-4)


def test_a_window_is_read_in_blocks_of_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths, counts = torch.tensor([[30, 30]]), torch.tensor([11])
    given = normal(1, 2, 2, 11, 16).cpu(), normal(1, 2, 30, 16).cpu(), lengths, counts
    whole = reference.window_weights(*given, scale=0.3)
    module = importlib.import_module("kvsieve.ops.reference.attend")
    monkeypatch.setattr(module, "_QUERIES", 3)
    torch.testing.assert_close(reference.window_weights(*given, scale=0.3), whole)
