"""InfLLM: its step is the authors', and what it reads is what its docstring says (tests/data/README.md)."""

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import kvsieve
from kvsieve import KVCache, UserError, make_policy, transfer
from kvsieve.attention import decode_step, prefill
from kvsieve.cache.rotary import Rotary
from kvsieve.testing import Inputs, LayerCache, rollout, strict
from kvsieve.testing.spy import Spy
from kvsieve_policies.infllm import InfLLM
from tests.families.zoo import FAMILIES

ROTARY = Rotary.of_theta(10_000.0, 32)


def case_of(name):
    """Parameters, policy, arrays; queries and keys rotated at the positions of the text."""
    with safe_open(Path(__file__).parent / "data/infllm.safetensors", "pt") as file:
        params = json.loads(file.metadata()["methods"])["cases"][name]
        keys = [key for key in file.keys() if key.startswith(name)]  # noqa: SIM118 (it is no dict)
        arrays = {key.removeprefix(f"{name}/"): file.get_tensor(key) for key in keys}
    parameters = {
        "window": params["n_local"],
        "sinks": params["n_init"],
        "blocks": params["topk"],
        "block": params["block_size"],
        "representatives": params["repr_topk"],
    }
    for what in ("query", "keys"):
        arrays[what] = ROTARY.turned(arrays[what], torch.arange(arrays[what].shape[2]))
    return params, parameters, arrays | {"values": arrays["values"].float()}


