"""The slot that a new token overwrites: the first of the lowest, whatever the numbers, never a dead one."""

import math
from types import ModuleType

import pytest
import torch

from kvsieve.ops import reference

from .tensors import DEVICE, normal
from .test_token import every_implementation

INF, NAN = math.inf, math.nan


def tensor(numbers: object, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.tensor(numbers, dtype=dtype, device=DEVICE)


@every_implementation
@pytest.mark.parametrize(
    ("row", "length", "wanted"),
    [
        ([3.0, 1.0, 2.0, 1.0], 4, 1),  # of equal ones the first
        ([3.0, 2.0, 1.0, 0.0], 2, 1),  # dead slots do not count
        ([0.0, -INF, 5.0, -INF], 4, 1),
        ([INF, NAN, INF, 7.0], 3, 0),  # all as high as can be: the first
        ([NAN, 4.0, NAN, 1.0], 3, 1),
        ([NAN, INF, -1.0, 0.0], 2, 0),
        ([5.0, 4.0, 3.0, 2.0], 0, 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_first_of_the_lowest(ops: ModuleType, row, length, wanted, dtype) -> None:
    if DEVICE == "cpu" and dtype == torch.bfloat16 and "triton" in ops.__name__:
        pytest.skip("the interpreter has no bfloat16")
    found = ops.lowest(tensor([[row]], dtype), torch.tensor([[length]], device=DEVICE))
    assert found.tolist() == [[wanted]]


@every_implementation
@pytest.mark.parametrize(("newest", "oldest"), [(0, 3), (4, 0), (2, 2), (90, 0)])
@pytest.mark.parametrize("by_position", [False, True])
def test_the_newest_and_the_oldest_stay(ops: ModuleType, newest, oldest, by_position) -> None:
    lengths, seen = tensor([[60, 3], [0, 41]], torch.int64), tensor([[70, 70], [45, 45]], torch.int64)
    scrambled = torch.rand(2, 2, 70, generator=torch.Generator().manual_seed(1)).argsort(2)
    positions = scrambled.to(DEVICE)[:, :, :64]  # a view of larger storage, as a cache gives
    priority = positions if by_position else normal(2, 2, 64).round()  # many are equal
    given = {"positions": positions, "seen": seen, "newest": newest, "oldest": oldest}
    ranks = priority.double()
    stays = (positions < oldest) | (positions >= seen[..., None] - newest)
    ranks = ranks.masked_fill(stays, INF)
    for b in range(2):
        for k in range(2):
            live = ranks[b, k, : int(lengths[b, k])].tolist()
            wanted = live.index(min(live)) if live else 0
            assert int(ops.lowest(priority, lengths, **given)[b, k]) == wanted


@every_implementation
def test_a_row_of_many_slots(ops: ModuleType) -> None:
    priority, lengths = normal(1, 2, 3000), tensor([[3000, 2999]], torch.int64)
    assert torch.equal(ops.lowest(priority, lengths), reference.lowest(priority, lengths))
