"""Writing to storage equals the reference, in every layout and for columns; the rest stays as it was."""

import pytest
import torch

from kvsieve.cache.layouts import KeyLayout, slots_first
from kvsieve.ops import cpu, reference
from kvsieve.ops import triton as ops

from .tensors import DEVICE, normal, on_gpu

CAPACITY = 70
LAYOUTS = [("single", 16), ("double", 16), ("blocked", 16), ("blocked", 64)]


def views(layout, block, dtype, size, capacity):
    """Every store of a layout twice, slots first, with the same numbers in it."""
    like = torch.empty(2, 3, 1, size, dtype=dtype, device=DEVICE)
    for name, store in KeyLayout(layout, block).stores(like, capacity).items():
        store.copy_(normal(*store.shape, dtype=dtype))
        yield slots_first(name, store), slots_first(name, store.clone())


def some_slots(count: int, capacity: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(count)
    scrambled = torch.rand(2, 3, capacity, generator=generator).argsort(2)[..., :count]
    return scrambled.to(DEVICE)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "size", "count", "capacity"),
    [
        (torch.float32, 64, 1, CAPACITY),
        (torch.float16, 80, 1, CAPACITY),
        (torch.float16, 128, 60, CAPACITY),
        on_gpu(torch.bfloat16, 128, 3_000, 4_000),
        on_gpu(torch.bfloat16, 256, 1, 4_000),
    ],
)
@pytest.mark.parametrize("active", [None, [True, False]])
def test_append_keys(layout, dtype, size, count, capacity, active):
    new = normal(2, count, 3, size, dtype=dtype, seed=5).transpose(1, 2)  # as a projection gives it
    rows = None if active is None else torch.tensor(active, device=DEVICE)
    slots = some_slots(count, capacity)
    for got, wanted in views(*layout, dtype, size, capacity):
        ops.append(got, new, slots, rows)
        reference.append(wanted, new, slots, rows)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("first", [[0] * 6, [3] * 6, [3, 3, 3, 3, 3, 4], [61] * 6, [-2] * 6], ids=str)
@pytest.mark.parametrize("active", [None, [True, False]])
def test_a_cpu_writes_a_run_of_slots_as_any_others(layout, first, active):
    slots = torch.tensor(first).view(2, 3, 1) + torch.arange(10)
    new, rows = normal(2, 3, 10, 64, seed=5).cpu(), None if active is None else torch.tensor(active)
    for stores in views(*layout, torch.float32, 64, CAPACITY):
        got, wanted = (store.cpu() for store in stores)
        cpu.append(got, new, slots, rows)
        reference.append(wanted, new, slots, rows)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.float64])
@pytest.mark.parametrize("width", [(), (5,)])
def test_append_columns(dtype, width):
    got = (normal(2, 3, CAPACITY, *width) * 9).to(dtype)
    wanted, slots = got.clone(), some_slots(2, CAPACITY)
    tokens = torch.arange(2, device=DEVICE).expand(2, 3, 2)
    new = tokens.to(dtype) if not width else got.new_zeros(()).expand(2, 3, 2, *width)
    ops.append(got, new, slots)
    reference.append(wanted, new, slots)
    assert torch.equal(got, wanted)


def test_a_slot_beyond_the_storage_is_left_out():
    storage = torch.zeros(2, 1, 8, 4, device=DEVICE)
    guarded = storage[:, :, :6]
    ops.append(guarded, torch.ones(2, 1, 1, 4, device=DEVICE), torch.tensor([[[6]], [[2]]], device=DEVICE))
    assert storage.sum() == 4


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("count", [5, 33])
def test_compact_keys(layout, count):
    slots = some_slots(count, CAPACITY)
    for (storage, _), (got, wanted) in zip(
        views(*layout, torch.float16, 80, CAPACITY), views(*layout, torch.float16, 80, count), strict=True
    ):
        ops.compact(storage, slots, got)
        reference.compact(storage, slots, wanted)
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("width", [(), (5,)])
def test_compact_columns(width):
    storage, slots = normal(2, 3, CAPACITY, *width).double(), some_slots(9, CAPACITY)
    got = storage.new_zeros(2, 3, 12, *width)
    wanted = got.clone()
    ops.compact(storage, slots, got)
    reference.compact(storage, slots, wanted)
    assert torch.equal(got, wanted)
