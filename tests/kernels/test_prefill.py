"""Triton's prefill equals the reference: chunks after other slots, ragged and empty rows, sinks, mass."""

import importlib
from typing import Any

import pytest
import torch

from kvsieve.ops import reference
from kvsieve.ops.triton import prefill

from .tensors import DEVICE, TOLERANCE, clean, normal, on_gpu, slots_of, unwritten_is_nan

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = [  # group, head size, type, soft-cap, sinks
    (1, 64, F32, None, False),
    (2, 80, F16, 3.0, True),
    (3, 64, F32, 3.0, False),
    (4, 64, F16, None, False),
    (8, 80, F32, None, True),
    (16, 64, F16, 3.0, False),
    *[on_gpu(4, d, dtype, 30.0, True) for d in (64, 80, 96, 128, 256, 512) for dtype in (F32, F16, BF16)],
    *[on_gpu(g, 128, BF16, None, False) for g in (1, 3, 7, 16)],
]
MANY = 21 if DEVICE == "cpu" else 1000


def tokens_first(rows: int, heads: int, group: int, new: int, size: int, dtype: torch.dtype) -> torch.Tensor:
    """`[B, K, G, Q, D]` whose memory is `[B, Q, K, G, D]`, as a model makes it."""
    return normal(rows, new, heads, group, size, dtype=dtype).permute(0, 2, 3, 1, 4)


