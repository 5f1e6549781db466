"""HiP: the tree search of its paper, searched now and then (tests/data/README.md)."""

import itertools

import pytest
import torch

from kvsieve import UserError, make_policy, transfer
from kvsieve.testing import Inputs, rollout, strict
from kvsieve.testing.spy import Spy
from tests.test_oracle_selection import cases, check, variants


@pytest.mark.parametrize(("case", "suffix"), [*variants("hip")])
def test_hip(case, suffix):
    given = cases("hip")[case]
    params = given["params"]
    policy = make_policy(
        "hip",
        k=params["k"],
        sinks=params["sink"],
        window=params["window"],
        refresh=params["refresh"],
        group_score="mean" if "mean" in suffix else "max",
    )
    with strict(), transfer.measure() as meter:
        check(policy, given, suffix)
    if not suffix:  # per query head, as the count of the definition
        asked = (meter.by_kind["keys"] - meter.by_kind["values"]) / (given["keys"].shape[3] * 4)
        heads_and_steps = given["queries"][..., 0].size
        assert asked / heads_and_steps == pytest.approx(params["keys_asked_per_head_and_step"])


def read_by_step(policy, length, steps, dtype=torch.float32):
    """By step: the bytes of each kind that were read so far; chosen slots of the first row and head."""
    found = []
    spy = Spy(policy)
    for many in range(steps + 1):
        inputs = Inputs.random((length,), steps=steps)
        inputs = Inputs(*(x.to(dtype) if x.is_floating_point() else x for x in inputs))
        inputs = inputs._replace(
            keys=inputs.keys[:, :, : length + many],
            values=inputs.values[:, :, : length + many],
            step_queries=inputs.step_queries[:, :, :many],
        )
        if many == 0:
            found.append({})
            continue
        spy.notes.selections.clear()
        with transfer.measure() as meter:
            rollout(spy, *inputs)
        found.append(dict(meter.by_kind))
    kinds = found[-1]
    each = [
        {kind: now.get(kind, 0) - before.get(kind, 0) for kind in kinds}
        for before, now in itertools.pairwise(found)
    ]
    return each, [selection.slots[0, 0].tolist() for selection in spy.notes.selections]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_between_searches_nothing_is_searched_and_a_step_moves_what_the_formula_says(dtype):
    """Keys asked * D e at a search, 4 k + 4 for what it found between, 2 (sinks + k + window) D e always."""
    policy = make_policy("hip", k=4, sinks=2, window=5, refresh=3)
    each, chosen = read_by_step(policy, 44, 7, dtype)
    kv_heads, key = 2, 16 * dtype.itemsize
    for step, read in enumerate(each):
        length = 45 + step
        assert read["values"] == kv_heads * (2 + 4 + 5) * key
        asked = (read["keys"] - read["values"]) / key
        assert read["summaries"] == (kv_heads * (4 * 4 + 4) if step % 3 else 0)
        if step % 3:
            assert asked == 0
        else:  # 38 tokens and more in 8 chunks: 3 levels of 8 keys, or 4 where a chunk of 3 is left
            assert 3 * 8 <= asked / kv_heads <= 4 * 8
        assert set(chosen[step]) == {0, 1, *range(length - 5, length), *chosen[step - step % 3][7:11]}


def test_a_row_that_left_nothing_out_is_read_whole_until_the_next_search():
    policy = make_policy("hip", k=4, sinks=2, window=5, refresh=4)
    spy, inputs = Spy(policy), Inputs.random((40, 9), steps=6)
    with strict():
        rollout(spy, *inputs)
    counts = [selection.counts[:, 0].tolist() for selection in spy.notes.selections]
    assert counts == [[11, 10], [11, 11], [11, 12], [11, 13], [11, 11], [11, 11]]


def test_a_row_is_asked_no_more_for_its_neighbours():
    """A short row has no more levels beside a long one."""
    policy, read = make_policy("hip", k=4, sinks=2, window=5, refresh=1), []
    for lengths in ((20,), (90,), (90, 20)):
        inputs = Inputs.random((90, 20), steps=1)
        rows = [inputs.row({90: 0, 20: 1}[length]) for length in lengths]
        given = inputs if len(rows) == 2 else rows[0]
        with transfer.measure() as meter:
            rollout(policy, *given)
        read.append(meter.by_kind["keys"])
    assert read[2] == read[0] + read[1]


def test_what_twilight_leaves_of_it_is_what_is_read_until_the_next_search():
    hip = {"hip": {"k": 6, "sinks": 2, "window": 5, "refresh": 4}}
    spy = Spy(make_policy("twilight", inner=hip, p=0.5))
    with strict():
        rollout(spy, *Inputs.random((40,), steps=4))
    sets = [set(s.slots[0, 0, : int(s.counts[0, 0])].tolist()) for s in spy.notes.selections]
    assert len(sets[0]) < 13
    for step in (1, 2, 3):
        assert sets[step] <= sets[0] | {0, 1, *range(36, 45)}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"k": 0}, "hip.k must be at least 1, not 0"),
        ({"sinks": -1}, "hip.sinks must be at least 0, not -1"),
        ({"window": -1}, "hip.window must be at least 0, not -1"),
        ({"refresh": 0}, "hip.refresh must be at least 1, not 0"),
        ({"group_score": "softmax"}, "'max'.*'mean'.*'softmax'"),
    ],
)
def test_hip_refuses_what_it_cannot_do(wrong, message):
    with pytest.raises(UserError, match=message):
        make_policy("hip", **wrong)
