"""Layers with a sliding window, or chunks: what a token sees, what is held, and what a policy does inside."""

import copy
import dataclasses
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from transformers import DynamicCache
from transformers.masking_utils import chunked_causal_mask_function, sliding_window_causal_mask_function

import kvsieve
from kvsieve import KVCache, Policy, UserError, make_policy, transfer
from kvsieve.attention import attend
from kvsieve.cache.forward import Forward
from kvsieve.cache.kv import Scoring
from kvsieve.cache.windows import Window
from kvsieve.testing import Inputs, LayerCache, rollout
from tests.families.zoo import FAMILIES, VOCABULARY, WINDOW
from tests.policies import CASES, LOOSE, TIGHT, of_two_layers

NAMES = "gemma3", "gpt_oss", "mistral (windows)", "llama4", "gemma3n"
PROMPTS = 13, 21, 5
SPARQ = make_policy("sparq", r=4, k=4, local=2, mean_value=False)
H2O = make_policy("h2o", budget=5, recent=2)


def inside(policy):
    return make_policy("inside_windows", inner=policy)


def tokens(*lengths, seed=1):
    random = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=random).tolist() for length in lengths]


@pytest.fixture(scope="module", params=NAMES)
def models(request):
    stock = next(family for family in FAMILIES if family.name == request.param).build()
    return SimpleNamespace(name=request.param, stock=stock, model=kvsieve.prepare(copy.deepcopy(stock)))


# -------------------------------------------------------------------- what a token sees
@pytest.mark.parametrize("chunks", [False, True])
def test_a_token_sees_what_the_masks_of_transformers_say(chunks):
    if chunks:
        sees = chunked_causal_mask_function(4, torch.zeros(1, dtype=torch.int64))
    else:
        sees = sliding_window_causal_mask_function(4)
    query = torch.arange(19)
    first = Window(4, chunks).first(query).tolist()
    for q in query.tolist():
        assert [k for k in range(19) if sees(torch.tensor(0), None, torch.tensor(q), torch.tensor(k))] == [
            *range(first[q], q + 1)
        ]


# -------------------------------------------------------------------- one layer, beside plain loops
def by_hand(turns, query, keys, values, window, budget=None, recent=0):
    """Outputs `[H, N, D]` of one row's tokens, and the tokens that each KV head holds after each turn.

    `turns`: numbers of tokens, prompts and single steps. Of those that a token sees, H2O's `budget` stay.
    """
    heads, kv_heads = query.shape[0], keys.shape[0]
    output, held = torch.empty_like(query), []
    for k in range(kv_heads):
        group, mass, kept, at = range(k * heads // kv_heads, (k + 1) * heads // kv_heads), {}, [], 0

        def best(seen, newest, count, mass=mass):
            return sorted(sorted(seen, key=lambda each: (each > newest - recent, mass.get(each, 0)))[-count:])

        for turn in turns:
            new = range(at, at + turn)
            if turn == 1 and budget is not None:  # one slot is for the new token
                first = int(window.first(torch.tensor(at)))
                kept = best([t for t in kept if t >= first], at, budget - 1)
            for q in new:
                first = int(window.first(torch.tensor(q)))
                seen = [t for t in [*kept, *new] if first <= t <= q]
                for h in group:
                    weights = torch.softmax(keys[k, seen] @ query[h, q] / query.shape[2] ** 0.5, 0)
                    output[h, q] = weights @ values[k, seen]
                    for t, weight in zip(seen, weights.tolist(), strict=True):
                        mass[t] = mass.get(t, 0) + weight / len(group)
            at += turn
            first = int(window.first(torch.tensor(at - 1)))
            kept = [t for t in [*kept, *new] if t >= first]
            kept = kept if budget is None else best(kept, at - 1, budget)
            held.append((k, kept))
    return output, held


def by_layer(layer, turns, query, keys, values):
    """The same of a layer."""
    outputs, held, at = [], [], 0
    layer.scoring, layer.group = Scoring(query.shape[2] ** -0.5), query.shape[0] // keys.shape[0]
    for turn in turns:
        new = slice(at, at + turn)
        layer.expected = Forward.PROMPT if turn > 1 else Forward.STEP
        layer.update(keys[None, :, new], values[None, :, new])
        outputs.append(
            attend(layer, query[None, :, new].unflatten(1, (keys.shape[0], -1)), None).flatten(1, 2)
        )
        at += turn
        kv = layer.kv
        held.append([kv.positions[0, k, : kv.lengths[0, k]].sort().values.tolist() for k in range(len(keys))])
    return torch.cat(outputs, 2)[0], held


TURNS = {
    "shorter": [4, *[1] * 20],
    "as long": [9, *[1] * 20],
    "longer": [23, *[1] * 20],
    "turns": [23, 1, 1, 1, 3, *[1] * 12, 2, 1, 15, *[1] * 14, 2, 2, *[1] * 11],
}


@pytest.mark.parametrize("chunks", [False, True])
@pytest.mark.parametrize("policy", [None, H2O], ids=["dense", "h2o"])
@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
def test_a_layer_holds_and_reads_its_window(turns, policy, chunks):
    window, total = Window(9, chunks), sum(turns)
    random = torch.Generator().manual_seed(0)
    query, keys, values = (2 * torch.randn(n, total, 8, generator=random) for n in (4, 2, 2))
    budget = {} if policy is None else {"budget": policy.budget, "recent": policy.recent}
    wanted, kept = by_hand(turns, query, keys, values, window, **budget)
    layer = LayerCache(policy or Policy(), window=window)
    got, held = by_layer(layer, turns, query, keys, values)
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)
    assert layer.slots.capacity == (9 if policy is None else policy.budget)
    for k in range(2):
        assert [turn[k] for turn in held] == [tokens for head, tokens in kept if head == k]


