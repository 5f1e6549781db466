"""Methods that evict reproduce the numbers of their authors' own code (tests/data/README.md)."""

import json
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvsieve
from kvsieve import KVCache, UserError, make_policy
from kvsieve.cache.rotary import Rotary
from kvsieve.loop import Runner
from kvsieve.testing import LayerCache, rollout

DATA = Path(__file__).parent / "data" / "evict"
TOLERANCE = 1e-5  # float32
STEPS = 6


class Case(NamedTuple):
    """One layer: prompts of ragged rows, right-padded, and N decode steps."""

    prompt_queries: torch.Tensor  # [B, H, P, D]
    step_queries: torch.Tensor  # [B, H, N, D]
    keys: torch.Tensor  # [B, K, P + N, D]
    values: torch.Tensor
    lengths: torch.Tensor  # [B]
    outputs: torch.Tensor  # [B, H, N, D]
    kept: torch.Tensor  # [B, K, P + N] bool: after the last step, by column

    def row(self, b: int) -> "Case":
        """Row b alone, without padding."""
        length, prompt = int(self.lengths[b]), self.prompt_queries.shape[2]
        tokens = [*range(length), *range(prompt, self.keys.shape[2])]
        queries, steps, keys, values, lengths, outputs, kept = (field[b : b + 1] for field in self)
        keys, values = keys[:, :, tokens], values[:, :, tokens]
        return Case(queries[:, :, :length], steps, keys, values, lengths, outputs, kept[..., tokens])

    def per_query_head(self) -> "Case":
        """The same with a KV head for every query head, as authors who repeat keys and values have it."""
        group = self.prompt_queries.shape[1] // self.keys.shape[1]
        keys, values = (tensor.repeat_interleave(group, 1) for tensor in (self.keys, self.values))
        return self._replace(keys=keys, values=values)


def read(method, case, source=None, layer=None):
    """A case with the results of `source` (None: the one that the method follows), and its parameters."""
    with np.load(DATA / f"{method}.npz") as file:
        given = {k.removeprefix(f"{case}/"): file[k] for k in file.files if k.startswith(f"{case}/")}
    prefix = f"{source}/" if source else ""
    results = [torch.from_numpy(given[prefix + name]) for name in ("outputs", "kept")]
    outputs, kept = results if layer is None else (result[layer] for result in results)
    lengths, params = torch.from_numpy(given["lengths"]), json.loads(str(given["params"]))
    inputs = []
    for name in Case._fields[:4]:
        stored = name if name in given else f"{name}_unrotated"
        plain = torch.from_numpy(given[stored]).float()
        inputs.append(plain if name in given else rotated(plain, name, lengths, params))
    return Case(*inputs, lengths, outputs, kept[:, :, -1]), params


def rotated(vectors, name, lengths, params):
    """Rotate as a model does: token i of a prompt at position i, step n of a row at `lengths + n`."""
    steps = torch.arange(STEPS)
    prompt = torch.arange(vectors.shape[2] - (STEPS if name == "keys" else 0)).expand(len(lengths), -1)
    later = lengths[:, None] + steps
    position = {"prompt_queries": prompt, "step_queries": later, "keys": torch.cat([prompt, later], 1)}[name]
    return Rotary.of_theta(params["rope_theta"], vectors.shape[3]).turned(vectors, position[:, None])


def check(policy, case, prefill_chunk=None, current_dropped=False, rope_theta=None, index=0, layers=1):
    """The outputs of all steps, and which tokens are held after the last one."""
    layer = LayerCache(policy.for_layer(index, layers), index=index)
    given = case.prompt_queries, case.step_queries, case.keys, case.values
    how = {"prefill_chunk": prefill_chunk, "rope_theta": rope_theta, "index": index, "layers": layers}
    got = rollout(policy, *given, case.lengths, layer=layer, **how)
    torch.testing.assert_close(got, case.outputs, atol=TOLERANCE, rtol=TOLERANCE)
    kv, prompt = layer.kv, case.prompt_queries.shape[2]
    for b in range(len(case.lengths)):
        padding = prompt - int(case.lengths[b])
        for head in range(kv.lengths.shape[1]):
            held = kv.positions[b, head][kv.live()[b, head]]
            columns = set((held + padding * (held >= case.lengths[b])).tolist())
            wanted = set(case.kept[b, head].nonzero().flatten().tolist())
            if current_dropped:  # the authors drop a token after the step, here the next one does
                assert wanted <= columns
                assert len(columns) <= len(wanted) + 1
            else:
                assert columns == wanted


