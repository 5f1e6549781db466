"""A policy's declarations and answers are checked: a mistake is named with policy, layer, what came and what
is due.
"""

import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import kvsieve
from kvsieve import (
    Far,
    KeyLayout,
    KVCache,
    Observe,
    Policy,
    Selection,
    Tail,
    UserError,
    Wants,
    Wrapper,
    make_policy,
    specs,
)
from kvsieve.contract import answers
from kvsieve.testing import Inputs, LayerCache, rollout, strict
from tests.models import random_prompts, tiny_llama
from tests.policies import TIGHT


def policy(**members) -> Policy:
    """A policy of a new class with these members."""
    return dataclass(frozen=True)(type("Made", (Policy,), {"name": "made", **members}))()


def step(made, **given):
    """One row of 40, 33 and 3 tokens, K = 2, G = 2, D = 16, six decode steps."""
    return rollout(made, *Inputs.random(), **given)


# -------------------------------------------------------------------- declarations
@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            {"priority": lambda self, kv: kv.positions.float()},
            "has `priority`, but does not declare .* `keeps`",
        ),
        ({"keeps": 8}, "`keeps`, but has no `priority"),
        ({"on_attend": lambda self, kv, mass: None}, "has `on_attend`, but does not observe"),
        ({"on_attend": lambda self, kv, mass: None, "observes": Observe.NONE}, "but does not observe"),
        ({"observes": "mass"}, "observes must be a kvsieve.Observe, not 'mass'"),
        ({"observes": True}, "observes must be a kvsieve.Observe, not True"),
        (
            {"on_attention": lambda self, kv, mass: None},
            "Made.on_attention is no hook.*on_append, on_queries",
        ),
        ({"on_step": lambda self, kv: None}, "Made.on_step is no hook"),
        ({"selects": lambda self, query, kv: None}, "did you mean 'select'"),
        ({"for_compresion": classmethod(lambda cls, *_: cls())}, "did you mean 'for_compression'"),
        ({"sumaries": property(lambda self: {})}, "did you mean 'summaries'"),
        (
            {"keeps": 0, "priority": lambda self, kv: kv.positions.float()},
            "keeps must be .* at least 1.* not 0",
        ),
        ({"keeps": 2.5, "priority": lambda self, kv: kv.positions.float()}, "keeps must be .* not 2.5"),
        ({"keeps": True, "priority": lambda self, kv: kv.positions.float()}, "keeps must be .* not True"),
        (
            {"keeps": 8, "cut": lambda self, kv: None},
            "no `priority.*new token overwrites.*`overwrites = False`",
        ),
        (
            {"keeps_per_head": lambda self, layer, heads: [8] * len(heads), "cut": lambda self, kv: None},
            "has `keeps_per_head`, which needs `cut`, .* and `priority`",
        ),
        ({"drops_by": ("budge",)}, "drops_by must be a tuple of names of its fields .* not .'budge',."),
        ({"drops_by": "budget"}, "drops_by must be a tuple of names of its fields .* not 'budget'"),
        ({"last_queries": 8}, "declares `last_queries`, but has neither `cut` nor `on_prefill`"),
        ({"last_queries": -1, "cut": lambda self, kv: None}, "last_queries must be .* 0 or more, not -1"),
        ({"last_queries": True, "cut": lambda self, kv: None}, "last_queries must be .* not True"),
        ({"last_query": property(lambda self: 8)}, "did you mean 'last_queries'"),
        ({"positions": "own"}, "positions must be a kvsieve.Positions, not 'own'"),
        ({"on_query": lambda self, kv: None}, "Made.on_query is no hook.*on_append, on_queries, on_select"),
        ({"overwrites": "yes"}, "overwrites must be True or False, not 'yes'"),
        ({"key_layout": "double"}, "key_layout must be a kvsieve.KeyLayout, not 'double'"),
        ({"columns": {"values": torch.float32}}, "'values' in columns is the cache's own"),
        ({"columns": {"keys_by_channel": torch.float32}}, "'keys_by_channel' in columns is the cache's own"),
        ({"summaries": {"lengths": torch.float32}}, "'lengths' in summaries is the cache's own"),
        (
            {"columns": {"x": torch.float32}, "summaries": {"x": torch.float32}},
            "is both a column and a summary",
        ),
        ({"columns": {"x": float}}, r"columns\['x'\] must be a torch.dtype"),
        ({"columns": {"x": (torch.float32, 0)}}, r"columns\['x'\] must be a torch.dtype"),
        ({"columns": ["x"]}, "columns must be a mapping"),
        (
            {"columns": {"x": torch.int64}, "observes": Observe.MASS, "adds_mass_to": "x"},
            "adds_mass_to must be a column of torch.float32, or None, not 'x'",
        ),
        (
            {"columns": {"x": torch.float32}, "adds_mass_to": "x"},
            "`adds_mass_to` needs observes = Observe.MASS",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_declarations_that_cannot_be_are_refused_before_any_work(members, message):
    with pytest.raises(UserError, match=message):
        KVCache(tiny_llama(), policy(**members))


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "adakv"])
def test_a_window_that_does_not_fit_into_the_budget_is_refused(name):
    with pytest.raises(UserError, match=f"{name}.budget must be larger than the window of 32 .* not 32"):
        make_policy(name, budget=32)
    for given in ({"window": 0}, {"kernel": 4}, {"pooling": "sum"}, {"group": "sum"}):
        with pytest.raises(UserError, match=f"{name}.{next(iter(given))}:? must be"):
            make_policy(name, **given)
    with pytest.raises(UserError, match="must be from 0 to 1, not 1.5"):
        make_policy("adakv", floor=1.5)
    with pytest.raises(UserError, match="beta must be at least 1"):
        make_policy("pyramidkv", beta=0)
    with pytest.raises(UserError, match="tova.budget must be at least 1"):
        make_policy("tova", budget=0)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"budget": 4}, "sinks must be from 0 to budget - 1 = 3, not 4"),
        ({"future": 0}, "future must be at least 1 position, not 0"),
        ({"epsilon": -1.0}, "epsilon must be 0 or more, not -1"),
    ],
)
def test_expected_attention_refuses_parameters_that_cannot_be(given, message):
    with pytest.raises(UserError, match=f"expected_attention.{message}"):
        make_policy("expected_attention", **given)


