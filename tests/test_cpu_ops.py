"""The ops made for a CPU equal the reference."""

import pytest
import torch

from kvsieve import KeyLayout
from kvsieve.cache.layouts import KINDS, first_slots, slots_first
from kvsieve.ops import cpu, reference

ROWS, HEADS, GROUP, SIZE = 2, 2, 3, 16


def test_attend_over_chosen_slots():
    query, keys, values = (
        torch.randn(2, 2, 3, 16),
        torch.randn(2, 2, 90, 16)[:, :, :70],
        torch.randn(2, 2, 70, 16),
    )
    slots = torch.rand(2, 2, 70).argsort(2)[..., :9]
    lengths, counts = torch.full((2, 2), 70), torch.tensor([[9, 4], [0, 1]])
    given = {"scale": 0.3, "slots": slots, "counts": counts, "sinks": torch.randn(2, 3)}
    given |= {"tail_weight": torch.rand(2, 2, 3), "tail_value": torch.randn(2, 2, 16)}
    wanted, _ = reference.attend(query, keys, values, lengths, **given)
    torch.testing.assert_close(cpu.attend(query, keys, values, lengths, **given)[0], wanted)


def test_attend_over_all_slots():
    query, keys, values = (
        torch.randn(2, 2, 3, 16),
        torch.randn(2, 2, 90, 16)[:, :, :70],
        torch.randn(2, 2, 70, 16),
    )
    lengths = torch.tensor([[70, 1], [0, 33]])
    wanted, _ = reference.attend(query, keys, values, lengths, scale=0.3)
    torch.testing.assert_close(cpu.attend(query, keys, values, lengths, scale=0.3)[0], wanted)


@pytest.mark.parametrize("layout", KINDS)
@pytest.mark.parametrize("capacity", [70, 9000])
@pytest.mark.parametrize("group_score", ["softmax", "logits"])
@pytest.mark.parametrize("extras", [{}, {"softcap": 3.0, "sinks": torch.tensor([[0.5, -1, 2], [0, 1, 0]])}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_by_channels(layout, capacity, group_score, extras, dtype):
    torch.manual_seed(0)
    query = torch.randn(ROWS, HEADS, GROUP, SIZE, dtype=dtype)
    keys = torch.randn(ROWS, HEADS, capacity, SIZE, dtype=dtype)
    name, store = list(KeyLayout(layout).stores(keys, capacity).items())[-1]
    every = torch.arange(capacity).expand(ROWS, HEADS, capacity)
    reference.append(slots_first(name, store), keys, every)
    lengths = torch.tensor([[capacity - 3, 7], [0, 9]])
    given = {"size": capacity, "scale": 0.25, "group_score": group_score, "newest": 3, **extras}
    arguments = query, first_slots(name, store, capacity), lengths, reference.top_channels(query, 5), 9
    wanted, got = reference.top_by_channels(*arguments, **given), cpu.top_by_channels(*arguments, **given)
    assert torch.equal(got[1], wanted[1])
    for b in range(ROWS):
        for k in range(HEADS):
            sets = [set(slots[b, k, : int(got[1][b, k])].tolist()) for slots in (got[0], wanted[0])]
            assert len(sets[0]) == int(got[1][b, k])
            near = 0 if dtype == torch.float32 else 1  # of equal scores in half precision, any
            assert len(sets[0] - sets[1]) <= near
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(got[2], wanted[2], atol=tolerance, rtol=0)
