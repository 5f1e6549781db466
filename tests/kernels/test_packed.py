"""Attention over packed heads, and appending to them, equal the reference, and touch no other head."""

from types import ModuleType

import pytest
import torch

from kvsieve.ops import cpu, reference
from kvsieve.ops import triton as triton_ops
from kvsieve.ops.triton import launch

from .tensors import DEVICE, NAN, TOLERANCE, clean, normal, on_gpu, unwritten_is_nan

IMPLEMENTATIONS = [pytest.param(reference, id="reference"), pytest.param(triton_ops, id="triton")]
if DEVICE == "cpu":
    IMPLEMENTATIONS.append(pytest.param(cpu, id="cpu"))
every_implementation = pytest.mark.parametrize("ops", IMPLEMENTATIONS)

F32, F16 = torch.float32, torch.float16
LENGTHS, ROOMS = [[150, 1, 40], [0, 77, 16]], [[150, 4, 41], [3, 100, 16]]
TOTAL = 150


def packed(size: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Lengths, starts, and packed keys and values: NaN in dead slots, and before and after all heads."""
    lengths = torch.tensor(LENGTHS, device=DEVICE)
    starts = torch.tensor([0, *torch.tensor(ROOMS).flatten().cumsum(0)], device=DEVICE) + 5
    stores = [normal(1, 1, int(starts[-1]) + 5, size, dtype=dtype, seed=seed) for seed in (1, 2)]
    dead = torch.ones(stores[0].shape[2], dtype=torch.bool, device=DEVICE)
    for first, length in zip(starts.tolist(), lengths.flatten().tolist(), strict=False):
        dead[first : first + length] = False
    keys, values = (store.masked_fill_(dead[:, None], NAN) for store in stores)
    return lengths, starts, keys, values


def padded(stored: torch.Tensor, lengths: torch.Tensor, starts: torch.Tensor) -> torch.Tensor:
    """`[B, K, T, D]` of packed `[1, 1, S, D]`, head by head; zero where dead."""
    result = stored.new_zeros(*lengths.shape, TOTAL, stored.shape[3])
    for head, (first, length) in enumerate(zip(starts.tolist(), lengths.flatten().tolist(), strict=False)):
        result.flatten(0, 1)[head, :length] = stored[0, 0, first : first + length]
    return result


@every_implementation
@pytest.mark.parametrize(
    ("group", "size", "dtype", "softcap", "with_sinks"),
    [(2, 64, F32, None, False), (4, 80, F16, 3.0, True), on_gpu(4, 128, torch.bfloat16, None, False)],
)
@pytest.mark.parametrize("want_mass", [False, True])
def test_attend(ops: ModuleType, group, size, dtype, softcap, with_sinks, want_mass, monkeypatch) -> None:
    monkeypatch.setattr(launch, "SLOTS_PER_SPLIT", 64)  # long heads in pieces
    lengths, starts, keys, values = packed(size, dtype)
    if ops is not triton_ops:  # which never reads a dead slot: the others may, if it is finite
        keys, values = keys.nan_to_num(9), values.nan_to_num(9)
    query = normal(2, 3, group, size, dtype=dtype)
    sinks = normal(3, group, dtype=dtype) if with_sinks else None
    scoring = {"scale": size**-0.5, "softcap": softcap, "want_mass": want_mass}
    with unwritten_is_nan():
        output, mass = ops.attend(
            query, keys, values, lengths, sinks=sinks, starts=starts, total=TOTAL, **scoring
        )
    right = [clean(padded(stored, lengths, starts)) for stored in (keys, values)]
    wanted, wanted_mass = reference.attend(clean(query), *right, lengths, sinks=sinks, **scoring)
    tolerance = TOLERANCE[dtype]
    torch.testing.assert_close(output.float(), wanted, atol=tolerance, rtol=tolerance)
    if want_mass:
        torch.testing.assert_close(mass, wanted_mass, atol=1e-3 if dtype == F16 else 1e-6, rtol=1e-3)


@every_implementation
def test_attend_to_chosen_slots(ops: ModuleType) -> None:
    lengths, starts, keys, values = packed(64, F32)
    keys, values = keys.nan_to_num(9), values.nan_to_num(9)
    slots = torch.rand(2, 3, TOTAL, device=DEVICE).argsort(-1)[..., :60]  # some beyond a head
    chosen = {"slots": slots, "counts": torch.full_like(lengths, 50), "scale": 0.1}
    query = normal(2, 3, 2, 64)
    output, _ = ops.attend(query, keys, values, lengths, starts=starts, total=TOTAL, **chosen)
    right = [padded(stored, lengths, starts) for stored in (keys, values)]
    wanted, _ = reference.attend(query, *right, lengths, **chosen)
    torch.testing.assert_close(output, wanted, atol=2e-5, rtol=2e-5)


@every_implementation
@pytest.mark.parametrize("active", [None, [True, False]])
@pytest.mark.parametrize("width", [(), (80,)])
def test_append_writes_into_its_own_head_alone(ops: ModuleType, width, active) -> None:
    starts = torch.tensor([0, *torch.tensor(ROOMS).flatten().cumsum(0)], device=DEVICE)
    dtype = F16 if width else torch.int64
    storage = torch.zeros(1, 1, int(starts[-1]), *width, dtype=dtype, device=DEVICE)
    # The third lies in the next head, the last before it.
    slots = torch.tensor([[150 - 1, 0, 41], [2, 99, -1]], device=DEVICE)[..., None]
    new = (torch.arange(6, device=DEVICE) + 1).view(2, 3, 1, *[1] * len(width)).expand(2, 3, 1, *width)
    rows = None if active is None else torch.tensor(active, device=DEVICE)
    ops.append(storage, new.to(dtype), slots, rows, starts=starts)
    wanted = torch.zeros_like(storage)
    for head, slot in enumerate(slots.flatten().tolist()):
        inside = 0 <= slot < ROOMS[head // 3][head % 3]
        if inside and (active is None or active[head // 3]):
            wanted[0, 0, starts[head] + slot] = head + 1
    assert torch.equal(storage, wanted)