def test_a_budget_below_one_is_refused_by_the_built_in_policies_too():
    for name in ("h2o", "local_window"):
        with pytest.raises(UserError, match="budget must be at least 1"):
            make_policy(name, budget=0)


def test_helpers_of_a_policy_may_have_names_of_their_own():
    KVCache(tiny_llama(), policy(score_of=lambda self: 1, _select=lambda self: 2, decay=0.5))


# -------------------------------------------------------------------- answers
def chosen(slots=None, counts=None, tail=None, far=None):
    """A policy that answers with the first slots, or with what is given in place of them."""

    def select(self, query, kv):
        some = torch.zeros(*kv.lengths.shape, 2, dtype=torch.int64) + torch.arange(2)
        answer = some if slots is None else slots(some, kv)
        count = torch.full_like(kv.lengths, 2) if counts is None else counts(kv)
        beyond = None if far is None else far(some[..., :1] + 2, kv, query)
        return Selection(answer, count, None if tail is None else tail(query), beyond)

    return policy(select=select)


def ranked(priority):
    return policy(keeps=8, priority=lambda self, kv: priority(kv))


def cutting(cut, **members):
    return policy(cut=lambda self, kv: cut(kv), **members)


SHAPES = [
    (
        policy(select=lambda self, query, kv: kv.lengths),
        "must return a kvsieve.Selection or None, not Tensor",
    ),
    (
        chosen(slots=lambda some, kv: some[0]),
        r"slots has the shape \[2, 2\], expected \[B, K, S\] = \[3, 2, S\]",
    ),
    (chosen(slots=lambda some, kv: some.float()), "slots is float32, expected int64"),
    (chosen(slots=lambda some, kv: some.tolist()), "slots must be a tensor .*, not list"),
    (chosen(slots=lambda some, kv: some.to("meta")), "slots is on meta, expected cpu"),
    (chosen(counts=lambda kv: kv.lengths[:, 0]), r"counts has the shape \[3\], expected \[B, K\] = \[3, 2\]"),
    (chosen(counts=lambda kv: kv.lengths.float()), "counts is float32, expected int64 or int32"),
    (chosen(tail=lambda q: Tail(q[..., 0].double(), q[:, :, 0])), "tail.weight is float64, expected float32"),
    (chosen(tail=lambda q: Tail(q[:, :, :, 0], q)), r"tail.value has the shape .* expected \[B, K, D\]"),
    (
        chosen(far=lambda slots, kv, q: Far(slots[0], kv.lengths, q)),
        r"far.slots has the shape \[2, 1\], expected \[B, K, F\] = \[3, 2, F\]",
    ),
    (
        chosen(far=lambda slots, kv, q: Far(slots, kv.lengths.float(), q)),
        "far.counts is float32, expected int64 or int32",
    ),
    (
        chosen(far=lambda slots, kv, q: Far(slots, kv.lengths, q.double())),
        "far.query is float64, expected float32",
    ),
    (
        ranked(lambda kv: kv.positions[:, 0].float()),
        r"priority has the shape \[3, 40\], expected \[B, K, T\]",
    ),
    (ranked(lambda kv: kv.positions), "priority is int64, expected float32 or"),
    (ranked(lambda kv: 1.0), "priority must be a tensor .*, not float"),
    (
        cutting(lambda kv: kv.live()[:, 0]),
        r"cut has the shape \[3, 40\], expected \[B, K, T\] = \[3, 2, 40\]",
    ),
    (cutting(lambda kv: kv.positions), "cut is int64, expected bool"),
    (cutting(lambda kv: kv.positions.tolist()), "cut must be a tensor .*, not list"),
    (cutting(lambda kv: kv.positions >= 0), "cut keeps slot 33 in row 1, KV head 0, which holds no token"),
    (cutting(lambda kv: kv.live() & (kv.positions > 3)), "cut keeps nothing in row 2, KV head 0; every head"),
    (
        cutting(lambda kv: kv.live(), keeps=8, overwrites=False),
        "cut keeps 40 slots in row 0, KV head 0, but the policy declares keeps = 8",
    ),
]
VALUES = [
    (
        chosen(slots=lambda some, kv: some + 10),
        "chose slot 10 in row 2, KV head 0, whose live slots are 0 to 3",
    ),
    (chosen(slots=lambda some, kv: some - 1), "chose slot -1 in row 0, KV head 0"),
    (chosen(slots=lambda some, kv: some * 0), "chose slot 0 twice in row 0, KV head 0"),
    (chosen(counts=lambda kv: kv.lengths * 0 + 3), "counts 3 slots in row 0, KV head 0, expected 0 to S = 2"),
    (chosen(counts=lambda kv: kv.lengths * 0 - 1), "counts -1 slots"),
    (
        chosen(tail=lambda q: Tail(q[..., 0] * 0 + 2, q[:, :, 0])),
        "tail.weight goes from 2 to 2, expected 0 to 1",
    ),
    (chosen(tail=lambda q: Tail(q[..., 0] * 0, q[:, :, 0] / 0)), "tail.value is not finite"),
    (
        chosen(far=lambda slots, kv, q: Far(slots - 1, kv.lengths * 0 + 1, q)),
        "chose slot 1 twice in row 0, KV head 0",
    ),
    (
        chosen(far=lambda slots, kv, q: Far(slots + 8, kv.lengths * 0 + 1, q)),
        "chose slot 10 in row 2, KV head 0, whose live slots are 0 to 3",
    ),
    (
        chosen(far=lambda slots, kv, q: Far(slots, kv.lengths * 0 + 2, q)),
        "counts 2 slots in row 0, KV head 0, expected 0 to F = 1",
    ),
    (
        chosen(far=lambda slots, kv, q: Far(slots, kv.lengths * 0 + 1, q / 0)),
        "far.query is not finite",
    ),
    (ranked(lambda kv: kv.positions * torch.nan), "priority is NaN in row 0, KV head 0, slot 0"),
]


