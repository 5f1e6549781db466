"""The meter equals the SparQ paper's formulas (section 4 and appendix G), to the element."""

import dataclasses

import pytest
import torch

import kvsieve
from kvsieve import make_policy, transfer
from kvsieve.cache.traffic import Traffic
from kvsieve.testing import Inputs, rollout
from tests.families.zoo import FAMILIES
from tests.models import random_prompts, tiny_llama
from tests.policies import TIGHT

B, H, K, D, P = 3, 4, 2, 16, 50  # one step over P + 1 tokens


def one_step(policy, dtype=torch.float32):
    random = torch.Generator().manual_seed(0)
    queries = torch.randn(B, H, P + 1, D, generator=random, dtype=dtype)
    keys, values = (torch.randn(B, K, P + 1, D, generator=random, dtype=dtype) for _ in range(2))
    with transfer.measure() as meter:
        rollout(policy, queries[:, :, :P], queries[:, :, P:], keys, values)
    return meter


def elements(meter):
    """Numbers moved per row and KV head: cache numbers, and float32 ones that a policy keeps beside it."""
    return (meter.read + meter.written) / 4 / B / K


T = P + 1


@pytest.mark.parametrize(
    ("policy", "formula"),
    [
        (make_policy("dense"), 2 * T * D + 2 * D),
        (make_policy("sparq", r=4, k=10, local=3, layout="single"), T * 4 + 2 * 10 * D + 4 * D),
        (make_policy("sparq", r=4, k=10, local=3, layout="double"), T * 4 + 2 * 10 * D + 5 * D),  # keys twice
        (
            make_policy("sparq", r=4, k=10, local=3, mean_value=False, layout="single"),
            T * 4 + 2 * 10 * D + 2 * D,
        ),
        # S in the paper's 2 S of mass is what is left after eviction: the slots that are still there to be
        # read
        (make_policy("h2o", budget=12, recent=3), 2 * 12 * D + 2 * D + 2 * 12),
        (make_policy("local_window", budget=12, sinks=3), 2 * 12 * D + 2 * D),
        (
            make_policy("sparq", r=4, k=60, layout="single"),
            2 * T * D + 4 * D,
        ),  # nothing to leave out: dense, and the mean value kept up
    ],
    ids=lambda value: value.name if isinstance(value, kvsieve.Policy) else None,
)
def test_one_step_moves_what_the_paper_says(policy, formula):
    meter = one_step(policy)
    assert elements(meter) == formula
    assert meter.dense_read == 2 * T * D * 4 * B * K
    assert meter.steps == B


def test_bytes_follow_the_type_of_the_cache():
    single, half = (one_step(make_policy("dense"), dtype) for dtype in (torch.float32, torch.bfloat16))
    assert half.read * 2 == single.read
    summary = one_step(make_policy("sparq", r=4, k=10, local=3), torch.bfloat16)
    assert summary.by_kind["summaries"] == D * 4 * B * K  # float32 in any case


def test_touching_the_keys_directly_costs_a_whole_read():
    class Peeking(kvsieve.Policy):
        name = "peeking"

        def select(self, query, kv):
            assert kv.keys.shape == (B, K, T, D)
            return kvsieve.Selection(
                torch.zeros(B, K, 1, dtype=torch.int64), torch.ones(B, K, dtype=torch.int64)
            )

    meter = one_step(Peeking())
    assert meter.by_kind == {"keys": (T + 1) * D * 4 * B * K, "values": D * 4 * B * K}


def test_a_decode_counts_all_layers_and_rows_but_not_the_prefill():
    model, prompts = tiny_llama(), random_prompts(9, 5)
    with transfer.measure() as meter:
        list(kvsieve.decode(model, prompts, make_policy("dense"), max_new_tokens=4))
    seen = sum(
        length + step for length in (9, 5) for step in (1, 2, 3)
    )  # three steps after the prefill's token
    assert (
        meter.read == meter.dense_read == seen * 2 * 8 * 4 * 2 * 2
    )  # keys and values, D, float32, heads, layers
    assert meter.steps == 2 * 3


@pytest.mark.parametrize("family", ["llama (GQA)", "qwen3_next"])  # one is told of padding at every step
def test_rows_that_have_ended_move_nothing(family):
    model = kvsieve.prepare(next(each for each in FAMILIES if each.name == family).build())
    prompts = random_prompts(9, 5)
    tokens = torch.stack(list(kvsieve.decode(model, prompts, max_new_tokens=6, eos_token_id=())), 1)
    end = next(token for token in tokens[0].tolist()[1:5] if token not in tokens[1].tolist())
    with transfer.measure() as both:
        list(kvsieve.decode(model, prompts, max_new_tokens=6, eos_token_id=end))
    with transfer.measure() as alone:
        for prompt in prompts:
            list(kvsieve.decode(model, [prompt], max_new_tokens=6, eos_token_id=end))
    assert (both.read, both.written, both.steps) == (alone.read, alone.written, alone.steps)


def test_a_share_of_the_row_is_charged_as_it_is_read():
    policy = dataclasses.replace(TIGHT["loki"], k=0.29)
    with transfer.measure() as meter:
        rollout(policy, *Inputs.random((99,), steps=1))
    # In float64; in float32, 0.29 of 100 tokens would be 29.
    assert meter.by_kind["values"] == int(0.29 * 100) * 16 * 4 * 2


def test_static_data_is_counted_where_it_lies():
    # On the device, as all else: a captured step adds it at every replay.
    with transfer.measure() as meter:
        traffic = Traffic()
        traffic.begin(meter, None)
        traffic.read_static("basis", torch.empty(3, 5, device="meta"))
    assert {(name, amount.device.type) for (name, _), amount in meter._sums.items()} == {
        ("read/static", "meta")
    }


def test_without_a_meter_nothing_is_counted():
    assert transfer.current() is None
    with transfer.measure() as meter:
        pass
    list(kvsieve.decode(tiny_llama(), random_prompts(4), max_new_tokens=3))
    assert (meter.read, meter.written, meter.steps) == (0, 0, 0)