WAYS = ["whole", "in pieces", "alone"]


def check_all_ways(way, policy, case, **given):
    if way == "whole":
        check(policy, case, **given)
    elif way == "in pieces":
        for chunk in (1, 7, 50):  # shorter than any window, and longer
            check(policy, case, prefill_chunk=chunk, **given)
    else:
        for b in range(len(case.lengths)):
            check(policy, case.row(b), **given)


def voting(name, params, **more):
    """SnapKV or one of its kin with the parameters of a case."""
    return make_policy(
        name,
        budget=params["capacity"],
        window=params["window"],
        kernel=params["kernel"],
        pooling=params["pooling"].removesuffix("pool"),
        **more,
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["mha", "gqa", "maxpool", "short"])
def test_snapkv(name, way):
    case, params = read("snapkv", name)
    check_all_ways(way, voting("snapkv", params), case)


@pytest.mark.parametrize("name", ["mha", "gqa", "maxpool", "short"])
def test_snapkv_as_its_authors_run_it_with_a_set_per_query_head(name):
    case, params = read("snapkv", name, "authors_query_head")
    check(voting("snapkv", params), case.per_query_head())


@pytest.mark.parametrize("name", ["mha", "gqa", "short"])
def test_snapkv_as_kvpress_has_it(name):
    case, params = read("snapkv", name, "kvpress")
    check(voting("snapkv", params), case)


PYRAMID_LAYERS = [("mha", 4), ("gqa", 3), ("mid", 3), ("short", 3)]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("name", "layer", "layers"),
    [(name, layer, layers) for name, layers in PYRAMID_LAYERS for layer in range(layers)],
)
def test_pyramidkv(name, layer, layers, way):
    case, params = read("pyramidkv", name, layer=layer)
    assert params["layers"] == layers
    policy = voting("pyramidkv", params, beta=params["beta"])
    check_all_ways(way, policy, case, index=layer, layers=layers)


@pytest.mark.parametrize("name", ["mha", "gqa", "mid", "short"])
def test_pyramidkv_with_a_set_per_query_head(name):
    case, params = read("pyramidkv", name, "factory_query_head", layer=1)
    policy = voting("pyramidkv", params, beta=params["beta"])
    check(policy, case.per_query_head(), index=1, layers=params["layers"])


def test_a_layer_of_several_is_taken_with_its_number():
    case, params = read("pyramidkv", "gqa", layer=2)
    policy = voting("pyramidkv", params, beta=params["beta"])
    given = policy, case.prompt_queries, case.step_queries, case.keys, case.values, case.lengths
    got = rollout(*given, index=2, layers=3)
    torch.testing.assert_close(got, case.outputs, atol=TOLERANCE, rtol=TOLERANCE)
    assert not torch.allclose(rollout(*given), got, atol=0.01)
    with pytest.raises(UserError, match="index must be a layer from 0 to layers - 1 = 2, not 3"):
        rollout(*given, index=3, layers=3)
    with pytest.raises(UserError, match=r"layer is not layer 1 of 3 .*policy.for_layer\(1, 3\), index=1"):
        rollout(*given, index=1, layers=3, layer=LayerCache(policy))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["mha", "gqa", "short"])
def test_tova(name, way):
    case, params = read("tova", name)
    policy = make_policy("tova", budget=params["cache_size"] + 1)  # theirs does not count the current token
    check_all_ways(way, policy, case, current_dropped=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["mha", "gqa", "short"])
def test_adakv(name, way):
    case, params = read("adakv", name)
    policy = voting("adakv", params, floor=params["floor_alpha"], normalize=params["normalize"])
    check_all_ways(way, policy, case)


@pytest.mark.parametrize("name", ["mha", "gqa", "short"])
def test_adakv_as_its_authors_run_it_with_a_set_per_query_head(name):
    case, params = read("adakv", name, "authors_query_head")
    check(voting("adakv", params, floor=params["floor_alpha"]), case.per_query_head())


def expecting(params):
    return make_policy(
        "expected_attention",
        budget=params["kept"],
        future=params["n_future_positions"],
        sinks=params["n_sink"],
        covariance=params["use_covariance"],
        value_norm=params["use_vnorm"],
        epsilon=params["epsilon"],
    )


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["mha", "gqa", "short"])
def test_expected_attention(name, way):
    case, params = read("expected_attention", name)
    check_all_ways(way, expecting(params), case, rope_theta=params["rope_theta"])