@pytest.mark.parametrize(("made", "message"), SHAPES, ids=[message for _, message in SHAPES])
def test_shape_type_and_device_of_an_answer_are_checked(made, message):
    with pytest.raises(UserError, match=f"policy made, layer 0: .*{message}"):
        step(made)


@pytest.mark.parametrize(("made", "message"), VALUES, ids=[message for _, message in VALUES])
def test_strict_mode_checks_the_values_of_an_answer(made, message):
    with strict(), pytest.raises(UserError, match=f"policy made, layer 0: .*{message}"):
        step(made)


@pytest.mark.parametrize("made", [made for made, _ in VALUES], ids=[message for _, message in VALUES])
def test_without_strict_mode_a_wrong_value_stays_within_its_row(made):
    """Rows computed together are what they are alone: nothing is read from, or written to, a neighbour."""
    inputs = Inputs.random()
    together = rollout(made, *inputs)
    for b in range(3):
        alone = rollout(made, *inputs.row(b))
        torch.testing.assert_close(together[b : b + 1], alone, atol=1e-5, rtol=1e-5, equal_nan=True)


def test_the_layer_is_named():
    model = tiny_llama()
    made = policy(
        for_layer=lambda self, layer, layers: ranked(lambda kv: kv.lengths) if layer == 1 else Policy()
    )
    with pytest.raises(UserError, match="policy made, layer 1: priority"):
        list(kvsieve.decode(model, random_prompts(20), made, max_new_tokens=2))


