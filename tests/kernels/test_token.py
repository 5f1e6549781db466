"""One new token a row, and all that happens to it, in every layout: no more is written than what it says."""

from collections.abc import Sequence
from types import ModuleType

import pytest
import torch

from kvsieve.cache.layouts import KeyLayout, slots_first
from kvsieve.ops import cpu, reference
from kvsieve.ops import triton as triton_ops

from .tensors import DEVICE, normal, on_gpu

IMPLEMENTATIONS = [pytest.param(reference, id="reference"), pytest.param(triton_ops, id="triton")]
if DEVICE == "cpu":  # a machine with a GPU need not have numba
    from kvsieve.ops import numba as compiled

    IMPLEMENTATIONS += [pytest.param(cpu, id="cpu"), pytest.param(compiled, id="numba")]
every_implementation = pytest.mark.parametrize("ops", IMPLEMENTATIONS)

B, K, C = 2, 3, 37
F32, F16 = torch.float32, torch.float16
LENGTHS = [[36, 0, 7], [200, 20, 1]]  # one beyond the storage


def tensor(numbers: object) -> torch.Tensor:
    return torch.tensor(numbers, device=DEVICE)


def written(
    lengths: torch.Tensor,
    limits: Sequence[Sequence[int]] | None,
    lowest: torch.Tensor | None,
    active: torch.Tensor | None,
) -> list[tuple[int, int, int]]:
    """Row, KV head and slot of every token that is written."""
    found = []
    for b in range(B):
        for k in range(K):
            slot = int(lengths[b, k])
            if limits is not None and lowest is not None and slot >= limits[b][k]:
                slot = int(lowest[b, k])
            if active is None or active[b]:
                found.append((b, k, slot))
    return found


@every_implementation
@pytest.mark.parametrize(
    ("layout", "dtype", "size"),
    [
        ("single", F32, 16),
        ("double", F16, 24),
        ("blocked", F16, 16),
        on_gpu("double", torch.bfloat16, 128),
        on_gpu("blocked", torch.bfloat16, 256),
    ],
)
@pytest.mark.parametrize("active", [None, [False, True]])
@pytest.mark.parametrize("limits", [None, 20, [37, 5, 1], [[37, 0, 9], [0, 30, 1]]])
def test_a_token_and_what_goes_with_it(ops: ModuleType, layout, dtype, size, active, limits) -> None:
    new = normal(B, 1, 2 * K, size, dtype=dtype, seed=3).transpose(1, 2)  # as a projection gives it
    key, value = new[:, :K], new[:, K:]
    stores = list(KeyLayout(layout).stores(key, C).items())
    keys = [slots_first(name, store.copy_(normal(*store.shape))) for name, store in stores]
    values, mass, label = normal(B, K, C, size, dtype=dtype), normal(B, K, C), normal(B, K, C, 5, dtype=dtype)
    positions, lengths = torch.full((B, K, C), -1, device=DEVICE), tensor(LENGTHS)
    seen, mean = lengths.amax(1, keepdim=True).expand(B, K) + 9, normal(B, K, size)
    written_label = normal(B, K, 1, 5)  # another type, cast
    rows = None if active is None else tensor(active)
    most = None if limits is None else tensor(limits).expand(B, K).tolist()
    given = {"means": [(mean, value)], "active": rows}
    lowest = None
    if limits is not None:
        lowest = tensor([[3, 4, 0], [36, 0, 0]])
        given |= {"limits": limits if isinstance(limits, int) else tensor(limits), "lowest": lowest}
    places = written(lengths, most, lowest, rows)
    pairs = [(store, key) for store in keys] + [(values, value), (mass, None), (label, written_label)]
    wanted = [store.clone() for store, _ in pairs]
    right = positions.clone(), lengths.clone(), seen.clone(), mean.clone()
    for b, k, slot in places:
        if slot < C:
            for store, (_, tokens) in zip(wanted, pairs, strict=True):
                place = (slot // 16, slot % 16) if store.dim() == 5 else (slot,)
                store[(b, k, *place)] = 0 if tokens is None else tokens[b, k, 0].to(store.dtype)
            right[0][b, k, slot] = seen[b, k]
        right[1][b, k] += int(slot == lengths[b, k])
        right[2][b, k] += 1
        right[3][b, k] += (value[b, k, 0].float() - mean[b, k]) / float(seen[b, k] + 1)
    seen = seen.contiguous()
    slots = ops.append_token(pairs, positions, lengths, seen, **given)
    for (store, _), wanted_store in zip(pairs, wanted, strict=True):
        assert torch.equal(store, wanted_store)
    for found, wanted_one in zip((positions, lengths, seen), right[:3], strict=True):
        assert torch.equal(found, wanted_one)
    torch.testing.assert_close(mean, right[3], atol=1e-6, rtol=1e-6)
    assert slots.shape == (B, K, 1)
    assert all(int(slots[b, k]) == slot for b, k, slot in places)


@every_implementation
@pytest.mark.parametrize("active", [None, [True, False]])
def test_a_packed_token_is_written_into_its_own_head_alone(ops: ModuleType, active) -> None:
    rooms = [[4, 1, 3], [2, 9, 2]]
    starts = tensor([0, *torch.tensor(rooms).flatten().cumsum(0)])
    lengths = tensor([[3, 0, 3], [2, 8, 0]])  # the third has no room, nor has the fourth
    total = int(starts[-1])
    keys, positions = (
        torch.zeros(1, 1, total, 8, device=DEVICE),
        torch.zeros(1, 1, total, device=DEVICE).long(),
    )
    seen, new = torch.full_like(lengths, 41), normal(B, K, 1, 8)
    wanted, wanted_positions = keys.clone(), positions.clone()
    rows = None if active is None else tensor(active)
    for head, (b, k, slot) in enumerate(written(lengths, None, None, None)):
        if slot < rooms[b][k] and (active is None or active[b]):
            wanted[0, 0, starts[head] + slot] = new[b, k, 0]
            wanted_positions[0, 0, starts[head] + slot] = 41
    ops.append_token([(keys, new)], positions, lengths, seen, active=rows, starts=starts)
    assert torch.equal(keys, wanted)
    assert torch.equal(positions, wanted_positions)