def chosen_blocks(selection, params):
    """By row: the blocks among the far slots; none is read in part."""
    sinks, block = params["n_init"], params["block_size"]
    for b in range(len(selection.slots)):
        far = selection.far.slots[b, 0, : int(selection.far.counts[b, 0])].tolist()
        complete = max(0, (int(selection.slots[b, 0, 0]) - 1 - sinks) // block)
        found = [n for n in range(complete) if sinks + n * block in far]
        rest = range(sinks + complete * block, int(selection.slots[b, 0, 0]))
        tokens = [token for n in found for token in range(sinks + n * block, sinks + (n + 1) * block)]
        assert far == sorted([*range(min(sinks, rest.stop)), *tokens, *rest])
        yield found


def test_a_text_read_step_by_step_is_the_authors():
    """The first `window` tokens as a prompt, all others as steps: blocks, representatives and outputs."""
    params, parameters, given = case_of("one_query_blocks")
    window, spy = params["n_local"], Spy(make_policy("infllm", **parameters))
    layer = LayerCache(spy)
    with strict():
        got = rollout(
            spy,
            given["query"][:, :, :window],
            given["query"][:, :, window:],
            given["keys"],
            given["values"],
            rope_theta=10_000.0,
            layer=layer,
        )
    torch.testing.assert_close(got, given["authors/outputs"][:, :, window:], atol=1e-4, rtol=1e-4)
    for token, selection in enumerate(spy.notes.selections, window):
        wanted = [n for n in given["authors/blocks"][token, 0].tolist() if n >= 0]
        assert [*chosen_blocks(selection, params)] == [wanted]
    means = given["authors/representatives"].unflatten(2, (2, 2 * 32)).transpose(1, 2)
    torch.testing.assert_close(layer.kv["representatives"][:, :, : means.shape[2]], means)


@dataclass(frozen=True)
class Given(InfLLM):
    """Finds the representatives of a prompt that was read in pieces of several queries."""

    means: tuple[torch.Tensor, ...] = ()

    def on_append(self, kv, new):
        super().on_append(kv, new)
        many = self.means[0].shape[2]
        kv["representatives"][:, :, :many] = self.means[0]


def test_steps_after_the_papers_prompt_are_the_definitions():
    params, parameters, given = case_of("gqa")
    means = given["paper/representatives"].unflatten(2, (2, 2 * 32)).transpose(1, 2)
    spy, prompt = Spy(Given(**parameters, means=(means,))), params["T"]
    query, keys = given["query"], given["keys"]
    rows = query[:, :, :prompt], query[:, :, prompt:], keys, given["values"]
    got = rollout(spy, *rows, rope_theta=10_000.0)
    torch.testing.assert_close(got, given["paper/outputs"][:, :, prompt:], atol=1e-4, rtol=1e-4)
    for blocks, selection in zip(
        given["paper/blocks"][-params["steps"] :], spy.notes.selections, strict=True
    ):
        assert [*chosen_blocks(selection, params)] == [sorted(row) for row in blocks.tolist()]


# -------------------------------------------------------------------- prompts
SMALL = make_policy("infllm", window=9, sinks=2, blocks=2, block=4, representatives=2)


def test_a_later_turn_finds_the_keys_at_their_places_and_leaves_them_turned():
    inputs, outputs, layers = Inputs.random((40, 15), steps=2), [], []
    length = inputs.keys.shape[2]
    new = Inputs.random((30, 30), steps=0, seed=5)
    for policy in (SMALL, kvsieve.Policy()):
        layer = LayerCache(policy)
        rollout(policy, *inputs, rope_theta=10_000.0, layer=layer)
        layer.update(new.keys, new.values)
        valid = torch.arange(30) < torch.tensor([30, 3])[:, None]
        outputs.append(prefill(layer, new.prefill_queries.unflatten(1, (2, 2)), valid))
        layers.append(layer.kv)
    torch.testing.assert_close(*outputs)
    mine, dense = layers
    rotary = Rotary.of_theta(10_000.0, 16)
    for b, tokens in enumerate((length + 30, 15 + 2 + 3)):
        slots = torch.arange(tokens)
        by = torch.where(slots < tokens - 9, -slots, 0)
        torch.testing.assert_close(mine.keys[b, :, :tokens], rotary.turned(dense.keys[b, :, :tokens], by))
        assert mine["turned"][b].tolist() == [tokens - 9] * 2


# -------------------------------------------------------------------- bytes
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("length", [*range(25, 30), 60])
def test_a_step_moves_what_the_formula_says(dtype, length):
    """N G D e for the representatives of N pages, 2 (window + sinks + blocks + rest) D e for tokens; for what
    they stand on, 4 G a token near, D e for the key that leaves, and D e + 4 G a token of a new block.
    """
    inputs, layer = Inputs.random((length - 1,), steps=2), LayerCache(SMALL)
    inputs = Inputs(*(x.to(dtype) if x.is_floating_point() else x for x in inputs))
    before = inputs._replace(
        step_queries=inputs.step_queries[:, :, :1],
        keys=inputs.keys[:, :, :length],
        values=inputs.values[:, :, :length],
    )
    rollout(SMALL, *before, rope_theta=10_000.0, layer=layer)
    layer.update(inputs.keys[:, :, length:], inputs.values[:, :, length:])
    with transfer.measure() as meter:
        decode_step(layer, inputs.step_queries[:, :, 1].unflatten(1, (2, 2)))
    tokens, key, group = length + 1, 16 * dtype.itemsize, 2
    outside = tokens - 9
    complete = (outside - 1 - 2) // 4
    rest, due = outside - 2 - 4 * complete, (outside - 2) % 4 == 0
    assert complete >= 2
    far = 2 + 2 * 4 + rest
    side = 9 * 4 * group + key + due * 4 * (key + 4 * group)
    assert meter.read == 2 * (-(-tokens // 4) * group * key + 2 * (9 + far) * key + side)
    assert meter.by_kind["values"] == 2 * (9 + far) * key
    assert meter.written == 2 * (2 * key + key + 9 * 4 * group + due * group * key + 8)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window": 0}, "infllm.window must be at least 1, not 0"),
        ({"blocks": 0}, "infllm.blocks must be at least 1, not 0"),
        ({"block": 0}, "infllm.block must be at least 1, not 0"),
        ({"sinks": -1}, "infllm.sinks must be at least 0, not -1"),
        ({"representatives": 0}, "infllm.representatives must be at least 1, not 0"),
        ({"representatives": 9, "block": 8}, "must be at most the 8 tokens of a block, not 9"),
    ],
)
def test_infllm_refuses_what_it_cannot_do(wrong, message):
    with pytest.raises(UserError, match=message):
        make_policy("infllm", **wrong)


def test_a_model_without_rotary_embeddings_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=50, n_positions=128)
    with pytest.raises(UserError, match="policy infllm turns queries or keys"):
        KVCache(kvsieve.prepare(GPT2LMHeadModel(config)), SMALL)


def test_a_model_whose_layers_borrow_keys_is_refused():
    family = next(family for family in FAMILIES if family.name == "gemma3n")
    with pytest.raises(UserError, match="has layers that borrow the keys of others"):
        KVCache(kvsieve.prepare(family.build()), SMALL)


@pytest.mark.parametrize("wrapper", ["refresh", "twilight"])
def test_what_reads_by_one_query_cannot_wrap_it(wrapper):
    with pytest.raises(UserError, match=f"{wrapper}.inner is infllm, which turns queries or keys"):
        make_policy(wrapper, inner="infllm")
