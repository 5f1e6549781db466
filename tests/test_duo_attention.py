"""DuoAttention: streaming heads hold sinks and recent tokens only; which heads retrieve is measured."""

import pytest
import torch
from safetensors.torch import save_file

import kvsieve
from kvsieve import KVCache, Policy, UserError, calibration, make_policy, ops
from kvsieve.fingerprint import fingerprint, same
from kvsieve.testing import Inputs, LayerCache, rollout
from tests.models import random_prompts, tiny_llama

HEADS = [[1], []]  # of a model of two layers of two KV heads: three of four stream
POLICY = make_policy("duo_attention", full_heads=HEADS, sinks=2, recent=9)


def rooms(cache):
    """By layer, the slots of each row and head for which there is storage."""
    found = []
    for layer in cache.policy_layers:
        slots = layer.slots
        uniform = [[slots.capacity] * 2] * len(slots.lengths)
        found.append(uniform if slots.packing is None else slots.packing.rooms)
    return found


def test_streaming_heads_have_room_for_their_window_and_full_heads_for_all():
    cache = KVCache(tiny_llama(), POLICY, capacity=80)
    said = kvsieve.decode(tiny_llama(), random_prompts(60, 41), cache=cache, max_new_tokens=20)
    next(said)
    assert [layer.kv.lengths.tolist() for layer in cache.policy_layers] == [
        [[11, 60], [11, 41]],
        [[11, 11], [11, 11]],
    ]
    list(said)
    assert rooms(cache) == [[[12, 80], [12, 61]], [[12, 12], [12, 12]]]
    per_slot = 2 * 8 * 4
    assert cache.memory() == per_slot * (12 * 6 + 80 + 61)
    assert cache.memory_by_row([80, 61]) == [per_slot * (12 * 3 + 80), per_slot * (12 * 3 + 61)]


@pytest.mark.parametrize("implementation", ["cpu", "reference"])
def test_decoding_is_as_if_every_head_were_masked(implementation):
    """Against attention over all tokens, slot by slot, of each head alone; through several turns."""
    given, full = Inputs.random((40, 25, 3), steps=30), torch.tensor([True, False])
    with ops.use(implementation):
        got = rollout(make_policy("duo_attention", full_heads=[[0]], sinks=3, recent=5), *given)
    tokens = torch.arange(70)
    for b, length in enumerate(given.lengths.tolist()):
        real = (tokens < length) | (tokens >= 40)
        place = torch.where(tokens < 40, tokens, tokens - 40 + length)
        for step in range(30):
            seen = real & (tokens <= 40 + step)
            near = (place < 3) | (place > length + step - 6)
            for head in range(4):
                read = seen & (near | full[head // 2])
                logits = given.keys[b, head // 2, read] @ given.step_queries[b, head, step] / 4
                wanted = logits.softmax(0) @ given.values[b, head // 2, read]
                torch.testing.assert_close(got[b, head, step], wanted, atol=1e-5, rtol=1e-5)


def test_steps_of_constant_shape_beams_and_later_turns_work():
    model, first = tiny_llama(), torch.tensor(random_prompts(40, 40))
    how = {"do_sample": False, "eos_token_id": None}
    model.generate(first, past_key_values=KVCache(model, POLICY), max_new_tokens=6, num_beams=2, **how)
    cache = KVCache(model, POLICY)
    said = model.generate(first, past_key_values=cache, max_new_tokens=15, **how)
    more = torch.cat([said, torch.tensor(random_prompts(7, 7, seed=2))], 1)
    model.generate(more, past_key_values=cache, max_new_tokens=15, **how)
    assert [layer.kv.lengths.tolist() for layer in cache.policy_layers] == [[[12, 76]] * 2, [[12, 12]] * 2]
    held = cache.policy_layers[1].kv.positions[0, 0].sort().values.tolist()
    assert held == [0, 1, *range(66, 76)]


def test_all_heads_alike_is_dense_or_a_window():
    given = Inputs.random()
    dense = rollout(make_policy("duo_attention", full_heads=[[0, 1]], sinks=1, recent=2), *given)
    assert torch.equal(dense, rollout(Policy(), *given))
    policy = make_policy("duo_attention", full_heads=[[]], sinks=2, recent=9)
    layer = LayerCache(policy)
    window = rollout(policy, *given, layer=layer)
    assert layer.slots.packing is None
    same_window = rollout(make_policy("local_window", sinks=2, budget=12), *given)
    torch.testing.assert_close(window, same_window, atol=1e-5, rtol=1e-5)


def scored(tmp_path, **given):
    path = tmp_path / "heads.safetensors"
    scores = {
        "layers.0.retrieval": torch.tensor([[0.2], [0.9]]),
        "layers.1.retrieval": torch.tensor([[0.6], [0]]),
    }
    save_file(scores, path, given.pop("metadata", None))
    return make_policy("duo_attention", full_heads=str(path), **given)


@pytest.mark.parametrize(
    ("given", "full"),
    [
        ({}, [[False, True], [True, False]]),
        ({"threshold": 0.6}, [[False, True], [False, False]]),
        ({"share": 0.75}, [[True, True], [True, False]]),
        ({"share": 0.0}, [[False, False], [False, False]]),
        ({"share": 1.0}, [[True, True], [True, True]]),
    ],
)
def test_the_heads_that_score_highest_are_full(tmp_path, given, full):
    policy = scored(tmp_path, **given)
    assert [policy._full(layer, range(2)) for layer in (0, 1)] == full
    assert policy._full(0, range(1, 2)) == full[0][1:]  # of a process that has the second head
    tokens = list(kvsieve.decode(tiny_llama(), random_prompts(9), policy, max_new_tokens=3))
    assert len(tokens) == 3


def test_a_compression_chooses_window_and_share():
    policy = kvsieve.plugins.policy_class("duo_attention").for_compression(1 / 4, 64, 1024)
    assert (policy.sinks, policy.recent, policy.share) == (8, 23, pytest.approx(7 / 31, abs=1e-5))
    window = policy.sinks + policy.recent + 1
    assert policy.share * 1024 + (1 - policy.share) * window == pytest.approx(256, rel=1e-4)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"full_heads": [[0]], "sinks": -1}, "sinks must be at least 0 tokens, not -1"),
        ({"full_heads": [[0]], "recent": 0}, "recent must be at least 1 tokens, not 0"),
        (
            {"full_heads": [[0, 0]]},
            r"full_heads of layer 0 must be KV heads from 0 on, each once, not \[0, 0\]",
        ),
        ({"full_heads": [[0], [-1]]}, "full_heads of layer 1 must be KV heads"),
        ({"full_heads": [[0]], "share": 0.5}, "chooses among the scores of a file, and full_heads is a list"),
        ({"full_heads": "a", "share": 1.5}, "share must be from 0 to 1, not 1.5"),
    ],
)
def test_parameters_that_cannot_be_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        make_policy("duo_attention", **given)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([[0]], "full_heads is for 1 layers, and this model has 2"),
        ([[0], [2]], r"full_heads of layer 1 are \[2\], and this model's KV heads are 0 to 1"),
        ("", "full_heads is needed: the KV heads of each layer"),
        ("none.safetensors", "there is no calibration file none.safetensors"),
    ],
)
def test_heads_of_another_model_are_refused_before_any_work(heads, message):
    with pytest.raises(UserError, match=message):
        KVCache(tiny_llama(), make_policy("duo_attention", full_heads=heads))


