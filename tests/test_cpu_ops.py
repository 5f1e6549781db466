"""The CPU ops, torch's and compiled ones, equal the reference, in any thread and under any gradient mode."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from kvsieve import KeyLayout
from kvsieve import ops as chosen_ops
from kvsieve.cache.layouts import KINDS, first_slots, slots_first
from kvsieve.ops import cpu, reference
from kvsieve.ops import numba as compiled
from kvsieve.testing import Inputs, rollout
from tests.policies import TIGHT

both = pytest.mark.parametrize("ops", [cpu, compiled], ids=["cpu", "numba"])
ROWS, HEADS, GROUP, SIZE = 2, 2, 3, 16


@both
def test_attend_over_chosen_slots(ops):
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
    torch.testing.assert_close(ops.attend(query, keys, values, lengths, **given)[0], wanted)


@both
def test_attend_over_all_slots(ops):
    query, keys, values = (
        torch.randn(2, 2, 3, 16),
        torch.randn(2, 2, 90, 16)[:, :, :70],
        torch.randn(2, 2, 70, 16),
    )
    lengths = torch.tensor([[70, 1], [0, 33]])
    wanted, _ = reference.attend(query, keys, values, lengths, scale=0.3)
    torch.testing.assert_close(ops.attend(query, keys, values, lengths, scale=0.3)[0], wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("k", "newest", "mask"), [(1, 0, False), (13, 5, False), (64, 400, False), (7, 0, True)]
)
def test_compiled_top_slots_are_the_best(dtype, k, newest, mask):
    lengths = torch.tensor([[3000, 0], [40, 1]])
    ranking = torch.randperm(4 * 3100).view(2, 2, 3100).float().sub_(6000)[..., :3000]
    ranking[0, 0, 5:900] = -torch.inf
    ranking[0, 0, 17], ranking[0, 0, 18] = torch.nan, torch.inf  # as high as can be
    ranking.masked_fill_(torch.arange(3000) >= lengths[..., None], torch.nan)
    forced = (torch.arange(3000) % 500 == 3).expand(2, 2, -1) if mask else None
    slots, counts = compiled.top_slots(ranking.to(dtype), lengths, k, newest=newest, forced=forced)
    assert torch.equal(counts, lengths.clamp(max=k))
    assert int(slots.min()) >= 0
    assert int(slots.max()) < 3000
    for b, head in ((0, 0), (1, 0)):
        ranks = ranking[b, head].to(dtype).float().nan_to_num(torch.inf).clamp(min=-1e30)
        if forced is None:
            ranks[max(0, int(lengths[b, head]) - newest) :] = torch.inf
        else:
            ranks.masked_fill_(forced[b, head], torch.inf)
        live = ranks[: lengths[b, head]]
        got = slots[b, head, : counts[b, head]]
        assert len(got.unique()) == len(got)
        assert torch.equal(live[got].sort().values, live.topk(len(got)).values.sort().values)


@pytest.mark.parametrize("layout", KINDS)
@pytest.mark.parametrize("capacity", [70, 9000])
@pytest.mark.parametrize("group_score", ["softmax", "logits", "max"])
@pytest.mark.parametrize("extras", [{}, {"softcap": 3.0, "sinks": torch.tensor([[0.5, -1, 2], [0, 1, 0]])}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@both
def test_top_by_channels(ops, layout, capacity, group_score, extras, dtype):
    torch.manual_seed(0)
    query = torch.randn(ROWS, HEADS, GROUP, SIZE, dtype=dtype)
    keys = torch.randn(ROWS, HEADS, capacity, SIZE, dtype=dtype)
    name, store = list(KeyLayout(layout).stores(keys, capacity).items())[-1]
    every = torch.arange(capacity).expand(ROWS, HEADS, capacity)
    reference.append(slots_first(name, store), keys, every)
    lengths = torch.tensor([[capacity - 3, 7], [0, 9]])
    given = {"size": capacity, "scale": 0.25, "group_score": group_score, "newest": 3, **extras}
    arguments = query, first_slots(name, store, capacity), lengths, reference.top_channels(query, 5), 9
    wanted, got = reference.top_by_channels(*arguments, **given), ops.top_by_channels(*arguments, **given)
    assert torch.equal(got[1], wanted[1])
    for b in range(ROWS):
        for k in range(HEADS):
            sets = [set(slots[b, k, : int(got[1][b, k])].tolist()) for slots in (got[0], wanted[0])]
            assert len(sets[0]) == int(got[1][b, k])
            near = 0 if dtype == torch.float32 else 1  # of equal scores in half precision, any
            assert len(sets[0] - sets[1]) <= near
    tolerance = 1e-6 if dtype == torch.float32 else 0.02
    torch.testing.assert_close(got[2], wanted[2], atol=tolerance, rtol=0)


def selections(ops, seed, together):
    """Ten selections and attentions over them, of a size that depends on the seed."""
    generator = torch.Generator().manual_seed(seed)
    total = 640 + 128 * seed
    query, keys, values = (torch.randn(2, HEADS, n, SIZE, generator=generator) for n in (GROUP, total, total))
    by_channel = keys.transpose(2, 3).contiguous().transpose(2, 3)
    lengths, found = torch.tensor([[total, 50], [9, total - 3]]), []
    together.wait(60)
    for _ in range(10):
        channels = ops.top_channels(query, 5)
        slots, counts, missed = ops.top_by_channels(
            query, by_channel, lengths, channels, 9, size=total, scale=0.25
        )
        query, _ = ops.attend(query, keys, values, lengths, scale=0.25, slots=slots, counts=counts)
        found += [counts, missed, query]
    return found


@pytest.mark.parametrize("ops", [reference, cpu, compiled], ids=["reference", "cpu", "numba"])
def test_threads_get_what_they_get_alone(ops):
    alone = [selections(ops, seed, Barrier(1)) for seed in range(4)]
    together = Barrier(4)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda seed: selections(ops, seed, together), range(4)))
    for mine, right in zip(found, alone, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine, right, strict=True))


def test_numba_leaves_torch_its_number_of_threads(monkeypatch):
    told, mine = [], torch.get_num_threads()

    def launching(threads):  # as numba does where it takes its threads from torch's OpenMP
        told.append(threads)
        torch.set_num_threads(mine + 1)

    monkeypatch.setattr("numba.set_num_threads", launching)
    with ThreadPoolExecutor(1) as threads:  # a thread that has not told numba a number yet

        def select():
            torch.set_num_threads(mine)
            selections(compiled, 0, Barrier(1))
            return torch.get_num_threads()

        assert threads.submit(select).result() == mine
    assert len(told) == 1


@both
def test_memory_taken_in_inference_mode_serves_outside_of_it(ops):
    with ThreadPoolExecutor(1) as threads:  # a thread without a workspace yet
        assert threads.submit(inference_first, ops).result()


def inference_first(ops):
    with torch.inference_mode():
        first = selections(ops, 0, Barrier(1))
    with torch.no_grad():
        return all(torch.equal(a, b) for a, b in zip(selections(ops, 0, Barrier(1)), first, strict=True))


@pytest.mark.parametrize("name", ["dense", "sparq", "sparq_blocked", "h2o", "adakv"])
def test_a_policy_decodes_the_same_with_compiled_loops(name):
    def decoded():
        return rollout(TIGHT[name], *inputs)

    inputs = Inputs.random()
    with chosen_ops.use("reference"):
        wanted = decoded()
    with chosen_ops.use("numba"):
        torch.testing.assert_close(decoded(), wanted)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, pytest.param(torch.float16, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("layout", KINDS)
def test_compiled_attention_reads_every_type_and_layout(dtype, layout):
    """Pieces, sinks, a cap, a tail, ragged rows and slots that are not live, all at once."""
    torch.manual_seed(0)
    total, chosen = 1300, 700
    query, new = torch.randn(2, 2, 3, 16, dtype=dtype), torch.randn(2, 2, total, 16, dtype=dtype)
    name, store = next(iter(KeyLayout(layout).stores(new, total).items()))
    reference.append(slots_first(name, store), new, torch.arange(total).expand(2, 2, total))
    keys, values = first_slots(name, store, total), torch.randn(2, 2, total, 16, dtype=dtype)
    lengths = torch.tensor([[total, 1100], [0, 5]])
    values[1, :, 5:] = torch.nan
    given = {"scale": 0.3, "sinks": torch.randn(2, 3), "softcap": 2.0, "want_mass": True}
    some = {
        "slots": torch.rand(2, 2, total).argsort(2)[..., :chosen],
        "counts": torch.tensor([[700, 9], [3, 700]]),
    }
    some |= {"tail_weight": torch.rand(2, 2, 3), "tail_value": torch.randn(2, 2, 16), "by_head": True}
    precise = 1e-6 if dtype == torch.float32 else 1e-2
    for extras in ({}, some):
        got = compiled.attend(query, keys, values, lengths, **given, **extras)
        wanted = reference.attend(query, keys, values, lengths, **given, **extras)
        torch.testing.assert_close(got, wanted, atol=precise, rtol=precise)
