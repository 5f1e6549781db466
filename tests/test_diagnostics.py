"""Diagnostics agree with the model's own attention, computed here from all of its keys and values."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import kvsieve
from kvsieve import UserError, diagnose, transfer
from tests.families.zoo import FAMILIES
from tests.models import random_prompts, tiny_llama
from tests.policies import CASES, of_two_layers

H, D, STEPS = 4, 8, 3
PROMPTS = random_prompts(33, 20)


# ---------------------------------------------------------------- brute force
class Modules:
    """All that goes through a model's attention, by layer; queries and keys are not yet rotated."""

    def __init__(self, model):
        self.layers = [layer.self_attn for layer in model.model.layers]
        self.found = [{"q": [], "k": [], "v": [], "o": []} for _ in self.layers]

    def __enter__(self):
        self.hooks = []
        for module, found in zip(self.layers, self.found, strict=True):

            def ask(module, args, kwargs, found=found):
                for name in "qkv":
                    projected = getattr(module, f"{name}_proj")(kwargs["hidden_states"])
                    found[name].append(projected.unflatten(2, (-1, D)).transpose(1, 2)[0])

            def answer(module, args, found=found):
                found["o"].append(args[0][0].unflatten(1, (H, D)))

            self.hooks.append(module.register_forward_pre_hook(ask, with_kwargs=True))
            self.hooks.append(module.o_proj.register_forward_pre_hook(answer))
        return self.found

    def __exit__(self, *_):
        for hook in self.hooks:
            hook.remove()


def local_window(q, k, prompt, group, budget=12, sinks=2):
    """Of every step, the tokens that each KV head reads, and the weight of the tail by query head."""
    for n in range(prompt + 1, k.shape[1] + 1):
        held = [token for token in range(n) if token < sinks or token >= n - (budget - sinks)]
        yield [held] * len(k), torch.zeros(H)


def h2o(q, k, prompt, group, budget=12, recent=4):
    logits = (q[:, :prompt] @ k[:, :prompt].repeat_interleave(group, 0).mT * D**-0.5).masked_fill(
        torch.ones(prompt, prompt).triu(1).bool(), -torch.inf
    )
    mass = torch.zeros(len(k), k.shape[1])
    mass[:, :prompt] = logits.softmax(2).sum(1).unflatten(0, (-1, group)).mean(1)
    held = []
    for head in range(len(k)):
        old = mass[head, : prompt - recent].topk(budget - recent).indices.tolist()
        held.append([*old, *range(prompt - recent, prompt)])
    for token in range(prompt, k.shape[1]):
        for head, tokens in enumerate(held):
            goes = min((t for t in tokens if t <= token - recent), key=lambda t: mass[head, t])
            tokens[tokens.index(goes)] = token
            asking = q[head * group : (head + 1) * group, token]
            mass[head, tokens] += (asking @ k[head, tokens].mT * D**-0.5).softmax(1).mean(0)
        yield [list(tokens) for tokens in held], torch.zeros(H)


def sparq(q, k, prompt, group, r=4, count=8, local=2):
    for token in range(prompt, k.shape[1]):
        chosen, tail = [], []
        for head, keys in enumerate(k[:, : token + 1]):
            asking = q[head * group : (head + 1) * group, token]
            channels = asking.abs().sum(0).topk(r).indices
            share = asking[:, channels].abs().sum(1) / asking.abs().sum(1)
            logits = asking[:, channels] @ keys[:, channels].mT / (D * share)[:, None].sqrt()
            weights = logits.softmax(1)
            ranking = weights.sum(0)
            ranking[token + 1 - local :] = torch.inf
            chosen.append(ranking.topk(count).indices.tolist())
            tail.append(1 - weights[:, chosen[-1]].sum(1))
        yield chosen, torch.cat(tail)


@dataclass(frozen=True)
class Newest(kvsieve.Policy):
    """Keeps the last 12 tokens of the prompt, at places within the cache, and all that follow."""

    name: ClassVar[str] = "newest"
    keeps = 12
    overwrites = False
    positions = kvsieve.Positions.CACHE

    def priority(self, kv):
        return kv.positions.float()


