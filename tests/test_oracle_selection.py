"""Policies that read a part reproduce the authors' code, and its definition for query groups (tests/data)."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from kvsieve import UserError, make_policy, transfer
from kvsieve.testing import Inputs, rollout
from kvsieve.testing.spy import Spy

DATA = Path(__file__).parent / "data"
TOLERANCE = 1e-4


@functools.cache
def cases(method):
    """By case: its arrays, and `params` read."""
    found = {}
    with np.load(DATA / f"{method}.npz") as file:
        for name in file.files:
            case, array = name.split("/")
            held = file[name]
            found.setdefault(case, {})[array] = json.loads(str(held)) if array == "params" else held
    return found


def variants(method):
    """(case, suffix of its arrays) of all that is defined for one set per KV head."""
    for case, given in cases(method).items():
        grouped = given["queries"].shape[1] > given["keys"].shape[1]
        for array in given:
            if array.startswith("outputs") and ("kvhead" in array or not grouped):
                yield case, array.removeprefix("outputs")


def check(policy, given, suffix):
    """The policy's chosen sets and outputs are those of the arrays with this suffix."""
    queries, keys, values = (torch.from_numpy(given[name]).float() for name in ("queries", "keys", "values"))
    lengths, prompt = torch.from_numpy(given["lengths"]), int(given["P"])
    spy = Spy(policy)
    got = rollout(spy, None, queries, keys, values, lengths=lengths)
    wanted = torch.from_numpy(given[f"outputs{suffix}"])
    torch.testing.assert_close(got, wanted, atol=TOLERANCE, rtol=TOLERANCE)
    sets = given[f"selected{suffix}"]  # [B, K, N, P + N] by column
    for step, (selection, live) in enumerate(zip(spy.notes.selections, spy.notes.lengths, strict=True)):
        for b in range(keys.shape[0]):
            columns = [*range(int(lengths[b])), *range(prompt, prompt + step + 1)]  # by slot
            for k in range(keys.shape[1]):
                chosen = range(int(live[b, k]))
                if selection is not None:
                    chosen = selection.slots[b, k, : int(selection.counts[b, k])].tolist()
                assert sorted(columns[slot] for slot in chosen) == sets[b, k, step].nonzero()[0].tolist()


# ---------------------------------------------------------------- Quest
@pytest.mark.parametrize(("case", "suffix"), [*variants("quest")])
def test_quest(case, suffix):
    given = cases("quest")[case]
    how = (
        {}
        if suffix.endswith("kernel")
        else {"newest_page": False, "floor": given["params"]["floor_pages_eval"]}
    )
    group_score = "mean" if "mean" in suffix else "max"
    policy = make_policy(
        "quest",
        pages=given["params"]["page_budget"],
        page=given["params"]["page"],
        group_score=group_score,
        **how,
    )
    check(policy, given, suffix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("length", "pages", "page"), [(60, 3, 4), (61, 3, 4), (62, 5, 8), (63, 1, 16)])
def test_quest_moves_what_its_formula_says(dtype, length, pages, page):
    """2 ceil(T / p) D e + 2 min(T, pages p) D e per KV head; where the newest page is begun only, less."""
    inputs = Inputs.random((length,), steps=1)
    inputs = Inputs(*(x.to(dtype) if x.is_floating_point() else x for x in inputs))
    with transfer.measure() as meter:
        rollout(make_policy("quest", pages=pages, page=page), *inputs)
    tokens, size, kv_heads = length + 1, 16 * dtype.itemsize, 2
    begun = tokens % page or page
    read = min(tokens, (pages - 1) * page + begun)
    assert meter.read == kv_heads * (2 * -(-tokens // page) * size + 2 * read * size)
    if begun == page:
        assert read == min(tokens, pages * page)
    assert meter.written == kv_heads * (2 * size + 2 * size)  # the token, and its page's bounds


@pytest.mark.parametrize("ratio", [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32])
def test_quest_at_a_compression_reads_that_share_its_bounds_included(ratio):
    context = 4096
    policy = type(make_policy("quest")).for_compression(ratio, 64, context)
    bytes_read = 2 / policy.page * context + 2 * policy.pages * policy.page
    assert bytes_read / (2 * context) == pytest.approx(ratio, rel=0.02)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"pages": 0}, "quest.pages must be at least 1, not 0"),
        ({"page": 0}, "quest.page must be at least 1, not 0"),
        ({"floor": -1}, "quest.floor must be at least 1, not -1"),
        ({"group_score": "softmax"}, "'max'.*'mean'.*'softmax'"),
        ({"budget": 64}, "budget"),
    ],
)
def test_quest_refuses_what_it_cannot_do(wrong, message):
    with pytest.raises(UserError, match=message):
        make_policy("quest", **wrong)