SELECTING = {
    **{f"sparq {kind}": dataclasses.replace(SPARQ, layout=kind) for kind in ("single", "double", "blocked")},
    "twilight": make_policy("twilight", inner=SPARQ, p=0.6),
    "double_sparsity": TIGHT["double_sparsity"],
    "loki": TIGHT["loki_share"],
}


@pytest.mark.parametrize("policy", SELECTING.values(), ids=SELECTING)
def test_a_policy_inside_selects_among_the_tokens_of_the_window(policy):
    """As on a text that has no others, in their order."""
    inputs, window = Inputs.random((40, 33, 3), steps=20), 9
    got = rollout(policy, *inputs, layer=LayerCache(policy, window=Window(window)))
    for b in range(3):
        _, queries, keys, values, _ = inputs.row(b)
        before = keys.shape[2] - 20
        for step in range(20):
            seen = slice(max(0, before + step + 1 - window), before + step + 1)
            if seen.stop - seen.start == 1:
                continue
            alone = rollout(
                policy,
                torch.zeros(1, 4, seen.stop - seen.start - 1, 16),
                queries[:, :, step : step + 1],
                keys[:, :, seen],
                values[:, :, seen],
                torch.tensor([seen.stop - seen.start - 1]),
            )
            torch.testing.assert_close(got[b, :, step], alone[0, :, 0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", [n for n in CASES if n.split("_")[0] in ("sparq", "h2o", "tova", "local")])
def test_inside_a_window_nothing_depends_on_pieces_or_on_other_rows(name):
    policy, inputs = TIGHT[name], Inputs.random((40, 33, 3), steps=15)
    whole = rollout(policy, *inputs, layer=LayerCache(policy, window=Window(11)))
    pieces = rollout(policy, *inputs, layer=LayerCache(policy, window=Window(11)), prefill_chunk=7)
    torch.testing.assert_close(pieces, whole, atol=1e-5, rtol=1e-5)
    for b in range(3):
        alone = rollout(policy, *inputs.row(b), layer=LayerCache(policy, window=Window(11)))
        torch.testing.assert_close(alone[0], whole[b], atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------- models, beside transformers
def stock_tokens(model, row, new):
    ids = torch.tensor([row])
    return model.generate(ids, max_new_tokens=new, do_sample=False)[0, len(row) :].tolist()


def decoded(model, rows, policy=None, new=20, **options):
    made = kvsieve.decode(model, rows, policy, max_new_tokens=new, eos_token_id=(), **options)
    return torch.stack(list(made), 1).tolist()


@pytest.mark.parametrize("chunk", [1, 4, 9, 16])
def test_prompts_in_pieces(models, chunk):
    rows = tokens(*PROMPTS)
    wanted = [stock_tokens(models.stock, row, 20) for row in rows]
    assert decoded(models.model, rows, prefill_chunk=chunk) == wanted
    assert decoded(models.model, rows, inside(LOOSE["sparq"]), prefill_chunk=chunk) == wanted


@pytest.mark.parametrize("policy", [None, inside(LOOSE["sparq"]), inside(LOOSE["h2o"])])
def test_beams(models, policy):
    ids = torch.tensor(tokens(17, 17))
    given = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 16, "do_sample": False}
    wanted = models.stock.generate(ids, **given)
    got = models.model.generate(ids, past_key_values=KVCache(models.model, policy), **given)
    assert torch.equal(got, wanted)


def test_a_conversation(models):
    """Three turns, the new tokens of each fed on one cache."""
    turns, texts = tokens(15, 4, 12, seed=2), []
    for model, cache in (
        (models.stock, DynamicCache(config=models.stock.config)),
        (models.model, KVCache(models.model, inside(LOOSE["sparq"]))),
    ):
        text = torch.empty(1, 0, dtype=torch.int64)
        for turn in turns:
            text = torch.cat([text, torch.tensor([turn])], 1)
            text = model.generate(text, past_key_values=cache, max_new_tokens=7, do_sample=False)
        texts.append(text.tolist())
    assert texts[0] == texts[1]


def test_texts_that_were_read_are_continued(models):
    """Ragged texts, several questions about each, on copies."""
    texts, questions = tokens(*PROMPTS), tokens(3, 12, 5, seed=3)
    cache = KVCache(models.model)
    kvsieve.read(models.model, texts, cache, leave=0)
    wanted = [
        stock_tokens(models.stock, text + question, 12)
        for text, question in zip(texts, questions, strict=True)
    ]
    for _ in range(2):
        assert decoded(models.model, questions, new=12, cache=cache.clone()) == wanted


def test_probes_are_taken_back_in_windows():
    """KVzip reads the text again, piece by piece; keeping all, it is dense."""
    model = kvsieve.prepare(next(family for family in FAMILIES if family.name == "gemma3").build())
    rows = tokens(*PROMPTS)
    assert decoded(model, rows, of_two_layers("kvzip", "loose")) == decoded(model, rows)


# -------------------------------------------------------------------- memory and bytes
def test_no_mask_over_all_tokens_is_made(models, monkeypatch):
    def made(*_, **__):
        raise AssertionError("a T x T mask")

    monkeypatch.setattr("kvsieve.hf.interface.sdpa_mask", made)
    decoded(models.model, tokens(*PROMPTS), new=3)
    decoded(models.model, tokens(*PROMPTS), new=3, prefill_chunk=4)


def test_a_window_holds_no_more_than_it_shows(models):
    cache = KVCache(models.model)
    decoded(models.model, tokens(40), cache=cache, new=3)
    windows = [layer for layer in cache.kv_layers if layer.window is not None]
    assert windows
    assert {layer.slots.capacity for layer in windows} == {WINDOW}
    number = 2 * cache.kv_layers[0].kv.lengths.shape[1] * 8 * 4  # bytes of a token
    others = len(cache.policy_layers)
    assert cache.memory_by_row([50]) == [(len(windows) * WINDOW + others * 50) * number]


def test_inside_a_window_the_meter_goes_by_the_window():
    model = kvsieve.prepare(next(each for each in FAMILIES if each.name == "mistral (windows)").build())
    with transfer.measure() as dense:
        decoded(model, tokens(30), new=5)
    with transfer.measure() as sparse:
        decoded(model, tokens(30), inside(SPARQ), new=5)
    layers, steps, heads, size, number = 2, 4, 2, 8, 4
    assert (
        dense.read
        == dense.dense_read
        == sparse.dense_read
        == layers * steps * heads * WINDOW * 2 * size * number
    )
    channels, chosen = WINDOW * SPARQ.r, SPARQ.k * 2 * size
    assert sparse.read == layers * steps * heads * (channels + chosen) * number


# -------------------------------------------------------------------- who acts where
def test_a_policy_acts_inside_only_on_request():
    gemma = kvsieve.prepare(next(family for family in FAMILIES if family.name == "gemma3").build())
    rows = tokens(*PROMPTS)
    around = make_policy("dense_layers", layers=[0], inner=inside(SPARQ))  # layer 0 has the window
    assert [layer.policy.in_windows for layer in KVCache(gemma, SPARQ).kv_layers] == [False, False]
    assert decoded(gemma, rows, around) == decoded(gemma, rows, SPARQ)
    assert decoded(gemma, rows, inside(SPARQ)) != decoded(gemma, rows, SPARQ)


def test_what_no_window_can_be_given_to_is_refused_with_the_reason():
    @dataclass(frozen=True)
    class InOrder(Policy):
        name: ClassVar[str] = "in_order"
        in_windows: ClassVar[bool] = True

        def select(self, query, kv):
            return None

    model = kvsieve.prepare(next(family for family in FAMILIES if family.name == "gemma3").build())
    for policy, why in (
        (inside(TIGHT["quest"]), "policy quest goes by the order of slots"),
        (inside(TIGHT["hip"]), "policy hip goes by the order of slots"),
        (inside(TIGHT["refresh_sparq"]), "policy refresh goes by the order of slots"),
        (InOrder(), r"policy in_order goes by the order of slots \(it does not declare `any_order`\)"),
        (inside(TIGHT["snapkv"]), "policy snapkv has a `cut` of its own"),
        (inside(TIGHT["sirllm"]), "policy sirllm has a `plan` of its own"),
        (inside(TIGHT["infllm"]), "policy infllm goes by positions of its own"),
    ):
        with pytest.raises(UserError, match=f"{why}.*cannot act inside a sliding window"):
            KVCache(model, policy)


def test_diagnose_goes_by_the_window():
    model = kvsieve.prepare(next(each for each in FAMILIES if each.name == "mistral (windows)").build())
    rows = tokens(*PROMPTS)
    loose = kvsieve.diagnose(model, rows, inside(LOOSE["sparq"]), steps=6)
    torch.testing.assert_close(loose.mass, torch.ones_like(loose.mass))
    torch.testing.assert_close(loose.error, torch.zeros_like(loose.error), atol=1e-5, rtol=0)
    tight = kvsieve.diagnose(model, rows, inside(SPARQ), steps=6)
    assert (tight.mass < 0.999).any()
    assert (tight.error > 1e-3).any()
    with pytest.raises(UserError, match="wrap it in inside_windows"):
        kvsieve.diagnose(model, rows)
