"""Triton's attend equals the reference: every group size, ragged and empty rows, sinks, tail, mass."""

import pytest
import torch

from kvsieve.ops import reference
from kvsieve.ops.triton import attend

from .tensors import DEVICE, NAN, TOLERANCE, clean, normal, on_gpu, slots_of, unwritten_is_nan

F32, F16, BF16 = torch.float32, torch.float16, torch.bfloat16
SHAPES = [  # group, head size, type, soft-cap, sinks
    (1, 64, F32, None, False),
    (2, 80, F16, None, True),
    (3, 64, F16, 3.0, False),
    (4, 64, F32, None, True),
    (8, 80, F32, 3.0, True),
    (16, 64, F16, None, False),
    *[on_gpu(g, d, BF16, None, False) for g in (1, 4, 7, 16, 32) for d in (64, 80, 96, 128, 256, 512)],
    *[on_gpu(4, d, dtype, 30.0, True) for d in (64, 80, 96, 128, 256, 512) for dtype in (F32, F16, BF16)],
]


def close(mine: torch.Tensor, right: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(mine.float(), right, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def blocks(keys: torch.Tensor, size: int = 16) -> torch.Tensor:
    """The same keys `[B, K, T/n, n, D]`, channel-major inside blocks; NaN beyond the last."""
    rows, heads, total, channels = keys.shape
    whole = -(-total // size) * size
    padded = keys.new_full((rows, heads, whole, channels), NAN)
    padded[:, :, :total] = keys
    return padded.unflatten(2, (-1, size)).transpose(3, 4).contiguous().transpose(3, 4)


@pytest.mark.parametrize(("group", "size", "dtype", "softcap", "with_sinks"), SHAPES)
def test_all_slots(
    group: int, size: int, dtype: torch.dtype, softcap: float | None, with_sinks: bool
) -> None:
    total = 300 if DEVICE == "cpu" else 9000
    lengths = torch.tensor([[total, 1], [0, total // 2 - 13]], device=DEVICE)
    query = normal(2, 2, group, size, dtype=dtype)
    keys, values = (slots_of((2, 2, total, size), lengths, dtype, seed) for seed in (1, 2))
    sinks = normal(2, group, dtype=dtype) if with_sinks else None
    scoring = {"scale": size**-0.5, "softcap": softcap, "want_mass": True}
    with unwritten_is_nan():
        output, mass = attend(query, keys, values, lengths, sinks=sinks, **scoring)
    tensors = (clean(query), clean(keys), clean(values))
    right, right_mass = reference.attend(*tensors, lengths, sinks=sinks, **scoring)
    assert output.dtype == dtype
    assert not output[1, 0].any()
    close(output, right, dtype)
    torch.testing.assert_close(mass, right_mass, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("in_blocks", [False, True])
@pytest.mark.parametrize(("group", "size", "dtype", "softcap", "with_sinks"), SHAPES[:-1:2])
def test_chosen_slots(
    group: int, size: int, dtype: torch.dtype, softcap: float | None, with_sinks: bool, in_blocks: bool
) -> None:
    total, many = (150, 37) if DEVICE == "cpu" else (9000, 1111)
    lengths = torch.tensor([[total, 1], [0, total - 50]], device=DEVICE)
    counts = lengths.clamp(max=many)
    live = torch.rand(2, 2, total, device=DEVICE).masked_fill(
        torch.arange(total, device=DEVICE) >= lengths[..., None], -1
    )
    slots = live.topk(many).indices  # beyond the counts: dead ones
    query = normal(2, 2, group, size, dtype=dtype)
    keys, values = (slots_of((2, 2, total, size), lengths, dtype, seed) for seed in (1, 2))
    sinks = normal(2, group, dtype=dtype) if with_sinks else None
    tail = {
        "tail_weight": torch.rand(2, 2, group, device=DEVICE),
        "tail_value": normal(2, 2, size, seed=3),
    }
    chosen = {"slots": slots, "counts": counts, "scale": size**-0.5, "softcap": softcap, "want_mass": True}
    with unwritten_is_nan():
        laid = blocks(keys) if in_blocks else keys
        output, mass = attend(query, laid, values, lengths, sinks=sinks, **chosen, **tail)
    tensors = (clean(query), clean(keys), clean(values))
    right, right_mass = reference.attend(*tensors, lengths, sinks=sinks, **chosen, **tail)
    close(output, right, dtype)
    torch.testing.assert_close(mass, right_mass, atol=1e-6, rtol=1e-4)


def test_all_slots_in_blocks() -> None:
    lengths = torch.tensor([[50, 17]], device=DEVICE)
    query = normal(1, 2, 2, 64)
    keys, values = (slots_of((1, 2, 50, 64), lengths, F32, seed) for seed in (1, 2))
    output, _ = attend(query, blocks(keys), values, lengths, scale=0.125)
    right, _ = reference.attend(query, clean(keys), clean(values), lengths, scale=0.125)
    close(output, right, F32)


def test_storage_with_tokens_before_heads() -> None:
    """`[B, T, K, D]`, as some caches keep it: only strides differ."""
    lengths = torch.tensor([[40, 3]], device=DEVICE)
    query = normal(1, 2, 2, 64)
    keys, values = (slots_of((1, 2, 40, 64), lengths, F32, seed) for seed in (1, 2))
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (keys, values)]
    output, _ = attend(query, *turned, lengths, scale=0.125)
    right, _ = reference.attend(query, clean(keys), clean(values), lengths, scale=0.125)
    close(output, right, F32)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("chosen", [False, True])
def test_a_captured_graph_follows_the_lengths(chosen: bool) -> None:
    shape = (4, 8, 16384, 128)
    lengths = torch.zeros(4, 8, dtype=torch.int64, device=DEVICE)
    everything = torch.full((4, 8), shape[2], device=DEVICE)
    keys, values = (slots_of(shape, everything, BF16, seed) for seed in (1, 2))
    query = normal(4, 8, 4, 128, dtype=BF16)
    slots = torch.rand(4, 8, 1024, device=DEVICE).argsort(-1)
    how = {"slots": slots, "counts": lengths.clamp(max=1024)} if chosen else {}
    attend(query, keys, values, lengths, scale=0.1, want_mass=True, **how)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        if chosen:
            how["counts"] = lengths.clamp(max=1024)
        output, mass = attend(query, keys, values, lengths, scale=0.1, want_mass=True, **how)
    for length in (1024, 5000, 16384):
        lengths.fill_(length)
        graph.replay()
        tensors = (query.float(), keys.float(), values.float())
        how = {"slots": slots, "counts": lengths.clamp(max=1024)} if chosen else {}
        right, right_mass = reference.attend(*tensors, lengths, scale=0.1, want_mass=True, **how)
        close(output, right, BF16)
        torch.testing.assert_close(mass, right_mass, atol=1e-5, rtol=1e-3)
