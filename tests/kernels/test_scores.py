"""Scores from few channels equal the reference in every key layout; dead slots hold NaN."""

import pytest
import torch

from kvsieve.ops import reference
from kvsieve.ops import triton as ops

from .tensors import DEVICE, NAN, TOLERANCE, clean, laid_out, normal, on_gpu

LAYOUTS = [("single", 16), ("double", 16), ("blocked", 16), ("blocked", 32)]
T = 150


def ragged(total: int = T) -> torch.Tensor:
    return torch.tensor([[total, 0], [1, total // 2]], device=DEVICE)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "group", "size", "r", "total"),
    [
        (torch.float32, 1, 64, 16, T),
        (torch.float16, 4, 128, 32, T),
        (torch.float32, 3, 80, 7, T),
        (torch.float16, 16, 96, 96, 40),
        on_gpu(torch.bfloat16, 4, 128, 32, 70_001),
        on_gpu(torch.bfloat16, 16, 256, 100, 5_000),
        on_gpu(torch.float32, 5, 80, 80, 5_000),
    ],
)
def test_channel_scores(layout, dtype, group, size, r, total):
    query, lengths = normal(2, 2, group, size, dtype=dtype), ragged(total)
    query[1, 1, 0] = 0
    keys = laid_out(*layout, normal(2, 2, total, size, dtype=dtype, seed=1), lengths)
    channels = reference.top_channels(query, r)
    got = ops.channel_scores(query, keys, lengths, channels, scale=0.3, softcap=5.0 if group == 3 else None)
    wanted = reference.channel_scores(
        query.float(), clean(keys), lengths, channels, scale=0.3, softcap=5.0 if group == 3 else None
    )
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, wanted, atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize(
    ("group", "size", "r"), [(1, 64, 1), (4, 128, 32), (3, 80, 80), on_gpu(16, 256, 200)]
)
def test_top_channels(group, size, r):
    query = normal(2, 3, group, size)
    got, wanted = ops.top_channels(query, r), reference.top_channels(query, r)
    assert torch.equal(got.sort(2).values, wanted.sort(2).values)


def test_equal_channels_are_taken_from_the_first_and_nan_is_survived():
    query = torch.ones(2, 1, 2, 16, device=DEVICE)
    query[1, 0, 1, 5] = NAN
    got = ops.top_channels(query, 4)
    assert got[:, 0].tolist() == [[0, 1, 2, 3], [5, 0, 1, 2]]


@pytest.mark.parametrize("group", [3, 4, 16])
def test_every_place_holds_a_channel_however_sums_are_rounded(group):
    """On a GPU, threads may add up a group in different orders for the two sides of a comparison."""
    query = normal(2 if DEVICE == "cpu" else 500, 2, group, 64)
    query *= 10 ** normal(*query.shape, seed=1)
    channels = ops.top_channels(query, 64)
    assert torch.equal(channels.sort(2).values, torch.arange(64, device=DEVICE).expand(channels.shape))
