"""Positions within the cache: what is kept stands at its place among the kept."""

import dataclasses
import functools

import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

import kvsieve
from kvsieve import KVCache, Policy, Positions, UserError, make_policy
from kvsieve.cache.rotary import Rotary
from kvsieve.testing import LAWS

from .models import random_prompts, tiny_llama

NEW = 5


@dataclasses.dataclass(frozen=True)
class EverySecond(Policy):
    """Keeps every second token of a prompt and its last one, at their places in the cache."""

    name = "every_second"
    positions = Positions.CACHE

    def cut(self, kv):
        return kv.live() & ((kv.positions % 2 == 0) | kv.newest(1))


@dataclasses.dataclass(frozen=True)
class EverySecondOfTheText(EverySecond):
    name = "every_second_of_the_text"
    positions = Positions.TEXT


@dataclasses.dataclass(frozen=True)
class Everything(Policy):
    name = "everything"
    positions = Positions.CACHE


@functools.cache
def one_layer():
    """In one layer keys and values tell of their own token only: what is dropped leaves nothing behind."""
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=61, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3,
        bos_token_id=None, eos_token_id=None, **small,
    )  # fmt: skip
    return kvsieve.prepare(LlamaForCausalLM(config))


def kept(tokens):
    return [token for i, token in enumerate(tokens) if i % 2 == 0 or i == len(tokens) - 1]


def wanted(prompt, first):
    """The tokens after `first` of a dense decode of what is kept of the prompt."""
    made = kvsieve.decode(one_layer(), [[*kept(prompt), first]], max_new_tokens=NEW - 1)
    return [int(token) for token in made]


@pytest.mark.parametrize("chunk", [None, 1, 7])
def test_decode_goes_on_as_if_the_dropped_tokens_had_never_been(chunk):
    prompts = random_prompts(24, 17, 3)
    made = kvsieve.decode(one_layer(), prompts, EverySecond(), max_new_tokens=NEW, prefill_chunk=chunk)
    rows = torch.stack(list(made), 1).tolist()
    for prompt, (first, *rest) in zip(prompts, rows, strict=True):
        assert rest == wanted(prompt, first)


def test_at_the_positions_of_the_text_it_goes_on_otherwise():
    prompts = random_prompts(24)
    (made,) = torch.stack(
        list(kvsieve.decode(one_layer(), prompts, EverySecondOfTheText(), max_new_tokens=NEW)), 1
    )
    assert made.tolist()[1:] != wanted(prompts[0], int(made[0]))


def test_generate_goes_on_so_too():
    model, prompts = one_layer(), random_prompts(24, 24)
    made = generated(model, prompts, EverySecond())
    for prompt, (first, *rest) in zip(prompts, made, strict=True):
        assert rest == wanted(prompt, first)


def test_beams_keep_their_places():
    model, prompts = one_layer(), random_prompts(24, 24)
    found = generated(model, prompts, EverySecond(), num_beams=3)
    for prompt, (first, *rest) in zip(prompts, found, strict=True):
        # Dense search among continuations of what is kept, after the same first token: no better one there.
        dense = generated(model, [[*kept(prompt), first]], Policy(), new=NEW - 1, num_beams=3)
        assert rest == dense[0]


def generated(model, prompts, policy, new=NEW, **how):
    ids, cache = torch.tensor(prompts), KVCache(model, policy)
    how |= {"max_new_tokens": new, "do_sample": False, "attention_mask": torch.ones_like(ids)}
    return model.generate(ids, past_key_values=cache, **how)[:, ids.shape[1] :].tolist()


