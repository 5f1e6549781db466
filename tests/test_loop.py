"""The decode loop: tokens, stops, sampling, chunks, ragged batches, and errors before any work."""

import itertools
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
import torch
from transformers import DynamicCache, LogitsProcessor, LogitsProcessorList, SuppressTokensLogitsProcessor

import kvsieve
from kvsieve import KVCache, Policy, UserError, make_policy
from tests.models import random_prompts, tiny_llama
from tests.policies import FIRST_LAYER_DENSE, TIGHT

POLICIES = {name: TIGHT[name] for name in ("dense", "sparq", "h2o", "local_window")}
POLICIES["dense_layers"] = FIRST_LAYER_DENSE
ids = POLICIES.keys()


def run(prompts, policy=None, **options):
    options.setdefault("max_new_tokens", 12)
    return torch.stack(list(kvsieve.decode(tiny_llama(), prompts, policy, **options)), 1)


def test_dense_equals_transformers():
    model, prompts = tiny_llama(), random_prompts(20, 13, 1)
    got = run(prompts)
    for row, prompt in zip(got, prompts, strict=True):
        wanted = model.generate(
            torch.tensor([prompt]), past_key_values=DynamicCache(), max_new_tokens=12, do_sample=False
        )
        assert row.tolist() == wanted[0, len(prompt) :].tolist()


@pytest.mark.parametrize("policy", POLICIES.values(), ids=ids)
def test_rows_do_not_influence_each_other(policy):
    prompts = random_prompts(30, 17, 2, 25)
    together = run(prompts, policy)
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row, run([prompt], policy)[0])


@pytest.mark.parametrize("policy", POLICIES.values(), ids=ids)
@pytest.mark.parametrize("chunk", [1, 4, 29, 64])
def test_chunked_prefill_equals_one_shot(policy, chunk):
    prompts = random_prompts(30, 17)
    assert torch.equal(run(prompts, policy, prefill_chunk=chunk), run(prompts, policy))


@pytest.mark.parametrize("policy", POLICIES.values(), ids=ids)
def test_score_agrees_with_decode(policy):
    """The tokens that decode chose are, one by one, the most likely ones under score."""
    prompts = random_prompts(30, 17)
    chosen = run(prompts, policy)
    found = kvsieve.score(tiny_llama(), prompts, chosen.tolist(), policy)
    for b, prompt in enumerate(prompts):
        other = chosen[b].clone()
        other[-1] = (other[-1] + 1) % 61
        (worse,) = kvsieve.score(tiny_llama(), [prompt], [other.tolist()], policy)
        torch.testing.assert_close(worse[:-1], found[b][:-1], atol=1e-5, rtol=1e-5)
        assert worse[-1] < found[b][-1]


