"""A filled cache equals one after prefill; the timed step is that of decoding and can be repeated."""

import pytest
import torch
import torch.nn.functional as F

from kvsieve import make_policy, transfer
from kvsieve.bench import baselines, memory
from kvsieve.bench.layer_step import ROOM, PolicyStep, Tokens
from kvsieve.bench.shapes import Heads
from tests.policies import TIGHT

HEADS = Heads(4, 2, 16)
NAMES = ("dense", "sparq_double", "sparq_blocked", "h2o", "local_window", "streaming_llm", "hip", "infllm")
POLICIES = [TIGHT[name] for name in NAMES]


@pytest.fixture
def tokens():
    return Tokens.random(2, 40, HEADS, torch.float32, torch.device("cpu"))


def test_a_dense_step_attends_to_all_tokens(tokens):
    wanted = F.scaled_dot_product_attention(tokens.query, tokens.keys, tokens.values)
    assert torch.allclose(PolicyStep(make_policy("dense"), tokens).run(), wanted, atol=1e-5)


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_a_step_can_be_taken_again_from_the_same_place(tokens, policy):
    step = PolicyStep(policy, tokens)
    before = step.layer.slots.used, step.layer.kv.lengths.tolist(), step.layer.kv.seen.tolist()
    for _ in range(3):
        step.prepare()
        assert (step.layer.slots.used, step.layer.kv.lengths.tolist(), step.layer.kv.seen.tolist()) == before
        step.run()
        assert step.layer.kv.seen.tolist() == [40, 40]
        assert int(step.layer.kv.lengths.max()) == (policy.keeps or 40)


def test_the_meter_counts_one_step(tokens):
    traffic = PolicyStep(make_policy("dense"), tokens).traffic()
    assert traffic["read"] == traffic["dense_read"] == 2 * 2 * 2 * 40 * 16 * 4  # k and v, B, K, T, D, float32
    evicting = PolicyStep(make_policy("local_window", budget=10, sinks=2), tokens).traffic()
    assert evicting["dense_read"] == traffic["read"]
    assert evicting["by_kind"]["values"] * 4 == traffic["by_kind"]["values"]


@pytest.mark.parametrize("policy", POLICIES, ids=str)
def test_memory_is_known_beforehand(tokens, policy):
    slots = PolicyStep(policy, tokens).layer.slots
    positions = 2 * 2 * slots.capacity * 8
    summaries = sum(summary.numel() * summary.element_size() for summary in slots.summaries.values())
    assert (
        memory.cache_bytes(policy, 2, 40 + ROOM, HEADS, torch.float32, torch.device("cpu"))
        == slots.memory() + positions - summaries
    )


def test_every_dense_candidate_computes_the_same(tokens):
    ours = PolicyStep(make_policy("dense"), tokens).run()
    found = dict(baselines.builders(["sdpa"], tokens, repeat_fits=True))
    assert {"sdpa math gqa", "sdpa math rows", "sdpa math repeat", "sdpa flash rows"} <= found.keys()
    for name, build in found.items():
        assert baselines.agrees(build(tokens)(), ours), name


def test_a_wrong_result_is_noticed(tokens):
    ours = PolicyStep(make_policy("dense"), tokens).run()
    assert not baselines.agrees(ours * 1.1, ours)


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy.capturable], ids=str)
def test_one_metered_step_of_each_shape_counts_what_metering_every_step_does(policy):
    def step(context):
        return PolicyStep(policy, Tokens.random(2, context, HEADS, torch.float32, torch.device("cpu")))

    every, apart = step(30), [step(context).traffic() for context in (30, 31, 32)]
    with transfer.measure() as meter:
        for _ in apart:
            every.run()
    for counted in ("read", "written", "dense_read"):
        assert getattr(meter, counted) == sum(one[counted] for one in apart)


def test_what_is_timed_counts_nothing(tokens, monkeypatch):
    step = PolicyStep(TIGHT["sparq"], tokens)
    step.traffic()
    monkeypatch.setattr(transfer.Meter, "add", lambda *given: pytest.fail("a timed step was metered"))
    step.prepare()
    step.run()