def test_a_file_of_scores_for_other_layers_is_refused_when_the_cache_is_made(tmp_path):
    path = tmp_path / "heads.safetensors"
    save_file({"layers.0.retrieval": torch.tensor([[0.2], [0.9]])}, path)
    with pytest.raises(UserError, match="heads.safetensors has no layers.1.retrieval"):
        KVCache(tiny_llama(), make_policy("duo_attention", full_heads=str(path)))


def test_a_file_of_scores_for_another_model_is_refused_by_name(tmp_path):
    model = tiny_llama()
    metadata = {"model": "their-model", "digest": fingerprint(model)}
    policy = scored(tmp_path, metadata=metadata)
    KVCache(model, policy)
    with pytest.raises(UserError, match="heads.safetensors was made for their-model, whose configuration"):
        KVCache(tiny_llama(seed=1), policy)
    assert policy.files() == {"full_heads": str(tmp_path / "heads.safetensors")}
    assert POLICY.files() == {}


def test_scores_are_the_attention_to_where_a_passage_stood_first():
    model, text = tiny_llama(), random_prompts(48, seed=3)[0]
    ids = calibration.repeating(text)
    assert ids == text[:42] + text[16:22]
    seen = []
    scores = calibration.measure_retrieval(model, [text], seen.append)
    assert seen == [1]
    model.set_attn_implementation("eager")
    try:
        weights = model(torch.tensor([ids]), output_attentions=True).attentions
    finally:
        model.set_attn_implementation("kvsieve")
    for layer, found in enumerate(weights):
        share = found[0, :, 42:, 16:22].sum(2).mean(1)
        wanted = share.view(2, 2).amax(1, keepdim=True)
        torch.testing.assert_close(scores[f"layers.{layer}.retrieval"], wanted)


def test_the_heads_of_the_model_that_ships_retrieve_in_one_layer():
    model = kvsieve.load("reference")
    policy = make_policy("duo_attention", full_heads="reference", sinks=4, recent=27)
    (path,) = policy.files().values()
    found = calibration.read(path)
    assert same(found.metadata["digest"], fingerprint(model)), (
        "python -m kvsieve.reference_model.calibrations"
    )
    assert [policy._full(layer, range(2)) for layer in range(4)] == [[layer == 1] * 2 for layer in range(4)]
    cache = KVCache(model, policy)
    list(kvsieve.decode(model, ["one two three " * 30], cache=cache, max_new_tokens=4))
    assert rooms(cache)[0] == [[32, 32]]
    assert int(cache.policy_layers[1].kv.lengths.min()) > 300
