"""Scores of vectors in four bits equal the reference; the places taken are the fewest that hold p."""

import pytest
import torch

from kvsieve.ops import cpu, four_bits, reference
from kvsieve.ops import triton as triton_ops

from .tensors import DEVICE, NAN, TOLERANCE, normal, unwritten_is_nan

FAST = [pytest.param(triton_ops, id="triton")]
if DEVICE == "cpu":  # a machine with a GPU need not have numba
    from kvsieve.ops import numba as compiled

    FAST += [pytest.param(cpu, id="cpu"), pytest.param(compiled, id="numba")]
every_implementation = pytest.mark.parametrize("ops", [pytest.param(reference, id="reference"), *FAST])
T = 150


def coded(*shape, dtype):
    """Codes and ranges of random vectors `[B, K, T, r]`, views of larger storage; NaN in dead slots."""
    lengths = torch.tensor([[shape[2], 0], [1, shape[2] // 2]], device=DEVICE)
    vectors = normal(shape[0], shape[1] + 1, shape[2] + 9, shape[3], dtype=dtype)
    codes, ranges = four_bits.quantised(vectors)
    dead = torch.arange(shape[2] + 9, device=DEVICE) >= torch.cat([lengths, lengths[:, :1]], 1)[..., None]
    ranges = ranges.masked_fill(dead[..., None], NAN)
    return vectors[:, :2, : shape[2]], codes[:, :2, : shape[2]], ranges[:, :2, : shape[2]], lengths


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("n", [2, 6, 64])
def test_a_number_is_held_to_half_a_step_of_its_vector(dtype, n):
    vectors = normal(3, 5, n, dtype=dtype)
    vectors[0, 0] = 1.5
    codes, ranges = four_bits.quantised(vectors)
    assert (codes.shape, ranges.shape, ranges.dtype) == ((3, 5, n // 2), (3, 5, 2), dtype)
    step = (vectors.float().amax(-1) - vectors.float().amin(-1)) / 15
    worst = (four_bits.unquantised(codes, ranges) - vectors.float()).abs().amax(-1)
    rounded = 16 * vectors.float().abs().amax(-1) * torch.finfo(dtype).eps  # the range's own rounding
    assert bool((worst <= 0.501 * step + rounded).all())


@pytest.mark.parametrize("ops", FAST)
@pytest.mark.parametrize(
    ("dtype", "group", "r"), [(torch.float32, 1, 6), (torch.float32, 3, 64), (torch.float16, 4, 24)]
)
def test_scores_equal_the_reference(ops, dtype, group, r):
    _, codes, ranges, lengths = coded(2, 2, T, r, dtype=dtype)
    query = normal(2, 2, group, r, dtype=dtype, seed=1)
    given = {"scale": 0.3, "softcap": 5.0 if group == 3 else None}
    with unwritten_is_nan():
        got = ops.code_scores(query, codes, ranges, lengths, **given)
    wanted = reference.code_scores(query, codes, ranges, lengths, **given)
    torch.testing.assert_close(got, wanted, atol=4 * TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("ops", FAST)
def test_scores_of_chosen_slots_equal_the_reference(ops):
    _, codes, ranges, lengths = coded(2, 2, T, 16, dtype=torch.float32)
    slots = torch.stack([torch.randperm(T, generator=torch.Generator().manual_seed(i)) for i in range(4)])
    slots = slots.view(2, 2, T)[..., :40].to(DEVICE)
    slots[0, 0, :4] = torch.tensor([-1, 2**40, -(2**62), T], device=DEVICE)
    counts = torch.tensor([[30, 40], [2**40, -3]], device=DEVICE)
    given = {"scale": 0.3, "slots": slots, "counts": counts}
    query = normal(2, 2, 3, 16, seed=1)
    with unwritten_is_nan():
        got = ops.code_scores(query, codes, ranges, lengths, **given)
    wanted = reference.code_scores(query, codes, ranges, lengths, **given)
    assert got.shape == (2, 2, 3, 40)
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=1e-5)


def test_scores_are_products_with_what_the_codes_stand_for():
    vectors, codes, ranges, lengths = coded(2, 2, T, 16, dtype=torch.float32)
    query = normal(2, 2, 3, 16, seed=1)
    got = reference.code_scores(query, codes, ranges, lengths, scale=1.0)
    exact = query @ vectors.transpose(2, 3)
    live = torch.arange(T, device=DEVICE) < lengths[..., None]
    assert torch.equal(got > -torch.inf, live[:, :, None].expand_as(got))
    assert float((got - exact)[0, 0].abs().max()) < 16 * 3 * 0.2  # a product of 16, with steps below 0.4


@every_implementation
@pytest.mark.parametrize(("p", "size"), [(0.1, 37), (0.85, 1), (0.85, 1100), (0.999, 37), (1.0, 37)])
def test_the_fewest_places_that_hold_p_of_every_head(ops, p, size):
    weights = torch.softmax(3 * normal(2, 2, 3, size), -1)
    counts = torch.tensor([[size, 0], [1, size // 2]], device=DEVICE)
    with unwritten_is_nan():
        places, found = ops.top_p(weights, counts, p)
    assert places.shape == (2, 2, size)
    assert bool(((places >= 0) & (places < size)).all())
    for b in range(2):
        for k in range(2):
            wanted, count = set(), int(counts[b, k])
            for head in weights[b, k, :, :count]:
                mass, order = 0.0, head.double().argsort(descending=True).tolist()
                for place in order:
                    if mass >= p - 1e-6:  # none of these is so near an edge
                        break
                    mass += float(head[place])
                    wanted.add(place)
            taken = places[b, k, : int(found[b, k])].tolist()
            assert len(taken) == len(set(taken))
            assert p == 1 or set(taken) == wanted
            assert float(weights[b, k, :, :count].sum(-1).sub(weights[b, k][:, taken].sum(-1)).amax()) <= max(
                1e-5, 1 - p + 1e-5
            )


@every_implementation
def test_places_of_equal_weight_are_taken_together_and_nan_is_survived(ops):
    weights = torch.tensor([[[[0.1, 0.3, 0.3, 0.3], [0.1, 0.1, 0.1, 0.1]]]], device=DEVICE)
    everything = torch.full((1, 1), 4, device=DEVICE)
    places, found = ops.top_p(weights[:, :, :1], everything, 0.5)
    assert sorted(places[0, 0, : int(found)].tolist()) == [1, 2, 3]
    assert int(ops.top_p(weights, everything, 0.5)[1]) == 4  # the second head never sums to p
    places, found = ops.top_p(torch.full((1, 1, 2, 9), NAN, device=DEVICE), everything, 0.5)
    assert 0 <= int(found) <= 9
    assert bool(((places >= 0) & (places < 9)).all())