def close(mine: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(mine.float(), right, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("want_mass", [False, True])
@pytest.mark.parametrize(("group", "size", "dtype", "softcap", "with_sinks"), SHAPES)
def test_a_chunk_after_other_slots(
    group: int, size: int, dtype: torch.dtype, softcap: float | None, with_sinks: bool, want_mass: bool
) -> None:
    starts = torch.tensor([[2 * MANY, 0], [3, 2 * MANY]], device=DEVICE)
    counts = torch.tensor([MANY, MANY // 2], device=DEVICE)
    query = tokens_first(2, 2, group, MANY, size, dtype)
    live = starts + counts[:, None]
    keys, values = (slots_of((2, 2, 3 * MANY, size), live, dtype, seed) for seed in (1, 2))
    sinks = normal(2, group, dtype=dtype) if with_sinks else None
    how = {"fresh": False, "scale": size**-0.5, "softcap": softcap, "sinks": sinks, "want_mass": want_mass}
    with unwritten_is_nan():
        output, mass = prefill(query, keys, values, starts, counts, **how)
    tensors = (clean(query), clean(keys), clean(values))
    right, right_mass = reference.prefill(*tensors, starts, counts, **how)
    assert output.dtype == dtype
    close(output, right, dtype)
    if want_mass:
        torch.testing.assert_close(mass, right_mass, atol=1e-4, rtol=1e-3)
    else:
        assert mass is None


@pytest.mark.parametrize("want_mass", [False, True])
@pytest.mark.parametrize("dtype", [F32, F16, on_gpu(BF16)])
def test_a_whole_prompt(dtype: torch.dtype, want_mass: bool) -> None:
    starts = torch.zeros(3, 2, dtype=torch.int64, device=DEVICE)
    counts = torch.tensor([MANY, 5, 0], device=DEVICE)
    query = tokens_first(3, 2, 4, MANY, 64, dtype)
    keys, values = normal(3, 2, MANY, 64, dtype=dtype, seed=1), normal(3, 2, MANY, 64, dtype=dtype, seed=2)
    how = {"fresh": True, "scale": 0.125, "want_mass": want_mass}
    output, mass = prefill(query, keys, values, starts, counts, **how)
    right, right_mass = reference.prefill(query.float(), keys.float(), values.float(), starts, counts, **how)
    close(output, right, dtype)
    assert not output[2].any()
    if want_mass:
        torch.testing.assert_close(mass, right_mass, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(mass.sum(-1), counts[:, None].expand(3, 2).float())


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("dtype", [F32, F16, on_gpu(BF16)])
@pytest.mark.parametrize("with_sinks", [False, True])
def test_a_window(dtype: torch.dtype, fresh: bool, with_sinks: bool) -> None:
    window, held = MANY // 3, 0 if fresh else 2 * MANY
    starts = torch.tensor([[held, 0], [held // 2, held]], device=DEVICE)
    counts = torch.tensor([MANY, MANY // 2], device=DEVICE)
    query = tokens_first(2, 2, 3, MANY, 64, dtype)
    live, total = starts + counts[:, None], held + MANY
    keys, values = (slots_of((2, 2, total, 64), live, dtype, seed) for seed in (1, 2))
    if fresh:
        keys, values = clean(keys).to(dtype), clean(values).to(dtype)
    own = starts[..., None] + torch.arange(MANY, device=DEVICE)
    since = (own - window + 1).clamp(min=0)
    since[0, 0, 5] = own[0, 0, 5]  # one that sees itself alone
    sinks = normal(2, 3, dtype=dtype) if with_sinks else None
    how = {"fresh": fresh, "scale": 0.125, "sinks": sinks, "want_mass": True}
    with unwritten_is_nan():
        output, mass = prefill(query, keys, values, starts, counts, since=since, **how)
    tensors = (clean(query), clean(keys), clean(values))
    right, right_mass = reference.prefill(*tensors, starts, counts, since=since, **how)
    close(output, right, dtype)
    torch.testing.assert_close(mass, right_mass, atol=1e-4, rtol=1e-3)
    slots = torch.arange(total, device=DEVICE)
    for head in range(2):  # the same, said by a mask for each slot
        visible = slots >= since[:, head, :, None]
        said, said_mass = reference.prefill(*tensors, starts, counts, visible=visible, **how)
        torch.testing.assert_close(right[:, head], said[:, head])
        torch.testing.assert_close(right_mass[:, head], said_mass[:, head])
    plain, _ = reference.prefill(*tensors, starts, counts, **how)
    assert (plain - right).abs().max() > 0.1


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("dtype", [F32, F16, on_gpu(BF16)])
def test_a_mask_beyond_causal_order(dtype: torch.dtype, fresh: bool) -> None:
    held = 0 if fresh else 2 * MANY
    starts = torch.tensor([[held, 0], [held // 2, held]], device=DEVICE)
    counts = torch.tensor([MANY, MANY // 2], device=DEVICE)
    query = tokens_first(2, 2, 3, MANY, 64, dtype)
    live, total = starts + counts[:, None], held + MANY
    keys, values = (slots_of((2, 2, total, 64), live, dtype, seed) for seed in (1, 2))
    if fresh:
        keys, values = clean(keys).to(dtype), clean(values).to(dtype)
    # Few slots, so that whole blocks are hidden; a token's own slot differs from head to head.
    visible = normal(2, MANY, total, dtype=F32, seed=3) > 2
    own = starts[..., None] + torch.arange(MANY, device=DEVICE)
    for head in range(2):
        visible.scatter_(2, own[:, head, :, None].clamp(max=total - 1), True)
    how = {"fresh": fresh, "scale": 0.125, "visible": visible, "want_mass": True}
    with unwritten_is_nan():
        output, mass = prefill(query, keys, values, starts, counts, **how)
    right, right_mass = reference.prefill(clean(query), clean(keys), clean(values), starts, counts, **how)
    close(output, right, dtype)
    torch.testing.assert_close(mass, right_mass, atol=1e-4, rtol=1e-3)
    plain, _ = reference.prefill(
        clean(query), clean(keys), clean(values), starts, counts, fresh=False, scale=0.125
    )
    assert (plain - right).abs().max() > 0.1


@pytest.mark.parametrize("by_head", [False, True])
@pytest.mark.parametrize("sight", ["all", "since", "visible"])
def test_the_reference_gives_the_same_in_blocks_of_rows_and_queries(
    monkeypatch: pytest.MonkeyPatch, sight: str, by_head: bool
) -> None:
    starts, counts = torch.tensor([[9, 0], [3, 9], [0, 1]]), torch.tensor([11, 5, 0])
    query, keys, values = normal(3, 2, 2, 11, 16), normal(3, 2, 30, 16, seed=1), normal(3, 2, 30, 16, seed=2)
    tensors = query.cpu(), keys.cpu(), values.cpu(), starts, counts
    own = starts[..., None] + torch.arange(11)
    how: dict[str, Any] = {"fresh": False, "scale": 0.25, "want_mass": True, "by_head": by_head}
    if sight == "since":
        how["since"] = (own - 4).clamp(min=0)
    elif sight == "visible":
        how["visible"] = torch.rand(3, 11, 30, generator=torch.Generator().manual_seed(0)) < 0.7
        how["visible"].scatter_(2, own.transpose(1, 2), True)
    whole = reference.prefill(*tensors, **how)
    module = importlib.import_module("kvsieve.ops.reference.attend")
    blocks = list(module._blocks(3, 11, 4 * 30))
    monkeypatch.setattr(module, "_QUERIES", 4)
    monkeypatch.setattr(module, "_CACHED", 1)
    assert (len(blocks), len(list(module._blocks(3, 11, 4 * 30)))) == (1, 9)
    torch.testing.assert_close(reference.prefill(*tensors, **how), whole)