@pytest.mark.parametrize("prefill_chunk", [None, 1, 7, 50])
def test_expected_attention_in_a_model(prefill_chunk):
    with np.load(DATA / "expected_attention.npz") as file:
        given = {k.removeprefix("model/"): file[k] for k in file.files if k.startswith("model/")}
    weights = {k[2:]: torch.from_numpy(given[k]).float() for k in given if k.startswith("w/")}
    model = LlamaForCausalLM(LlamaConfig(**json.loads(str(given["config"]))))
    assert model.load_state_dict(weights, strict=False).missing_keys in ([], ["lm_head.weight"])
    model = kvsieve.prepare(model.eval())
    policy, prompt = expecting(json.loads(str(given["params"]))), given["prompt_ids"][0].tolist()
    tokens, logits = torch.from_numpy(given["tokens"]), torch.from_numpy(given["logits"])
    cache = KVCache(model, policy)
    runner = Runner(model, [prompt], policy, max_new_tokens=8, prefill_chunk=prefill_chunk, cache=cache)
    got = [runner.prefill()]
    for layer, kept in zip(cache.policy_layers, torch.from_numpy(given["kept"]), strict=True):
        for head in range(2):
            held = set(layer.kv.positions[0, head].tolist())
            assert held == set(kept[head].nonzero().flatten().tolist())
    got += [runner.run(tokens[i : i + 1], runner.sizes + i) for i in range(7)]
    torch.testing.assert_close(torch.cat(got), logits, atol=1e-4, rtol=1e-4)
    greedy = kvsieve.decode(model, [prompt], policy, max_new_tokens=8, eos_token_id=())
    assert torch.equal(torch.cat(list(greedy)), tokens)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["mha", "gqa", "short"])
def test_duo_attention(name, way):
    case, params = read("duo_attention", name)
    full = [head for head, score in enumerate(params["full_attention_heads"]) if score > 0.5]
    policy = make_policy("duo_attention", full_heads=[full], sinks=params["sink"], recent=params["recent"])
    check_all_ways(way, policy, case, current_dropped=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["mha", "gqa", "short"])
def test_streaming_llm(name, way):
    case, params = read("streaming_llm", name)
    policy = make_policy(
        "streaming_llm", budget=params["start"] + params["recent"] + 1, sinks=params["start"]
    )
    check_all_ways(way, policy, case, current_dropped=True, rope_theta=params["rope_theta"])


@pytest.mark.parametrize("name", ["mha", "gqa", "short"])
def test_local_window_is_streaming_llm_at_the_positions_of_the_text(name):
    case, params = read("streaming_llm", name, "slow_absolute_positions")
    policy = make_policy("local_window", budget=params["start"] + params["recent"] + 1, sinks=params["start"])
    check(policy, case, current_dropped=True)


@pytest.mark.parametrize("prefill_chunk", [None, 1, 2])
def test_sinks_may_come_in_the_prompt_or_in_steps(prefill_chunk):
    """Against the definition, slowly: held tokens at the positions of their places in the cache."""
    lengths, steps, sinks, budget, size = torch.tensor([1, 3, 9]), 14, 4, 6, 16
    random = torch.Generator().manual_seed(0)
    keys, values = (torch.randn(3, 2, 9 + steps, size, generator=random) for _ in range(2))
    queries = torch.randn(3, 2, steps, size, generator=random)
    rotary = Rotary.of_theta(1e4, size)
    wanted = torch.zeros(3, 2, steps, size)
    for b, length in enumerate(lengths.tolist()):
        columns = [*range(length), *range(9, 9 + steps)]
        for step in range(steps):
            seen = columns[: length + step + 1]
            held = seen if len(seen) <= budget else seen[:sinks] + seen[sinks - budget :]
            places = torch.arange(len(held))
            query = rotary.turned(queries[b, :, step : step + 1], places[-1:])
            logits = query @ rotary.turned(keys[b, :, held], places).mT / size**0.5
            wanted[b, :, step] = (logits.softmax(-1) @ values[b, :, held])[:, 0]
    text = torch.cat([torch.arange(9).expand(3, -1), lengths[:, None] + torch.arange(steps)], 1)[:, None]
    given = rotary.turned(queries, text[..., 9:]), rotary.turned(keys, text), values, lengths
    policy = make_policy("streaming_llm", budget=budget, sinks=sinks)
    got = rollout(policy, torch.zeros(3, 2, 9, size), *given, prefill_chunk=prefill_chunk, rope_theta=1e4)
    torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=TOLERANCE)
