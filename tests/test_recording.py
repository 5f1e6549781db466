"""Prefill once: a cache that is filled from a recording is, to the bit, one that read the prompts itself."""

import functools
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

import kvsieve
from kvsieve import KVCache, Policy, make_policy, transfer
from kvsieve.attention import ChangedKeys
from kvsieve.reading import Reading
from kvsieve.recording import Alike, Needs, Recording, begin, needs
from kvsieve.scoring import Scoring
from tests.models import random_prompts, tiny_llama
from tests.policies import CASES, FIRST_LAYER_DENSE, of_two_layers

PROMPTS, ANSWERS = random_prompts(40, 27, 33), random_prompts(6, 6, 4, seed=2)
POLICIES = {case: of_two_layers(case) for case in CASES} | {"first_layer_dense": FIRST_LAYER_DENSE}
ALONE = {
    "anllm": "hides tokens of a prompt from others",
    "citrus": "reads prompts by a plan of its own",
}
PLANNED = {"kvzip", "sirllm"}  # they share a beginning: below


def needs_of(policy, prompts=PROMPTS, model=None):
    model = model or tiny_llama()
    return needs(KVCache(model, policy), Reading(model, prompts, policy))


@functools.cache
def recordings():
    """One recording for all policies that may share it, as a comparison makes them; by their weights."""
    groups = defaultdict(list)
    for policy in POLICIES.values():
        if isinstance(found := needs_of(policy), Needs):
            groups[found.weights].append(found)
    return {weights: Recording(tiny_llama(), PROMPTS, group) for weights, group in groups.items()}


def measured(policy, reader=None, model=None, prompts=PROMPTS, segments=None):
    """All that a comparison sees of an answer, and all that the cache holds."""
    model = model or tiny_llama()
    cache = KVCache(model, policy, capacity=80)
    with transfer.measure() as meter:
        scores = Scoring(
            model, prompts, ANSWERS[: len(prompts)], policy, cache=cache, reader=reader, segments=segments
        ).result()
    stored = {
        f"{layer.index} {name}": tensor
        for layer in cache.kv_layers
        for name, tensor in layer.slots.stored().items()
    }
    told = (
        meter.by_kind,
        meter.by_row(len(prompts)),
        cache.memory_by_row([46] * len(prompts)),
        cache.memory(),
    )
    return [row.log_probabilities for row in scores], stored, told


def assert_the_same(got, wanted):
    assert all(map(torch.equal, got[0], wanted[0]))
    assert got[1].keys() == wanted[1].keys()
    different = [name for name in got[1] if not torch.equal(got[1][name], wanted[1][name])]
    assert different == []
    assert got[2] == wanted[2]


@pytest.mark.parametrize("case", POLICIES)
def test_a_filled_cache_is_one_that_read_the_prompts_itself(case):
    policy = POLICIES[case]
    found = needs_of(policy)
    if isinstance(found, str):
        assert ALONE[policy.name] == found
        return
    assert policy.name not in ALONE
    assert isinstance(found, Alike) == (policy.name in PLANNED)
    if isinstance(found, Alike):
        return
    assert_the_same(measured(policy, recordings()[found.weights]), measured(policy))


def test_policies_that_sum_up_weights_share_no_prefill_with_those_that_do_not():
    shared = {
        name: found.weights
        for name, policy in POLICIES.items()
        if isinstance(found := needs_of(policy), Needs)
    }
    assert shared["sparq"] == shared["dense"] == shared["snapkv"] == shared["expected_attention"]
    assert shared["h2o"] == shared["h2o_all_recent"]
    assert len({shared[name] for name in ("dense", "h2o", "infllm", "first_layer_dense")}) == 4
    assert len(recordings()) == 4


def test_layers_with_a_window_are_taken_over():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        sliding_window=8,
        query_pre_attn_scalar=8,
        bos_token_id=None,
        eos_token_id=None,
        initializer_range=0.3,
    )
    model = kvsieve.prepare(Gemma2ForCausalLM(config))
    policies = [make_policy("snapkv", budget=12, window=4), make_policy("sparq", r=4, k=8, local=2)]
    recording = Recording(model, PROMPTS, [needs_of(policy, model=model) for policy in policies])
    for policy in policies:
        assert_the_same(measured(policy, recording, model), measured(policy, model=model))
    inside = make_policy("inside_windows", inner=policies[1])
    assert "of which a recording holds no more than the window" in needs_of(inside, model=model)


SEGMENTS = {
    "one": [[40], [27], [33]],
    "context and question": [[32, 8], [24, 3], [27, 6]],
    "turns": [[8, 12, 20], [7, 12, 8], [9, 12, 12]],
}
KVZIP = {"chunk": 11, "overlap": 3, "repeat": (7, 4), "go_on": (9,)}
BUDGETS = {
    "kvzip": [KVZIP | {"ratio": 0.75}, KVZIP | {"ratio": 0.25}, KVZIP | {"budget": 9}],
    "sirllm": [{"surprising": 36}, {"surprising": 20, "recent": 4}, {"surprising": 20, "sinks": 1}],
}


@pytest.mark.parametrize("text", SEGMENTS)
@pytest.mark.parametrize("name", BUDGETS)
def test_who_differs_in_what_is_dropped_goes_on_from_a_common_beginning(name, text):
    model, segments = tiny_llama(), SEGMENTS[text]
    policies = [make_policy(name, **budget) for budget in BUDGETS[name]]
    (alike,) = {needs_of(policy) for policy in policies}
    assert isinstance(alike, Alike)
    begun = begin(model, policies, PROMPTS, segments)
    assert begun is not None
    for policy in policies:
        assert_the_same(measured(policy, begun, segments=segments), measured(policy, segments=segments))


def test_a_beginning_ends_where_the_first_of_them_drops():
    model = tiny_llama()
    wide, narrow = (make_policy("sirllm", surprising=size) for size in (36, 16))
    turns = [[8, 12, 20]]
    for policies, stages in [([wide, wide], 3), ([wide, narrow], 2), ([narrow, narrow], 2)]:
        assert begin(model, policies, PROMPTS[:1], turns).stages == stages
    assert begin(model, [wide, narrow], PROMPTS[:1], [[30, 10]]).stages == 1
    assert begin(model, [narrow], PROMPTS[:1], [[8, 32]]).stages == 1
    kvzip, other = make_policy("kvzip", **KVZIP), make_policy("kvzip", **KVZIP | {"sinks": 2})
    assert needs_of(kvzip) != needs_of(other)  # their probes begin elsewhere
    assert begin(model, [kvzip, other], PROMPTS[:1], SEGMENTS["one"][:1]).stages == 1


@dataclass(frozen=True)
class Doubles(Policy):
    """Attends to other keys than the model's."""

    name: ClassVar[str] = "doubles"

    def on_append(self, kv, new):
        kv.write_keys(new.slots, 2 * new.keys)


def test_a_policy_that_changes_keys_as_they_come_is_found_out():
    with pytest.raises(ChangedKeys, match="policy doubles changes keys"):
        measured(Doubles(), recordings()[needs_of(Policy()).weights])
