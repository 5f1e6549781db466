"""The rotary embedding of every family is measured right, or a policy that needs one is refused."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

import kvsieve
from kvsieve import KVCache, UserError, make_policy
from kvsieve.cache.layer import LayerCache

from .zoo import FAMILIES

POLICY = make_policy("expected_attention", budget=9, sinks=1, future=8)
WITHOUT = {"opt", "gpt2"}
INTERLEAVED = {"cohere2", "glm4", "llama4"}
PARTS = {"gpt_neox": 2, "phi": 2, "stablelm": 1, "glm4": 2, "qwen3_next": 1}  # pairs, of 4


def keys_at(model, first):
    """Of each layer, the keys of one token at this position."""
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    token, position = torch.tensor([[7]]), torch.tensor([[first]])
    with torch.no_grad():
        model(token, position_ids=position, past_key_values=cache, use_cache=True)
    return cache.layers


@pytest.mark.parametrize(
    "family", [each for each in FAMILIES if not each.in_windows], ids=lambda family: family.name
)
def test_keys_turn_as_the_model_turns_them(family):
    model = kvsieve.prepare(family.build())
    if family.name in WITHOUT:
        with pytest.raises(UserError, match="expected_attention turns queries or keys.*has none in layer 0"):
            KVCache(model, POLICY)
        return
    here, there = keys_at(model, 11), keys_at(model, 48)
    for layer in KVCache(model, POLICY).policy_layers:
        i = layer.index
        turned = layer.kv.turned(here[i].keys, torch.tensor(37))
        torch.testing.assert_close(turned, there[i].keys, atol=1e-3, rtol=1e-3)
        back = layer.kv.turned(turned, torch.tensor(-37))
        torch.testing.assert_close(back, here[i].keys, atol=1e-3, rtol=1e-3)
        rotary = layer.kv._rotary
        if rotary.frequencies.any():
            assert rotary.interleaved == (family.name in INTERLEAVED)
            assert len(rotary.frequencies) == PARTS.get(family.name, 4)


def test_frequencies_that_change_with_the_length_are_refused():
    config = LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
    )
    with pytest.raises(UserError, match="frequencies that change with the length"):
        KVCache(kvsieve.prepare(LlamaForCausalLM(config)), POLICY)


def test_turning_needs_the_declaration():
    layer = LayerCache(make_policy("dense"))
    with pytest.raises(UserError, match=r"kv.turned is for .* `positions = Positions.OWN`"):
        layer.kv.turned(torch.zeros(4), torch.tensor(1))