def test_a_plain_forward_does_so_turn_after_turn():
    model, (one, two, three) = one_layer(), random_prompts(12, 9, 1)
    cache = KVCache(model, EverySecond())
    for tokens in (one, two):
        model(torch.tensor([tokens]), past_key_values=cache)
    # The second turn's tokens are numbers 12 to 20 of the text, and every second token is kept again.
    numbers = [*(i for i in range(12) if i % 2 == 0), *range(12, 21)]
    assert [i for i in numbers if i % 2 == 0 or i == 20] == cache.policy_layers[0].kv.positions[0, 0].tolist()
    held = [(one + two)[i] for i in cache.policy_layers[0].kv.positions[0, 0].tolist()]
    got = model(torch.tensor([three]), past_key_values=cache).logits[0, -1]
    torch.testing.assert_close(got, model(torch.tensor([held + three])).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_where_nothing_is_dropped_it_is_dense():
    prompts = random_prompts(24, 17)
    made = list(kvsieve.decode(tiny_llama(), prompts, Everything(), max_new_tokens=NEW))
    dense = list(kvsieve.decode(tiny_llama(), prompts, max_new_tokens=NEW))
    assert torch.equal(torch.stack(made), torch.stack(dense))


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_laws_hold(law):
    if "spec" not in law.__name__:  # these are no registered policies
        law(tight=EverySecond(), loose=Everything())


@pytest.mark.parametrize(
    "rotary",
    [
        Rotary.of_theta(10_000.0, 16),
        Rotary(torch.tensor([1.0, 0.3, 0.01])),  # the first six channels alone
        Rotary(torch.tensor([1.0, 0.3, 0.01]), interleaved=True),
    ],
    ids=["halves", "part", "neighbours"],
)
def test_turning_forth_and_back_is_the_identity(rotary):
    vectors, by = torch.randn(3, 2, 7, 16), torch.randint(-500, 500, (3, 2, 7))
    there = rotary.turned(vectors, by)
    assert not torch.allclose(there, vectors, atol=1e-2)
    torch.testing.assert_close(rotary.turned(there, -by), vectors, atol=1e-5, rtol=1e-5)
    further = rotary.turned(there, 2 * by)
    torch.testing.assert_close(further, rotary.turned(vectors, 3 * by), atol=1e-3, rtol=1e-3)


def test_a_model_is_watched_only_while_a_cache_needs_it():
    model = one_layer()
    KVCache(model, EverySecondOfTheText())
    assert not model._forward_pre_hooks
    cache = KVCache(model, EverySecond())
    assert len(model._forward_pre_hooks) == 1
    del cache
    assert not model._forward_pre_hooks


# -------------------------------------------------------------------- refused, before any work
class Overwriting(Policy):
    name = "overwriting"
    positions = Positions.CACHE
    keeps = 4

    def priority(self, kv):
        return kv.positions.float()


class Uneven(EverySecond):
    def cut(self, kv):
        return kv.live() & (kv.positions >= torch.arange(2)[:, None])


class UnevenLayers(EverySecond):
    def for_layer(self, layer, layers):
        return EverySecond() if layer == 0 else Everything()


def refusal(model, policy):
    with pytest.raises(UserError) as refused:
        list(kvsieve.decode(model, random_prompts(9), policy, max_new_tokens=2))
    return str(refused.value)


def test_a_policy_that_overwrites_cannot_count_so():
    assert "overwrites = False" in refusal(tiny_llama(), Overwriting())


def test_heads_and_layers_hold_as_many():
    assert "[9, 8] slots in the KV heads of a row" in refusal(tiny_llama(), Uneven())
    message = refusal(tiny_llama(), UnevenLayers())
    assert "5 tokens in layer 0 and 9 in layer 1" in message
    mixed = dataclasses.replace(make_policy("dense_layers", layers=[1], inner="dense"), inner=EverySecond())
    message = refusal(tiny_llama(), mixed)
    assert "in layer 1 (policy dense) those of the text" in message


SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 61}


def test_models_without_rotary_embeddings_are_refused_by_name():
    model = kvsieve.prepare(OPTForCausalLM(OPTConfig(ffn_dim=32, word_embed_proj_dim=32, **SMALL)))
    assert "OPTForCausalLM has none in layer 0 (learned positions" in refusal(model, EverySecond())


def test_models_with_sliding_windows_are_refused_by_name():
    config = Gemma2Config(intermediate_size=32, num_key_value_heads=2, head_dim=8, sliding_window=4, **SMALL)
    model = kvsieve.prepare(Gemma2ForCausalLM(config))
    assert "Gemma2ForCausalLM has layers with a sliding window" in refusal(model, EverySecond())
