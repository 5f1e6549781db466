"""`torch.set_default_dtype` changes no result and no type of any op."""

from collections.abc import Callable, Iterator
from types import ModuleType

import pytest
import torch

from kvsieve.ops import reference

from .tensors import DEVICE, laid_out, normal
from .test_bounds import every_implementation

B, K, G, D, T = 2, 2, 2, 16, 20


@pytest.fixture(params=[torch.float64, torch.bfloat16], ids=str)
def another_default(request: pytest.FixtureRequest) -> Iterator[Callable[[], None]]:
    before = torch.get_default_dtype()
    yield lambda: torch.set_default_dtype(request.param)
    torch.set_default_dtype(before)


def results(ops: ModuleType) -> dict[str, object]:
    lengths = torch.tensor([[T, 3], [0, 9]], device=DEVICE)
    query, keys, values = normal(B, K, G, D), normal(B, K, T, D, seed=1), normal(B, K, T, D, seed=2)
    prompt, starts = normal(B, K, G, 4, D), torch.zeros_like(lengths)
    scoring = {"scale": 0.3, "sinks": normal(K, G, seed=3), "want_mass": True}
    channels = reference.top_channels(query, 5)
    slots = torch.arange(6, device=DEVICE).expand(B, K, 6)
    tail = {"tail_weight": normal(B, K, G).sigmoid(), "tail_value": normal(B, K, D)}
    by_channel = laid_out("double", 16, keys, torch.full_like(lengths, T))
    scores = ops.channel_scores(query, keys, lengths, channels, scale=0.3)
    count = torch.tensor([4, 2], device=DEVICE)
    storage, kept = values.clone(), torch.empty_like(values)
    ops.append(storage, prompt[:, :, 0], slots[:, :, :4])
    ops.compact(values, slots, kept[:, :, :6])
    given = {"size": T, "scale": 0.3, "newest": 2}
    return {
        "attend": ops.attend(query, keys, values, lengths, **scoring),
        "attend chosen": ops.attend(
            query, keys, values, lengths, **scoring, **tail, slots=slots, counts=lengths
        ),
        "prefill": ops.prefill(prompt, keys, values, starts, count, fresh=False, **scoring),
        "top_channels": ops.top_channels(query, 5),
        "channel_scores": scores,
        "slot_weights": ops.slot_weights(scores),
        "top_slots": ops.top_slots(normal(B, K, T), lengths, 4, newest=1),
        "top_by_channels": ops.top_by_channels(query, by_channel, lengths, channels, 4, **given),
        "single": ops.top_by_channels(
            query, keys, lengths, channels, 4, **given, softcap=5.0, sinks=normal(K, G)
        ),
        "append, compact": (storage, kept[:, :, :6]),
        "append_token": appended(ops, keys, values),
    }


def appended(ops: ModuleType, keys: torch.Tensor, values: torch.Tensor) -> tuple[torch.Tensor, ...]:
    stores, mean = [values.clone(), values.new_full((B, K, T), 0.5)], normal(B, K, D)
    positions, lengths = (torch.full(size, 7, device=DEVICE) for size in ((B, K, T), (B, K)))
    news = zip(stores, [keys[:, :, :1], None], strict=True)
    means = [(mean, values[:, :, :1])]
    slots = ops.append_token([*news], positions, lengths, lengths + 1, means=means)
    return *stores, mean, positions, lengths, slots


@every_implementation
def test_the_default_type_changes_nothing(ops: ModuleType, another_default: Callable[[], None]) -> None:
    wanted = results(ops)
    another_default()
    with torch.random.fork_rng():
        found = results(ops)
    for name, right in wanted.items():
        for mine, other in zip(tensors(found[name]), tensors(right), strict=True):
            assert mine.dtype == other.dtype, name
            assert torch.equal(mine, other), name


def tensors(found: object) -> list[torch.Tensor]:
    return [found] if isinstance(found, torch.Tensor) else list(found)
