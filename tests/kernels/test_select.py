"""Top-k is exact on every path: ragged rows, ties, chunks that keep all or few, newest forced in."""

from itertools import product

import pytest
import torch

from kvsieve.ops import reference
from kvsieve.ops import triton as ops
from kvsieve.ops.triton import launch

from .tensors import DEVICE, NAN, clean, laid_out, normal, on_gpu, unwritten_is_nan

NOTHING = -float("inf")


@pytest.fixture
def small_chunks(monkeypatch):
    """Rows of tests are short: make their chunks so too, and look at what they kept in several tiles."""
    monkeypatch.setattr(launch, "chunk", lambda slots: 64)
    monkeypatch.setattr(launch, "KEPT_TILE", 32)


def best(ranking: torch.Tensor, length: int, k: int, forced: torch.Tensor) -> list[int]:
    """The k best of one row: forced ones first, of equal ones the newest; in the order of slots."""
    key = [(float("inf") if forced[t] else float(ranking[t]), t) for t in range(length)]
    return sorted(t for _, t in sorted(key)[max(0, length - k) :])


def check(ranking: torch.Tensor, lengths: torch.Tensor, k: int, newest: int, mask: bool = False) -> None:
    slots = torch.arange(ranking.shape[2], device=DEVICE)
    forced = slots >= (lengths - newest)[..., None]
    if mask:  # the newest stand anywhere
        forced = (slots % 7 == 3).expand(ranking.shape)
    got, counts = ops.top_slots(ranking, lengths, k, newest=newest, forced=forced if mask else None)
    assert torch.equal(counts, lengths.clamp(max=k))
    assert got.shape == (*lengths.shape, k)
    assert got.min() >= 0
    assert got.max() < ranking.shape[2]
    for b in range(lengths.shape[0]):
        for h in range(lengths.shape[1]):
            live = int(lengths[b, h])
            wanted = best(ranking[b, h].cpu(), live, k, forced[b, h])
            assert got[b, h, : min(live, k)].tolist() == wanted


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("k", "newest", "mask"), [(1, 0, False), (13, 5, False), (64, 5, True), (90, 400, False), (190, 0, True)]
)
def test_top_slots(k, newest, mask):
    lengths = torch.tensor([[200, 0], [1, 129]], device=DEVICE)
    ranking = normal(2, 2, 213)
    ranking[0, 0, 7:40] = 0.5  # ties, on both sides of an edge
    ranking[1, 1, 100:] = NOTHING
    ranking.masked_fill_(torch.arange(213, device=DEVICE) >= lengths[..., None], NAN)
    check(ranking.transpose(0, 1).contiguous().transpose(0, 1)[..., :200], lengths, k, newest, mask)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("k", [3, 90])
def test_of_equal_slots_the_newest_are_taken(k):
    lengths = torch.tensor([[150, 70]], device=DEVICE)
    check((normal(1, 2, 150) * 2).round(), lengths, k, 2)
    signed_zeros = torch.where(normal(1, 2, 150) > 0, 0.0, -0.0)
    check(signed_zeros, lengths, k, 0)


@pytest.mark.parametrize(
    ("total", "k"), [on_gpu(262_144, 128), on_gpu(262_144, 8192), on_gpu(131_072, 1), on_gpu(5_000, 4_999)]
)
def test_long_rows(total, k):
    lengths = torch.tensor([[total, total // 3]], device=DEVICE)
    check(normal(1, 2, total), lengths, k, 32)
    check((normal(1, 2, total) * 20).round(), lengths, k, 32)


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize(
    ("layout", "group_score"),
    [*product(["single", "double", "blocked"], ["softmax", "logits"]), ("single", "max")],
)
@pytest.mark.parametrize(
    ("dtype", "group", "sinks", "softcap"),
    [
        (torch.float32, 1, False, None),
        (torch.float32, 4, True, 3.0),
        (torch.float16, 5, False, None),
        on_gpu(torch.bfloat16, 4, False, None),
    ],
)
def test_top_by_channels(layout, group_score, dtype, group, sinks, softcap):
    total, size, r, k = 170, 64, 12, 20
    lengths = torch.tensor([[total, 0], [20, 67]], device=DEVICE)
    query = normal(2, 2, group, size, dtype=dtype)
    keys = laid_out(layout, 16, normal(2, 2, total, size, dtype=dtype, seed=1), lengths)
    channels = reference.top_channels(query, r)
    given = {"size": total, "scale": 0.2, "softcap": softcap, "group_score": group_score, "newest": 3}
    given["sinks"] = normal(2, group, dtype=dtype) if sinks else None
    with unwritten_is_nan():
        slots, counts, missed = ops.top_by_channels(query, keys, lengths, channels, k, **given)
    wanted, wanted_counts, wanted_missed = reference.top_by_channels(
        query.float(), clean(keys), lengths, channels, k, **given
    )
    assert torch.equal(counts, wanted_counts)
    for b in range(2):
        for h in range(2):
            live = int(counts[b, h])
            chosen, right = set(slots[b, h, :live].tolist()), set(wanted[b, h, :live].tolist())
            assert len(chosen) == live
            # in half precision the edge may fall between two slots that the rounding of scores makes swap
            assert len(chosen - right) <= (0 if dtype == torch.float32 else 1)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(missed, wanted_missed, atol=tolerance, rtol=0)


def test_the_same_bits_every_time():
    lengths = torch.tensor([[90]], device=DEVICE)
    query, keys = normal(1, 1, 2, 64), normal(1, 1, 90, 64, seed=3)
    channels = reference.top_channels(query, 8)
    runs = [ops.top_by_channels(query, keys, lengths, channels, 9, size=90, scale=0.1) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.usefixtures("small_chunks")
@pytest.mark.parametrize("group_score", ["softmax", "logits", "max"])
def test_scores_beyond_half_precision_still_give_slots(group_score):
    lengths = torch.tensor([[150, 70]], device=DEVICE)
    query, keys = normal(1, 2, 2, 64, dtype=torch.float16), normal(1, 2, 150, 64, dtype=torch.float16, seed=1)
    keys *= torch.arange(150, device=DEVICE)[:, None] >= 40  # the first scores are zero
    keys[:, :, 40:] += 5000 * query[:, :, :1]
    given = {"size": 150, "scale": 1.0, "group_score": group_score}
    for sign in (1, -1):
        channels = reference.top_channels(query, 8)
        slots, counts, missed = ops.top_by_channels(sign * query, keys, lengths, channels, 20, **given)
        assert counts.tolist() == [[20, 20]]
        assert all(len(set(chosen)) == 20 and max(chosen) < 150 for chosen in slots[0].tolist())
        assert missed.isfinite().all()


@pytest.mark.parametrize(("k", "total"), [(128, 5000), (1, 2049), (2048, 4096), (2500, 4100)])
def test_chunks_of_real_size(k, total):
    lengths = torch.tensor([[total, total - 700]], device=DEVICE)
    check(normal(1, 2, total).softmax(-1), lengths, k, min(k, 32))
    check((normal(1, 2, total) * 2).round(), lengths, k, 0)
    check(torch.full((1, 2, total), NOTHING, device=DEVICE), lengths, k, 0)
