"""More slots by another query, in one softmax; and the mass of each query head."""

from types import ModuleType

import pytest
import torch

from kvsieve.ops import cpu, reference
from kvsieve.ops import triton as triton_ops

from .tensors import DEVICE, NAN, TOLERANCE, clean, normal, on_gpu, slots_of, unwritten_is_nan
from .test_attend import blocks

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
IMPLEMENTATIONS = [reference, triton_ops] + ([cpu] if DEVICE == "cpu" else [])
SHAPES = [  # group, head size, type, soft-cap, sinks, blocks
    (1, 64, F32, None, False, False),
    (3, 80, F16, 3.0, True, False),
    (4, 64, F16, None, False, True),
    *[on_gpu(4, d, dtype, None, True, False) for d in (64, 128, 256) for dtype in (F32, F16, BF16)],
]


def close(mine: torch.Tensor, right: torch.Tensor, dtype: torch.dtype = F32) -> None:
    torch.testing.assert_close(mine.float(), right, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("ops", IMPLEMENTATIONS, ids=lambda ops: ops.__name__.split(".")[-1])
@pytest.mark.parametrize("by_head", [False, True])
def test_one_softmax_weighs_what_two_queries_read(ops: ModuleType, by_head: bool) -> None:
    query, other = normal(2, 2, 3, 16), normal(2, 2, 3, 16, seed=5)
    keys, values, sinks = normal(2, 2, 30, 16, seed=1), normal(2, 2, 30, 16, seed=2), normal(2, 3, seed=3)
    near, far = [4, 29, 0], [7, 1, 2, 28, 13]
    live = torch.zeros(2, 2, 30, 1, dtype=torch.bool, device=DEVICE)
    live[:, :, near + far] = True
    stored = keys.masked_fill(~live, NAN), values.masked_fill(~live, NAN)
    # Behind the counts, and among them, are slots that are none.
    slots, counts = torch.tensor([*near, -1, 30, 2**40, 5, 6]), 5
    others, far_counts = torch.tensor([far[0], 77, *far[1:], -(2**62), 3]), 7
    output, mass = ops.attend(
        query,
        *stored,
        torch.full((2, 2), 30, device=DEVICE),
        scale=0.3,
        sinks=sinks,
        slots=slots.to(DEVICE).expand(2, 2, -1),
        counts=torch.full((2, 2), counts, device=DEVICE),
        far=(
            others.to(DEVICE).expand(2, 2, -1),
            torch.full((2, 2), far_counts, device=DEVICE),
            other,
        ),
        want_mass=True,
        by_head=by_head,
    )
    for b in range(2):
        for k in range(2):
            parts = query[b, k] @ keys[b, k, near].T, other[b, k] @ keys[b, k, far].T
            logits = torch.cat([*(0.3 * part for part in parts), sinks[k, :, None]], 1)
            weights = logits.softmax(1)[:, :-1]
            close(output[b, k], weights @ values[b, k, near + far])
            wanted = torch.zeros(3, 30, device=DEVICE)
            wanted[:, near + far] = weights
            close(mass[b, k], wanted if by_head else wanted.mean(0))


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize(("group", "size", "dtype", "softcap", "with_sinks", "in_blocks"), SHAPES)
def test_triton_equals_the_reference_in_ragged_rows(
    group: int,
    size: int,
    dtype: torch.dtype,
    softcap: float | None,
    with_sinks: bool,
    in_blocks: bool,
    by_head: bool,
) -> None:
    total, near, many = (330, 37, 260) if DEVICE == "cpu" else (9000, 1111, 3000)
    lengths = torch.tensor([[total, 2], [0, total - 13]], device=DEVICE)
    order = torch.rand(2, 2, total, device=DEVICE)
    order = order.masked_fill(torch.arange(total, device=DEVICE) >= lengths[..., None], -1).argsort(
        descending=True
    )
    counts = lengths.clamp(max=near)
    counts[0, 0] = 0  # the other query alone
    far = order[..., near : near + many], (lengths - near).clamp(0, many)
    far[1][1, 1] = 0  # the step's own query alone
    query, other = normal(2, 2, group, size, dtype=dtype), normal(2, 2, group, size, dtype=dtype, seed=5)
    keys, values = (slots_of((2, 2, total, size), lengths, dtype, seed) for seed in (1, 2))
    how = {
        "slots": order[..., :near],
        "counts": counts,
        "scale": size**-0.5,
        "softcap": softcap,
        "sinks": normal(2, group, dtype=dtype) if with_sinks else None,
        "tail_weight": torch.rand(2, 2, group, device=DEVICE),
        "tail_value": normal(2, 2, size, seed=3),
        "want_mass": True,
        "by_head": by_head,
    }
    with unwritten_is_nan():
        laid = blocks(keys) if in_blocks else keys
        output, mass = triton_ops.attend(query, laid, values, lengths, **how, far=(*far, other))
    tensors = clean(query), clean(keys), clean(values)
    right, right_mass = reference.attend(*tensors, lengths, **how, far=(*far, clean(other)))
    assert output.dtype == dtype
    close(output, right, dtype)
    torch.testing.assert_close(mass, right_mass, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("ops", IMPLEMENTATIONS, ids=lambda ops: ops.__name__.split(".")[-1])
def test_the_mass_of_each_head_averages_to_the_mass(ops: ModuleType) -> None:
    lengths = torch.tensor([[70, 1], [0, 33]], device=DEVICE)
    query, prompt = normal(2, 2, 3, 16), normal(2, 2, 3, 9, 16)
    keys, values = (slots_of((2, 2, 70, 16), lengths, F32, seed).nan_to_num(0) for seed in (1, 2))
    starts, counts = torch.tensor([[61, 61], [0, 0]], device=DEVICE), torch.tensor([9, 4], device=DEVICE)
    for attend in (
        lambda by_head: ops.attend(query, keys, values, lengths, scale=0.3, want_mass=True, by_head=by_head),
        lambda by_head: ops.prefill(
            prompt, keys, values, starts, counts, fresh=False, scale=0.3, want_mass=True, by_head=by_head
        ),
    ):
        (output, mass), (same, heads) = attend(False), attend(True)
        assert heads.shape == (2, 2, 3, 70)
        assert torch.equal(output, same)
        close(heads.mean(2), mass)
        assert not torch.allclose(heads[0, 0, 0], heads[0, 0, 1])


@pytest.mark.parametrize("dtype", [F32, F16])
def test_a_prompts_mass_of_each_head_is_the_references(dtype: torch.dtype) -> None:
    query = normal(2, 2, 3, 21, 64, dtype=dtype)
    keys, values = normal(2, 2, 60, 64, dtype=dtype, seed=1), normal(2, 2, 60, 64, dtype=dtype, seed=2)
    starts, counts = torch.tensor([[39, 2], [0, 7]], device=DEVICE), torch.tensor([21, 10], device=DEVICE)
    how = {"fresh": False, "scale": 0.125, "want_mass": True, "by_head": True}
    _, mass = triton_ops.prefill(query, keys, values, starts, counts, **how)
    _, right = reference.prefill(query.float(), keys.float(), values.float(), starts, counts, **how)
    torch.testing.assert_close(mass, right, atol=1e-4, rtol=1e-3)