def test_the_environment_switches_strict_mode_on(monkeypatch):
    monkeypatch.setenv("KVSIEVE_STRICT", "1")
    spec = importlib.util.spec_from_file_location("kvsieve.contract.again", answers.__file__)
    again = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, again)
    spec.loader.exec_module(again)
    assert again._switch.strict
    assert not answers._switch.strict


# -------------------------------------------------------------------- the view
def test_raw_storage_cannot_be_reached_by_a_public_name():
    layer = LayerCache(make_policy("h2o", budget=10, recent=2))
    step(layer.policy, layer=layer)
    places = {store.untyped_storage().data_ptr(): name for name, store in layer.slots.stored().items()}
    for name in dir(layer.kv):
        if name.startswith("_"):
            continue
        value = getattr(layer.kv, name)
        found = places.get(value.untyped_storage().data_ptr()) if isinstance(value, torch.Tensor) else None
        assert found in (None, name), f"kv.{name} is raw storage of {found}"


def test_the_view_offers_what_the_documentation_names():
    text = Path(__file__).parents[1] / "docs" / "policy.md"
    offered = [name for name in dir(kvsieve.KVView) if not name.startswith("_")]
    documented = text.read_text()
    assert [name for name in offered if f"kv.{name}" not in documented] == []


def test_an_unknown_column_is_answered_with_the_declared_ones():
    made = policy(columns={"mass": torch.float32}, on_append=lambda self, kv, new: kv["masss"])
    with pytest.raises(UserError, match="unknown column or summary 'masss'; did you mean 'mass'"):
        step(made)
    made = policy(on_append=lambda self, kv, new: kv["values"])
    with pytest.raises(UserError, match="unknown column or summary 'values'; Legal: none"):
        step(made)


@pytest.mark.parametrize("way", ["assigned", "in place", "both"])
def test_a_column_counts_as_written_however_it_is_changed(way):
    def on_append(self, kv, new):
        column = kv["mass"]
        if way == "assigned":
            kv["mass"] = column + 1
        else:
            column += 1
        if way == "both":
            kv["mass"] += 1

    made = policy(columns={"mass": torch.float32}, on_append=on_append)
    inputs = Inputs.random((40,), steps=1)
    with kvsieve.transfer.measure() as meter:
        rollout(made, *inputs)
    assert meter.by_kind["columns"] == 41 * 2 * 4  # T, K, float32
    assert meter.written == 41 * 2 * 4 + 2 * 2 * 16 * 4  # and the new token's key and value


def test_reading_a_column_does_not_count_as_writing_it():
    made = policy(columns={"mass": torch.float32}, on_append=lambda self, kv, new: kv["mass"].sum())
    with kvsieve.transfer.measure() as meter:
        rollout(made, *Inputs.random((40,), steps=1))
    assert meter.written == 2 * 2 * 16 * 4


def test_growing_policies_keep_their_best_and_then_everything_new():
    made = policy(keeps=8, overwrites=False, priority=lambda self, kv: kv.positions.float())
    layer = LayerCache(made)
    step(made, layer=layer)
    assert layer.kv.lengths[:, 0].tolist() == [8 + 6, 8 + 6, 3 + 6]
    assert layer.kv.positions[0, 0, :14].tolist() == [*range(32, 46)]


