"""Methods that read a prompt by a plan reproduce their authors' numbers (tests/data/README.md)."""

import dataclasses
import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

import kvsieve
from kvsieve import KVCache, UserError, make_policy
from kvsieve.loop import Runner

DATA = Path(__file__).parent / "data"
TOLERANCE = {"atol": 1e-4, "rtol": 1e-4}


def model_of(config, weights):
    model = LlamaForCausalLM(LlamaConfig(**json.loads(config)))
    state = {name[2:]: torch.as_tensor(w).float() for name, w in weights.items() if name.startswith("w/")}
    assert model.load_state_dict(state, strict=False).missing_keys in ([], ["lm_head.weight"])
    return kvsieve.prepare(model.eval())


def steps_of(runner, tokens):
    """The logits of the first new token, and of those after each of `tokens [B, N]` but the last."""
    logits = [runner.prefill()]
    logits += [runner.run(tokens[:, i], runner.sizes + i) for i in range(tokens.shape[1] - 1)]
    return torch.stack(logits, 1)


def held(cache, row=0):
    """The tokens that each layer and head holds of one row."""
    return [
        [
            kv.positions[row, head][: int(kv.lengths[row, head])].tolist()
            for head in range(kv.lengths.shape[1])
        ]
        for kv in (layer.kv for layer in cache.policy_layers)
    ]


# -------------------------------------------------------------------- KVzip
@functools.cache
def zipped(case):
    with np.load(DATA / "evict" / "kvzip.npz") as file:
        given = {k.removeprefix(f"{case}/"): file[k] for k in file.files if k.startswith(f"{case}/")}
    params = json.loads(str(given["params"]))
    probes = [given[f"probe_ids/{i}"][0].tolist() for i in range(3) if f"probe_ids/{i}" in given]
    prompt = given["prompt_ids"][0].tolist()
    # Their request, up to the repetition; with a reply's beginning of two tokens in the case of several.
    chunk, answer = params["chunk"], 2 if case == "mha" else 0
    repeat = probes[0][: len(probes[0]) - min(chunk, len(prompt) - 4)]
    words = {"repeat": repeat[: len(repeat) - answer], "answer": repeat[len(repeat) - answer :]}
    if len(probes) > 1:
        words["go_on"] = probes[1][: len(probes[1]) - chunk - answer - params["prev_postfix"]]
    policy = make_policy(
        "kvzip",
        ratio=params["ratio"],
        chunk=chunk,
        overlap=params["prev_postfix"],
        sinks=int(given["system_prompt_tokens"]),
        **words,
    )
    return model_of(str(given["config"]), given), policy, prompt, given["query_ids"][0].tolist(), given


def wanted_of(given):
    kept = [[np.flatnonzero(head).tolist() for head in layer] for layer in given["kept"]]
    return kept, torch.from_numpy(given["tokens"]), torch.from_numpy(given["logits"])


@pytest.mark.parametrize("prefill_chunk", [None, 7])
@pytest.mark.parametrize("case", ["mha", "gqa"])
def test_kvzip(case, prefill_chunk):
    model, policy, context, question, given = zipped(case)
    kept, tokens, logits = wanted_of(given)
    cache = KVCache(model, policy)
    kvsieve.read(model, [context], cache, leave=0, prefill_chunk=prefill_chunk)
    assert held(cache) == kept
    for _ in range(2):  # the cut cache answers again and again
        runner = Runner(model, [question], None, 8, prefill_chunk, cache.clone())
        torch.testing.assert_close(steps_of(runner, tokens[None])[0], logits, **TOLERANCE)
    segments = [[len(context), len(question)]]
    given = {"max_new_tokens": 8, "eos_token_id": (), "prefill_chunk": prefill_chunk, "segments": segments}
    assert torch.equal(torch.cat(list(kvsieve.decode(model, [context + question], policy, **given))), tokens)


@pytest.mark.parametrize("case", ["mha", "gqa"])
def test_kvzip_scores(case):
    model, policy, context, _, given = zipped(case)
    seen = []

    class Watched(type(policy)):
        def cut_together(self, layers):
            seen.extend(kv.notes["score"][0, :, policy.sinks : len(context)].clone() for kv in layers)
            return super().cut_together(layers)

    watched = Watched(**{field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)})
    kvsieve.read(model, [context], KVCache(model, watched), leave=0)
    torch.testing.assert_close(torch.stack(seen), torch.from_numpy(given["scores"]), **TOLERANCE)


@pytest.mark.parametrize("prefill_chunk", [None, 7])
def test_kvzip_in_a_ragged_batch(prefill_chunk):
    """Beside rows with fewer chunks, and one that is too short for any."""
    model, policy, context, question, given = zipped("mha")
    kept, _, logits = wanted_of(given)
    rows = [context + question, context[:31] + question, context[5:7] + question]
    segments = [[len(context), 4], [31, 4], [2, 4]]
    cache = KVCache(model, policy)
    runner = Runner(model, rows, None, 8, prefill_chunk, cache, segments)
    got = runner.prefill()
    torch.testing.assert_close(got[0], logits[0], **TOLERANCE)
    read = [[[t for t in head if t < len(context)] for head in layer] for layer in held(cache)]
    assert read == kept
    for b in (1, 2):
        alone = Runner(model, [rows[b]], policy, 8, segments=[segments[b]])
        torch.testing.assert_close(got[b], alone.prefill()[0], **TOLERANCE)
        assert held(cache, b) == held(alone.cache)


