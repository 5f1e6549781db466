"""Results kept from step to step: on_select, kv.steps, summaries of free size, and refresh."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import kvsieve
from kvsieve import KVCache, Policy, Selection, UserError, Wrapper, make_policy, transfer
from kvsieve.attention import decode_step, prefill
from kvsieve.testing import Inputs, LayerCache, rollout, strict
from kvsieve.testing.spy import Spy
from tests.models import random_prompts, tiny_llama

QUEST = make_policy("quest", pages=3, page=4)
SPARQ = make_policy("sparq", r=4, k=8, local=2)


def refresh(inner, every=3):
    return make_policy("refresh", inner=inner.spec(), every=every)


def chosen(policy, inputs):
    """By step: the chosen slots of every row and KV head, as sets."""
    spy = Spy(policy)
    rollout(spy, *inputs)
    for selection, lengths in zip(spy.notes.selections, spy.notes.lengths, strict=True):
        b, k = lengths.shape
        yield [
            set(selection.slots[i, j, : int(selection.counts[i, j])].tolist())
            for i in range(b)
            for j in range(k)
        ]


@pytest.mark.parametrize("inner", [QUEST, SPARQ], ids=["quest", "sparq"])
def test_between_searches_the_same_slots_are_read_and_those_since(inner):
    inputs = Inputs.random((40, 33), steps=7)
    searched = list(chosen(inner, inputs))
    lengths = [length + step + 1 for step in range(7) for length in (40, 40, 33, 33)]
    for step, sets in enumerate(chosen(refresh(inner), inputs)):
        age = step % 3
        for head, got in enumerate(sets):
            length = lengths[4 * step + head]
            assert got == searched[step - age][head] | set(range(length - age, length))


def test_every_step_is_the_inner_policy():
    inputs = Inputs.random()
    for inner in (QUEST, SPARQ):
        assert torch.equal(rollout(refresh(inner, every=1), *inputs), rollout(inner, *inputs))


def test_the_tail_stays_as_it_was_at_the_search():
    inputs, spy = Inputs.random((40,)), Spy(refresh(SPARQ))
    rollout(spy, *inputs)
    tails = [selection.tail for selection in spy.notes.selections]
    for step in (1, 2, 4, 5):
        searched = step - step % 3
        assert torch.equal(tails[step].weight, tails[searched].weight)
        torch.testing.assert_close(tails[step].value, inputs.values[:, :, : 41 + searched].mean(2))
    assert not torch.equal(tails[0].weight, tails[3].weight)


def test_between_searches_nothing_is_searched_and_the_meter_shows_it():
    inputs, layer, read = Inputs.random((44,), steps=4), LayerCache(refresh(QUEST, every=4)), []
    layer.update(inputs.keys[:, :, :44], inputs.values[:, :, :44])
    prefill(layer, inputs.prefill_queries.unflatten(1, (2, 2)))
    for step in range(4):
        at = slice(44 + step, 45 + step)
        layer.update(inputs.keys[:, :, at], inputs.values[:, :, at])
        with transfer.measure() as meter:
            decode_step(layer, inputs.step_queries[:, :, step].unflatten(1, (2, 2)))
        read.append(meter.by_kind)
    token, kv_heads = 16 * 4, 2
    first = 12 - 3  # at the search, with 45 tokens, the newest of the three pages held one
    assert read[0]["columns"] == 2 * 12 * token * kv_heads
    for age in (1, 2, 3):
        assert read[age]["columns"] == 2 * token * kv_heads  # Quest's bounds of the newest page, widened
        assert read[age]["keys"] == read[age]["values"] == (first + age) * token * kv_heads
        assert (
            read[age]["summaries"] == (12 * 4 + 4 + 8) * kv_heads
        )  # slots, how many, where the search ended


def test_where_everything_was_read_everything_is_read_until_the_next_search():
    inputs = Inputs.random((10,), steps=6)  # with 13 tokens Quest begins to leave some out
    spy = Spy(refresh(QUEST, every=5))
    rollout(spy, *inputs)
    assert [selection is None for selection in spy.notes.selections] == [True] * 5 + [False]


@dataclass(frozen=True)
class Notes(Policy):
    """Notes the steps that it is told of, and what it finds of the step before."""

    found: tuple[list, ...] = ([],)
    name: ClassVar[str] = "notes"
    summaries = {"chosen": (torch.int64, "S")}
    capturable = False

    def select(self, query, kv):
        self.found[0].append((kv.steps, kv["chosen"].shape[2]))
        many = 3 + kv.steps
        slots = torch.arange(many).expand(*kv.lengths.shape, many)
        return Selection(slots, kv.lengths.clamp(max=many))

    def on_select(self, kv, selection):
        kv["chosen"] = selection.slots


def test_steps_count_from_the_prompt_and_free_sizes_begin_empty_in_every_turn():
    policy = Notes(([],))
    layer, inputs = LayerCache(policy), Inputs.random(steps=3)
    rollout(policy, *inputs, layer=layer)
    rollout(policy, *inputs, layer=layer)  # the next turn
    layer.reset()
    rollout(policy, *inputs, layer=layer, prefill_chunk=7)
    assert policy.found[0] == [(1, 0), (2, 4), (3, 5)] * 3
    layer.reorder_cache(torch.tensor([2, 0]))
    assert layer.kv["chosen"].shape == (2, 2, 6)
    layer.reset()
    assert layer.kv["chosen"].shape == (2, 2, 0)
    assert layer.kv.steps == 0


def test_a_wrapper_is_told_what_was_chosen():
    @dataclass(frozen=True)
    class Plain(Wrapper):
        inner: Policy
        name: ClassVar[str] = "plain"

    policy = Notes(([],))
    rollout(Plain(policy), *Inputs.random(steps=2))
    assert policy.found[0] == [(1, 0), (2, 4)]


def test_a_summary_of_free_size_cannot_be_captured():
    @dataclass(frozen=True)
    class Captured(Notes):
        capturable = True

    with pytest.raises(UserError, match="declare `capturable = False`, or a size"):
        LayerCache(Captured())
    with pytest.raises(UserError, match=r"columns\['x'\] must be"):
        LayerCache(dataclass(frozen=True)(type("Made", (Policy,), {"columns": {"x": (torch.int64, "S")}}))())


@pytest.mark.parametrize("inner", [QUEST, SPARQ], ids=["quest", "sparq"])
def test_rows_of_a_model_that_end_at_different_steps(inner):
    model, prompts = tiny_llama(), random_prompts(30, 17)
    cache = KVCache(model, refresh(inner))
    tokens = torch.stack(
        list(kvsieve.decode(model, prompts, refresh(inner), max_new_tokens=9, cache=cache)), 1
    )
    end = next(token for token in tokens[0].tolist()[1:5] if token not in tokens[1].tolist())
    with strict():
        both = list(kvsieve.decode(model, prompts, refresh(inner), max_new_tokens=9, eos_token_id=end))
    assert torch.equal(torch.stack(both, 1)[1], tokens[1])
    alone = list(kvsieve.decode(model, prompts[1:], refresh(inner), max_new_tokens=9))
    assert torch.equal(torch.stack(alone, 1)[0], tokens[1])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"inner": "quest", "every": 0}, "refresh.every must be at least 1 step, not 0"),
        ({"inner": "h2o"}, "refresh.inner is h2o, which drops tokens"),
        ({"every": 2}, "inner"),
    ],
)
def test_refresh_refuses_what_it_cannot_do(wrong, message):
    with pytest.raises(UserError, match=message):
        make_policy("refresh", **wrong)


def test_where_steps_cannot_be_counted_every_step_searches():
    inputs, policy = Inputs.random((44,), steps=4), refresh(QUEST)
    layer = LayerCache(Spy(policy))
    layer.update(inputs.keys[:, :, :44], inputs.values[:, :, :44])
    prefill(layer, inputs.prefill_queries.unflatten(1, (2, 2)))
    layer.fix_shapes(48)
    for step in range(4):
        at = slice(44 + step, 45 + step)
        layer.update(inputs.keys[:, :, at], inputs.values[:, :, at])
        decode_step(layer, inputs.step_queries[:, :, step].unflatten(1, (2, 2)))
        assert layer.kv.steps == 1
    assert [int(selection.counts.max()) for selection in layer.policy.notes.selections] == [9, 10, 11, 12]