def test_score_of_dense_equals_one_forward():
    model, (prompt, first, second) = tiny_llama(), random_prompts(20, 9, 4)
    found = kvsieve.score(model, [prompt, prompt[:7]], [first, second])
    for start, tokens, got in ((prompt, first, found[0]), (prompt[:7], second, found[1])):
        with torch.no_grad():
            logits = model(torch.tensor([start + tokens]), use_cache=False).logits[0, len(start) - 1 : -1]
        wanted = torch.log_softmax(logits, -1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
        torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_a_policy_acts_from_the_second_token_on():
    """The first comes from the dense prefill, whatever the policy."""
    prompts = random_prompts(40)
    assert run(prompts, POLICIES["sparq"])[0, 0] == run(prompts)[0, 0]
    (dense,) = kvsieve.score(tiny_llama(), prompts, [[1, 2, 3]])
    (sparse,) = kvsieve.score(tiny_llama(), prompts, [[1, 2, 3]], POLICIES["sparq"])
    assert dense[0] == sparse[0]
    assert dense[1] != sparse[1]


def test_a_row_ends_at_its_end_token_and_repeats_the_pad_token():
    prompts = random_prompts(20, 13)
    free = run(prompts, eos_token_id=())
    end = free[0, 3].item()
    first = [row.tolist().index(end) if end in row.tolist() else 99 for row in free]
    got = run(prompts, eos_token_id=[end])
    assert got.shape[1] == min(12, max(first) + 1)  # the loop stops when all rows have
    for row, wanted, at in zip(got.tolist(), free.tolist(), first, strict=True):
        assert row[: at + 1] == wanted[: min(at + 1, len(row))]
        assert set(row[at + 1 :]) <= {end}  # no pad token in this model: the end token stands in


def test_sampling_is_seeded_and_each_row_has_its_own_stream():
    prompt = random_prompts(20)[0]
    first, again = (run([prompt, prompt], temperature=1.0, seed=3) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.equal(first[0], first[1])
    assert torch.equal(first[1], run([prompt], temperature=1.0, seed=4)[0])  # row b draws from seed + b
    assert torch.equal(run([prompt], top_k=1), run([prompt]))


def test_logits_processors_of_transformers_apply():
    prompt = random_prompts(20)
    banned = run(prompt)[0].unique().tolist()
    processors = LogitsProcessorList([SuppressTokensLogitsProcessor(banned)])
    assert not set(run(prompt, logits_processor=processors)[0].tolist()) & set(banned)


@pytest.mark.parametrize("sizes", [(9, 5, 5), (7, 7)])
def test_a_logits_processor_sees_each_rows_own_tokens(sizes):
    class Reads(LogitsProcessor):
        def __call__(self, input_ids, scores):
            seen.append(input_ids.tolist())
            return scores

    seen, prompts = [], random_prompts(*sizes)
    tokens = run(prompts, logits_processor=[Reads()], max_new_tokens=3, top_k=1).tolist()
    wanted = [prompts[b] + tokens[b][:step] for step in range(3) for b in range(len(sizes))]
    assert list(itertools.chain(*seen)) == wanted


def test_it_is_a_generator_and_can_be_left():
    steps = kvsieve.decode(tiny_llama(), random_prompts(5), max_new_tokens=200)
    assert next(steps).shape == (1,)
    steps.close()


def test_a_tensor_of_prompts_and_text_for_a_model_without_tokenizer():
    prompts = torch.tensor(random_prompts(6, 6))
    assert torch.equal(run(prompts), run(prompts.tolist()))
    with pytest.raises(UserError, match="no tokenizer"):
        run("some text")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": []}, "no prompt was given"),
        ({"prompts": [[1, 2], []]}, "prompt 1 is empty"),
        ({"prompts": [[1, 61]]}, r"prompt 0 has a token id outside the vocabulary \(0 to 60\)"),
        ({"prompts": [[1] * 250]}, "need 261 positions; LlamaForCausalLM has 256"),
        ({"max_new_tokens": 0}, "max_new_tokens must be a whole number, at least 1, not 0"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number, at least 1, not True"),
        ({"prefill_chunk": 0}, "prefill_chunk must be a whole number of tokens, at least 1, not 0"),
        ({"prefill_chunk": 2.5}, "prefill_chunk must be a whole number of tokens, at least 1, not 2.5"),
        ({"prefill_chunk": "8"}, "prefill_chunk must be a whole number of tokens, at least 1, not '8'"),
        ({"policy": "sparq"}, r"not 'sparq': give kvsieve.make_policy\('sparq', ...\)"),
        (
            {"policy": Policy},
            "not <class 'kvsieve.policy.Policy'>: give an object of it, with its parameters",
        ),
        ({"cache": 5}, "cache must be a kvsieve.KVCache, not 5"),
        ({"cache": DynamicCache()}, "cache must be a kvsieve.KVCache, not 'DynamicCache'"),
        ({"temperature": -1.0}, "sampling: .*temperature"),
        ({"top_p": 1.5}, "sampling: .*top_p"),
        (
            {"policy": make_policy("sparq", r=32)},
            "sparq.r is 32, but this model's heads have only 8 channels",
        ),
        (
            {"policy": make_policy("dense_layers", layers=[5], inner="h2o")},
            "layer 5 is not one of the model's 2",
        ),
    ],
    ids=str,
)
def test_a_mistake_is_named_before_any_work(options, message):
    options = {"prompts": [[1, 2, 3]], "max_new_tokens": 12, **options}
    with pytest.raises(UserError, match=message):
        kvsieve.decode(tiny_llama(), options.pop("prompts"), options.pop("policy", None), **options)


def test_whole_numbers_may_be_numpys():
    given = {"max_new_tokens": np.int64(3), "prefill_chunk": np.int32(2), "top_k": np.int64(1)}
    assert torch.equal(run(random_prompts(5), **given), run(random_prompts(5), max_new_tokens=3))


def test_the_last_token_takes_no_position_and_no_slot():
    assert run([[1] * 245], cache=KVCache(tiny_llama(), capacity=256)).shape == (1, 12)
    with pytest.raises(UserError, match="a prompt of 246 tokens and 12 new ones need 257 positions"):
        run([[1] * 246])
    with pytest.raises(UserError, match=r"holds 255 tokens a row \(capacity\), and 256 are needed"):
        run([[1] * 245], cache=KVCache(tiny_llama(), capacity=255))


def test_a_used_cache_is_refused():
    model, cache = tiny_llama(), KVCache(tiny_llama())
    list(kvsieve.decode(model, [[1, 2]], cache=cache, max_new_tokens=2))
    with pytest.raises(UserError, match="already holds tokens"):
        kvsieve.decode(model, [[1, 2]], cache=cache, max_new_tokens=2)
    with pytest.raises(UserError, match="the cache was made for the policy"):
        kvsieve.decode(model, [[1, 2]], POLICIES["h2o"], cache=KVCache(model), max_new_tokens=2)


def test_nan_in_the_logits_is_reported_at_its_step():
    @dataclass(frozen=True)
    class Broken(Policy):
        name: ClassVar[str] = "broken"

        def select(self, query, kv):
            kv.values.fill_(torch.nan)

    with pytest.raises(UserError, match="logits are NaN at new token 2"):
        run([[1, 2, 3]], Broken())