def newest(q, k, prompt, group):
    for n in range(prompt + 1, k.shape[1] + 1):
        yield [list(range(prompt - 12, n))] * len(k), torch.zeros(H)


BRUTE = {
    "local_window": (of_two_layers("local_window"), local_window),
    "h2o": (of_two_layers("h2o"), h2o),
    "sparq": (of_two_layers("sparq"), sparq),
    "streaming_llm": (of_two_layers("streaming_llm"), local_window),  # with other keys
    "places in the cache": (Newest(), newest),
}
GROUPED = [(name, 2) for name in BRUTE]


def brute_force(model, prompt, policy, reads):
    """[4, N, L, H] of one prompt: dense's answer from transformers' own cache, the rest from the modules."""
    with torch.no_grad():
        text = model.generate(torch.tensor([prompt]), max_new_tokens=STEPS + 1, do_sample=False)
        with Modules(model) as found:
            kvsieve.score(model, [prompt], [text[0, len(prompt) :].tolist()], policy)
    layers = []
    for layer in found:
        q, k, v = (torch.cat(layer[name], 1) for name in "qkv")
        turns = model.model.rotary_emb(q, torch.arange(q.shape[1])[None])
        q, k = (t[0] for t in apply_rotary_pos_emb(q[None], k[None], *turns))
        group, steps = H // len(k), []
        for step, (tokens, tail) in enumerate(reads(q, k, len(prompt), group)):
            n, numbers = len(prompt) + step + 1, []
            for head in range(H):
                weights = (k[head // group, :n] @ q[head, n - 1] * D**-0.5).softmax(0)
                dense, said = weights @ v[head // group, :n], layer["o"][step + 1][0, head]
                mine = tokens[head // group]
                best = set(weights.topk(len(mine)).indices.tolist())
                numbers.append(
                    [
                        weights[mine].sum(),
                        len(best & set(mine)) / len(mine),
                        (said - dense).norm() / dense.norm(),
                        tail[head],
                    ]
                )
            steps.append(torch.tensor(numbers).T)
        layers.append(torch.stack(steps, 1))
    return torch.stack(layers, 2)


@pytest.mark.parametrize(("name", "kv_heads"), [*GROUPED, ("sparq", 4)])
def test_the_numbers_are_those_of_brute_force_in_ragged_rows(name, kv_heads):
    model, (policy, reads) = tiny_llama(kv_heads), BRUTE[name]
    found = diagnose(model, PROMPTS, policy, steps=STEPS)
    assert found.layers == (0, 1)
    for b, prompt in enumerate(PROMPTS):
        wanted = brute_force(model, prompt, policy, reads)
        assert found.mass.shape == (2, STEPS, 2, H)
        torch.testing.assert_close(torch.stack(found[:4])[:, b], wanted, atol=1e-5, rtol=1e-4)
        assert wanted[0].max() < 1  # something was left out everywhere
        assert wanted[2].min() > 1e-4


# ---------------------------------------------------------------- every policy
REGISTERED = {case.policy: name for name, case in reversed(CASES.items())}


@pytest.mark.filterwarnings("ignore:anllm hides")
@pytest.mark.parametrize("name", REGISTERED.values(), ids=REGISTERED)
def test_every_policy_is_diagnosed_and_one_that_leaves_nothing_out_is_dense(name):
    turns = [[20, 10], [12, 21]]
    for which in ("tight", "loose"):
        # To anllm, 12 ends a sequence: without it all is one, of which nothing is left out.
        prompts = [[12 if which == "tight" and n == 9 else n % 7 for n in range(sum(turn))] for turn in turns]
        policy = of_two_layers(name, which)
        found = diagnose(tiny_llama(), prompts, policy, steps=2, answers=[[3, 9, 1]] * 2, segments=turns)
        for numbers in found[:4]:
            assert numbers.shape == (2, 2, 2, H)
            assert numbers.isfinite().all()
            assert numbers.min() >= 0
        assert torch.stack([found.mass, found.recall, found.tail]).max() < 1 + 1e-5
        if which == "loose" or name == "dense":
            torch.testing.assert_close(found.mass, torch.ones(2, 2, 2, H))
            assert (found.recall == 1).all()
            assert (found.tail == 0).all()
            assert found.error.max() < 1e-4
        else:
            assert found.mass.min() < 0.99
            assert found.error.max() > 0.01


# ---------------------------------------------------------------- what is fed, and what it does not touch
def test_no_meter_counts_the_steps_of_a_diagnosis():
    with transfer.measure() as meter:
        diagnose(tiny_llama(), PROMPTS, of_two_layers("sparq"), steps=2)
    assert (meter.read, meter.written, meter.steps) == (0, 0, 0)


def test_a_row_whose_answer_has_ended_has_no_numbers():
    found = diagnose(tiny_llama(), PROMPTS, answers=[[1, 2, 3, 4], [1, 2]], steps=8)
    assert found.error.shape == (2, 3, 2, H)
    assert found.error.isnan()[:, :, 0, 0].tolist() == [[False] * 3, [False, True, True]]


def test_the_answer_ends_where_dense_ends(monkeypatch):
    model = tiny_llama()
    tokens = [int(token) for token in kvsieve.decode(model, PROMPTS[:1], max_new_tokens=STEPS + 1)]
    end = next(n for n in range(1, STEPS) if tokens[n] not in tokens[:n])
    monkeypatch.setattr(model.generation_config, "eos_token_id", tokens[end])
    assert diagnose(model, PROMPTS[:1], steps=STEPS).mass.shape[1] == end
    monkeypatch.setattr(model.generation_config, "eos_token_id", tokens[0])
    with pytest.raises(UserError, match="no step to diagnose"):
        diagnose(model, PROMPTS[:1], steps=STEPS)


def test_layers_whose_window_the_model_keeps_are_left_out():
    model = next(family for family in FAMILIES if family.name == "gemma3").build()
    found = diagnose(kvsieve.prepare(model), random_prompts(20), of_two_layers("h2o"), steps=2)
    assert found.layers == tuple(
        n for n, kind in enumerate(model.config.layer_types) if kind == "full_attention"
    )
    assert found.mass.shape[2] == len(found.layers) < len(model.config.layer_types)


def test_sinks_of_a_model_are_no_tokens_to_be_missed():
    model = next(family for family in FAMILIES if family.name == "gpt_oss").build()
    found = diagnose(kvsieve.prepare(model), random_prompts(20), steps=2)
    torch.testing.assert_close(found.mass, torch.ones_like(found.mass))


def test_questions_are_asked_of_what_the_policy_has_kept_of_each_prompt():
    questions, answers = random_prompts(7, 4, seed=3), [[1, 2, 3]] * 2
    for name in ("snapkv", "sirllm"):
        policy, options = of_two_layers(name), {"steps": 2}
        found = diagnose(tiny_llama(), PROMPTS, policy, questions=questions, answers=answers, **options)
        for b in range(2):
            alone = diagnose(
                tiny_llama(),
                PROMPTS[b : b + 1],
                policy,
                questions=questions[b : b + 1],
                answers=answers[:1],
                **options,
            )
            torch.testing.assert_close(found.mass[b], alone.mass[0])
            torch.testing.assert_close(found.error[b], alone.error[0], atol=1e-4, rtol=1e-4)
    with pytest.raises(UserError, match="2 prompts, but 1 questions"):
        diagnose(tiny_llama(), PROMPTS, questions=questions[:1])


@pytest.mark.parametrize("steps", [0, True, 2.5])
def test_steps_are_a_number_of_at_least_one(steps):
    with pytest.raises(UserError, match="steps must be a whole number, at least 1"):
        diagnose(tiny_llama(), PROMPTS, steps=steps)


def test_layers_that_borrow_keys_are_refused():
    model = next(family for family in FAMILIES if family.name == "gemma3n").build()
    with pytest.raises(UserError, match="borrow the keys of others"):
        diagnose(kvsieve.prepare(model), random_prompts(20), steps=1)