# -------------------------------------------------------------------- who stays
def test_heads_may_keep_different_numbers_and_the_cache_then_grows():
    def cut(self, kv):
        return kv.newest(5) | kv.oldest(1) & (torch.arange(2) == 1)[:, None]

    made = policy(cut=cut)
    layer = LayerCache(made, capacity=46)
    step(made, layer=layer)
    assert layer.kv.lengths.tolist() == [[5 + 6, 6 + 6], [5 + 6, 6 + 6], [3 + 6, 3 + 6]]
    assert layer.kv.positions[0, 1, :12].tolist() == [0, *range(35, 46)]
    assert layer.slots.capacity == 6 + 6  # as the largest head needs, and what was still to come


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([8], "keeps_per_head must return a list for 2 KV heads, or None, not .8."),
        ([8, 0], "keeps_per_head must return numbers of tokens of at least 1, or None, not 0"),
        ([8, True], "at least 1, or None, not True"),
        ([None, 7], "cut keeps 8 slots in row 0, KV head 1, but the policy declares keeps = 7"),
    ],
)
def test_what_heads_keep_is_checked(answer, message):
    made = policy(
        keeps_per_head=lambda self, layer, heads: answer,
        cut=lambda self, kv: kv.newest(8),
        priority=lambda self, kv: kv.positions.float(),
    )
    with pytest.raises(UserError, match=message):
        step(made)


def test_a_full_cache_overwrites_after_a_cut_of_the_policys_own():
    made = policy(
        keeps=8,
        cut=lambda self, kv: kv.newest(5) | kv.oldest(1) & (torch.arange(2) == 1)[:, None],
        priority=lambda self, kv: -kv.positions.float().masked_fill(kv.newest(1), -torch.inf),
    )
    layer = LayerCache(made)
    step(made, layer=layer)
    assert layer.kv.lengths.tolist() == [[8, 8]] * 3
    assert sorted(layer.kv.positions[0, 0].tolist()) == [35, 36, 37, 38, 39, 40, 41, 45]
    assert sorted(layer.kv.positions[0, 1].tolist()) == [0, 35, 36, 37, 38, 39, 40, 45]


@pytest.mark.parametrize("pieces", [None, 1, 3, 39])
def test_the_last_queries_are_those_of_the_prompts_end(pieces):
    inputs, seen = Inputs.random(), []

    def cut(self, kv):
        seen.append(kvsieve.ops.window_weights(kv))

    made = policy(last_queries=5, cut=cut)
    rollout(made, *inputs, prefill_chunk=pieces)
    (weights,) = seen
    queries, keys = inputs.prefill_queries.unflatten(1, (2, 2)), inputs.keys
    for b, length in enumerate(inputs.lengths.tolist()):
        asked = queries[b, :, :, max(0, length - 5) : length]
        logits = asked @ keys[b, :, None, :length].transpose(2, 3) / 4
        later = torch.arange(length) > torch.arange(max(0, length - 5), length)[:, None]
        expected = logits.masked_fill(later, -torch.inf).softmax(-1).sum(2)
        torch.testing.assert_close(weights[b, ..., :length], expected, atol=1e-5, rtol=1e-5)
        assert not weights[b, ..., length:].any()


def test_the_window_cannot_be_asked_for_elsewhere():
    asks = {"select": lambda self, query, kv: kvsieve.ops.window_weights(kv)}
    for made in (policy(**asks), policy(last_queries=4, on_prefill=lambda self, kv: None, **asks)):
        with pytest.raises(UserError, match=r"window_weights\(kv\) is for on_prefill and cut"):
            step(made)
    with pytest.raises(UserError, match="observes the attention of the prompt: give prefill_queries"):
        rollout(TIGHT["snapkv"], None, *Inputs.random()[1:])


@pytest.mark.parametrize("pieces", [None, 7])
def test_notes_of_the_queries_last_until_the_cut(pieces):
    inputs, found = Inputs.random(), []

    def on_queries(self, kv, queries, new):
        real = torch.arange(queries.shape[3]) < new.counts[:, None]
        total = queries.masked_fill(~real[:, None, None, :, None], 0).sum(3)
        kv.notes["sum"] = kv.notes.get("sum", 0) + total

    made = policy(on_queries=on_queries, cut=lambda self, kv: found.append(kv.notes["sum"]))
    layer = LayerCache(made)
    rollout(made, *inputs, prefill_chunk=pieces, layer=layer)
    queries = inputs.prefill_queries.unflatten(1, (2, 2))
    expected = [queries[b, :, :, :length].sum(2) for b, length in enumerate(inputs.lengths.tolist())]
    torch.testing.assert_close(found, [torch.stack(expected)])
    assert layer.kv.notes == {}