def test_kvzip_by_a_budget():
    model, policy, context, _, _ = zipped("gqa")
    cache = KVCache(model, make_policy("kvzip", budget=20, chunk=30, repeat=policy.repeat, go_on=[1, 2]))
    kvsieve.read(model, [context], cache, leave=0)
    assert sum(len(head) for layer in held(cache) for head in layer) == 20 * 2 * 2


# -------------------------------------------------------------------- CItruS
@functools.cache
def citrus_data():
    with safe_open(DATA / "citrus.safetensors", "pt") as file:
        given = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    return model_of(metadata["config"], given), json.loads(metadata["methods"]), given


def instructed(score, rows):
    """A policy with the oracle's parameters; prompts and segments of these rows; all data by name."""
    model, params, given = citrus_data()
    policy = make_policy("citrus", kept=params["k"], chunk=params["chunk_size"], score=score)
    texts = [(given[f"row{b}/context"].tolist(), given[f"row{b}/instruction"].tolist()) for b in rows]
    prompts, segments = [c + i for c, i in texts], [[len(c), len(i)] for c, i in texts]
    return model, policy, prompts, segments, given


METHODS = [("instruction", "instruction_aware_single"), ("chunk", "standard")]


@pytest.mark.parametrize("prefill_chunk", [None, 5])
@pytest.mark.parametrize("rows", [(0,), (1,), (2,), (0, 1, 2)], ids=str)
@pytest.mark.parametrize(("score", "method"), METHODS)
def test_citrus(score, method, rows, prefill_chunk):
    model, policy, prompts, segments, given = instructed(score, rows)
    cache = KVCache(model, policy)
    runner = Runner(model, prompts, None, 12, prefill_chunk, cache, segments)
    tokens = torch.stack([given[f"{method}/row{b}/tokens"] for b in rows])
    logits = steps_of(runner, tokens)
    for place, b in enumerate(rows):
        torch.testing.assert_close(logits[place], given[f"{method}/row{b}/logits"], **TOLERANCE)
        events = [name for name in given if name.startswith(f"{method}/row{b}/kept")]
        for layer, kept in zip(held(cache, place), given[max(events)].tolist(), strict=True):
            for head in layer:
                assert [token for token in head if token < segments[place][0]] == kept


@pytest.mark.parametrize(("score", "method"), METHODS)
def test_citrus_decodes_and_generates(score, method):
    model, policy, prompts, segments, given = instructed(score, (0, 1, 2))
    tokens = torch.stack([given[f"{method}/row{b}/tokens"] for b in range(3)])
    how = {"max_new_tokens": 12, "eos_token_id": ()}
    got = torch.stack(list(kvsieve.decode(model, prompts, policy, segments=segments, **how)), 1)
    assert torch.equal(got, tokens)
    by_length = dataclasses.replace(policy, instruction=7)
    assert torch.equal(torch.cat(list(kvsieve.decode(model, prompts[:1], by_length, **how))), tokens[0])
    cache, ids = KVCache(model, policy), torch.tensor(prompts[:1])
    kvsieve.read(model, prompts[:1], cache, segments=segments[:1])
    got = model.generate(
        ids, past_key_values=cache, max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert torch.equal(got[0, ids.shape[1] :], tokens[0])


def test_citrus_reads_a_text_that_is_longer_than_the_model_has_positions():
    model, policy, prompts, segments, given = instructed("instruction", (0,))
    tokens, positions = given["instruction_aware_single/row0/tokens"], model.config.max_position_embeddings
    model.config.max_position_embeddings = 24 + 2 * 16 + 12
    try:
        how = {"max_new_tokens": 12, "eos_token_id": (), "segments": segments}
        assert torch.equal(torch.cat(list(kvsieve.decode(model, prompts, policy, **how))), tokens)
        with pytest.raises(UserError, match="holds up to 82 tokens at once"):
            kvsieve.decode(model, prompts, dataclasses.replace(policy, kept=50), **how)
    finally:
        model.config.max_position_embeddings = positions


def test_citrus_never_holds_more_than_it_says():
    """While it reads: `kept` tokens and two chunks, or one chunk and the instruction."""
    model, policy, prompts, segments, _ = instructed("instruction", (0,))
    most = []

    class Watched(type(policy)):
        def on_append(self, kv, new):
            most.append(int(kv.lengths.max()))
            super().on_append(kv, new)

    watched = Watched(**{field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)})
    cache = KVCache(model, watched, capacity=24 + 2 * 16 + 12)
    Runner(model, prompts, None, 12, cache=cache, segments=segments).prefill()
    assert max(most) == 24 + 2 * 16
    assert max(layer.slots.capacity for layer in cache.policy_layers) <= 24 + 2 * 16 + 12