def test_a_policy_that_turns_needs_a_theta_in_a_rollout():
    with pytest.raises(UserError, match="expected_attention turns queries or keys: give the rope_theta"):
        step(TIGHT["expected_attention"])


def test_a_policy_that_wants_token_ids_gets_them_in_the_order_of_its_tokens():
    inputs, found = Inputs.random((7, 4), steps=2), []
    made = policy(wants=Wants.IDS, on_append=lambda self, kv, new: found.append((new.ids, new.counts)))
    ids = torch.arange(18).view(2, 9)
    rollout(made, *inputs, ids=ids, prefill_chunk=5)
    got = [found_ids.tolist() for found_ids, _ in found]
    assert got == [
        [[0, 1, 2, 3, 4], [9, 10, 11, 12, -1]],
        [[5, 6], [-1, -1]],
        [[7], [16]],
        [[8], [17]],
    ]
    with pytest.raises(UserError, match="wants the ids of tokens, and this forward came without them"):
        rollout(made, *inputs)


def test_surprise_comes_before_the_prompt_is_cut_and_at_every_step():
    inputs, seen = Inputs.random((7, 4), steps=2), []
    surprise = torch.rand(2, 9)
    made = policy(
        wants=Wants.SURPRISE,
        columns={"surprise": torch.float32},
        on_surprise=lambda self, kv, surprise, new: kv.write(
            "surprise", new, surprise[:, None].expand(-1, 2, -1)
        ),
        cut=lambda self, kv: seen.append(kv["surprise"].clone()) or kv.newest(2),
    )
    layer = LayerCache(made)
    rollout(made, *inputs, surprise=surprise, prefill_chunk=5, layer=layer)
    (at_the_cut,) = seen
    assert torch.equal(at_the_cut[0, :, :7], surprise[:1, :7].expand(2, -1))
    assert torch.equal(at_the_cut[1, :, :4], surprise[1:, :4].expand(2, -1))
    held = layer.kv["surprise"]  # the last two of the prompt, and two steps
    assert torch.equal(held[0, 1], surprise[0, 5:])
    assert torch.equal(held[1, 1], torch.cat([surprise[1, 2:4], surprise[1, 7:]]))
    with pytest.raises(UserError, match="wants the surprise of tokens: give it"):
        rollout(made, *inputs)


@pytest.mark.parametrize(
    "half", [{"wants": Wants.SURPRISE}, {"on_surprise": lambda self, kv, surprise, new: None}]
)
def test_surprise_is_wanted_and_heard(half):
    with pytest.raises(UserError, match="has one of `on_surprise.* and needs both"):
        LayerCache(policy(**half))


def test_a_mask_of_a_prompt_is_checked():
    def sees(answer):
        return policy(sees=lambda self, kv, new: answer)

    with pytest.raises(UserError, match=r"sees has the shape \[2\], expected \[B, Q, T\] = \[3, 40, 40\]"):
        step(sees(torch.ones(2, dtype=torch.bool)))
    with pytest.raises(UserError, match="sees is float32, expected bool"):
        step(sees(torch.ones(3, 40, 40)))
    blind = sees(torch.ones(3, 40, 40, dtype=torch.bool).tril(-1))
    with strict(), pytest.raises(UserError, match="sees: new token 0 of row 0 does not see itself"):
        step(blind)


def test_steps_alone_may_be_observed():
    seen = []
    made = policy(observes=Observe.STEP_MASS, on_attend=lambda self, kv, mass: seen.append(mass.sum(2)))
    step(made)
    torch.testing.assert_close(torch.stack(seen), torch.ones(6, 3, 2))  # six steps, no prompt


# -------------------------------------------------------------------- wrappers
@dataclass(frozen=True)
class Counting(Wrapper):
    """Counts the steps in a column of its own."""

    inner: Policy
    name: ClassVar[str] = "counting"
    own_columns = {"age": torch.int64}
    own_summaries = {"steps": torch.int64}

    def on_append(self, kv, new):
        self.inner.on_append(kv, new)
        kv[self.own("age")] += 1
        kv[self.own("steps")] += 1


@pytest.mark.parametrize("inner", ["sparq", "h2o", "local_window", "dense", "tova", "snapkv", "adakv"])
def test_a_wrapper_forwards_everything(inner):
    plain = TIGHT[inner]
    wrapped = Counting(Counting(plain))
    layer = LayerCache(wrapped)
    # Its columns keep heads from being packed; the reference adds up packed and padded heads in one order.
    with kvsieve.ops.use("reference"):
        assert torch.equal(step(wrapped, layer=layer), step(plain))
    assert layer.policy.keeps == plain.keeps
    assert layer.policy.key_layout == plain.key_layout
    assert {"counting.age", "counting.counting.age"} <= set(wrapped.columns)
    assert layer.kv["counting.steps"].eq(layer.kv["counting.counting.steps"]).all()


def ranked(answer, **members):
    return policy(keeps=8, priority=lambda self, kv: answer(kv), **members)


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (lambda kv: kvsieve.Ranking(kv.positions, newest=-1), "newest must be a number of tokens.* not -1"),
        (lambda kv: kvsieve.Ranking(kv.positions, oldest=True), "oldest must be a number .* not True"),
        (lambda kv: kvsieve.Ranking(kv.positions.int()), r"priority, Ranking.by is int32, expected .*int64"),
        (lambda kv: kvsieve.Ranking(kv.positions[:, :1]), r"Ranking.by has the shape \[3, 1, .*expected"),
        (lambda kv: kv.positions, "priority is int64, expected"),
    ],
)
def test_a_ranking_that_cannot_be_is_refused(answer, message):
    with pytest.raises(UserError, match=message):
        step(ranked(answer))


def test_a_ranking_says_what_its_numbers_say():
    def numbers(kv):
        ranks = kv["mass"].masked_fill(kv.newest(3), torch.inf)
        return ranks.masked_fill(kv.oldest(2), torch.inf)

    members = {"columns": {"mass": torch.float32}, "observes": Observe.MASS, "adds_mass_to": "mass"}
    told = ranked(lambda kv: kvsieve.Ranking(kv["mass"], newest=3, oldest=2), **members)
    members |= {"on_attend": lambda self, kv, mass: kv.__setitem__("mass", kv["mass"] + mass)}
    assert torch.equal(step(told), step(ranked(numbers, **members)))


def test_a_wrapper_hears_of_the_mass_that_attention_would_add_itself():
    @dataclass(frozen=True)
    class Hears(Wrapper):
        inner: Policy
        name: ClassVar[str] = "hears"
        heard: ClassVar[list[torch.Size]] = []

        def on_attend(self, kv, mass):
            self.heard.append(mass.shape)
            self.inner.on_attend(kv, mass)

    plain, wrapped = LayerCache(TIGHT["h2o"]), LayerCache(Hears(TIGHT["h2o"]))
    assert (plain.mass_column, wrapped.mass_column) == ("mass", None)
    assert torch.equal(step(wrapped.policy, layer=wrapped), step(plain.policy, layer=plain))
    assert torch.equal(wrapped.kv["mass"], plain.kv["mass"])
    assert Hears.heard


def test_a_column_changed_after_it_was_handed_in_is_refused():
    def on_append(self, kv, new):
        norm = new.keys.norm(dim=-1)
        kv.write("norm", new, norm)
        norm.zero_()

    with pytest.raises(UserError, match="kv.write.'norm', new, column.*changed in place"):
        step(policy(columns={"norm": torch.float32}, on_append=on_append))


def test_what_on_append_reads_is_there():
    found = []

    def on_append(self, kv, new):
        kv.write("norm", new, new.keys.norm(dim=-1))
        if new.keys.shape[2] == 1:
            found.append((kv["norm"].gather(2, new.slots), kv.at("keys", new.slots, kv.lengths * 0 + 1)))
            kv.write("norm", new, found[-1][0] * 2)  # behind the token, in a write of its own

    layer = LayerCache(policy(columns={"norm": torch.float32}, on_append=on_append))
    step(layer.policy, layer=layer)
    norm, keys = found[-1]
    torch.testing.assert_close(norm, keys.norm(dim=-1))
    newest = (layer.kv.lengths - 1)[..., None]
    torch.testing.assert_close(layer.kv["norm"].gather(2, newest), 2 * norm)


def test_a_plain_dense_policy_inside_a_wrapper_survives_its_spec():
    made = make_policy("dense_layers", layers=[0], inner=Policy())
    assert made.spec() == {"dense_layers": {"layers": [0], "inner": {"dense": {}}}}
    assert specs.make_policy(made.spec()) == made


def test_a_layout_is_what_the_policy_declares():
    assert make_policy("sparq", layout="blocked").key_layout == KeyLayout("blocked")
