"""Policies that read a part reproduce the authors' code, and its definition for query groups (tests/data)."""

import functools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from kvsieve import UserError, make_policy, ops, transfer
from kvsieve.ops import reference
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


# ---------------------------------------------------------------- Double Sparsity
def saved(folder, **tensors):
    """A calibration file of one layer."""
    path = folder / "calibration.safetensors"
    save_file({f"layers.0.{name}": tensor.contiguous() for name, tensor in tensors.items()}, path)
    return str(path)


def group_score_of(suffix):
    return next((how for how in ("softmax", "mean", "max") if suffix.endswith(how)), "max")


@pytest.mark.parametrize(("case", "suffix"), [*variants("double_sparsity")])
def test_double_sparsity(tmp_path, case, suffix):
    given = cases("double_sparsity")[case]
    params, bits = given["params"], given["params"]["label_bits"]
    policy = make_policy(
        "double_sparsity",
        calibration=saved(tmp_path, channels=torch.from_numpy(given["channels_kv"])),
        r=params["r"],
        k=params["heavy_const"],
        bits=bits,
        group_score=group_score_of(suffix),
        quantise_query=bits == 4 and suffix == "",
    )
    check(policy, given, suffix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("bits", "label"), [(16, lambda e: 6 * e), (4, lambda e: 6 / 2 + 2 * e)])
@pytest.mark.parametrize("group_score", ["max", "softmax"])
def test_double_sparsity_moves_what_its_formula_says(tmp_path, dtype, bits, label, group_score):
    """T (r b / 8 + ranges) + 2 k D e per KV head and row; the channels, 8 r per KV head, once a step.

    The ranges are two numbers as the keys are.
    """
    path = saved(tmp_path, channels=torch.arange(16).expand(2, 16).short())
    policy = make_policy("double_sparsity", calibration=path, r=6, k=10, bits=bits, group_score=group_score)
    meter = one_step(policy, dtype)
    rows_and_heads, e = 2 * 2, dtype.itemsize
    assert meter.by_kind["columns"] == rows_and_heads * 51 * label(e)
    assert meter.by_kind["keys"] == meter.by_kind["values"] == rows_and_heads * 10 * 16 * e
    assert meter.by_kind["static"] == 2 * 6 * 8
    assert meter.read == rows_and_heads * (51 * label(e) + 2 * 10 * 16 * e) + 2 * 6 * 8
    assert meter.written == rows_and_heads * (2 * 16 * e + label(e))


@pytest.mark.parametrize("layout", ["double", "blocked"])
@pytest.mark.parametrize("group_score", ["max", "mean"])
def test_without_labels_the_channels_of_the_keys_are_read(tmp_path, layout, group_score):
    path = saved(tmp_path, channels=torch.arange(16).expand(2, 16).short())
    given = {"calibration": path, "r": 6, "k": 10, "group_score": group_score}
    meter = one_step(make_policy("double_sparsity", bits=0, layout=layout, **given), torch.float32)
    assert meter.by_kind["channels"] == 2 * 2 * 51 * 6 * 4
    assert meter.read == 2 * 2 * (51 * 6 + 2 * 10 * 16) * 4 + 2 * 6 * 8
    inputs = Inputs.random()
    labelled = make_policy("double_sparsity", bits=16, **given)
    unlabelled = make_policy("double_sparsity", bits=0, layout=layout, **given)
    torch.testing.assert_close(rollout(unlabelled, *inputs), rollout(labelled, *inputs))


def one_step(policy, dtype):
    """The meter of one step of two rows over 51 tokens."""
    inputs = Inputs.random((50, 50), steps=1)
    inputs = Inputs(*(x.to(dtype) if x.is_floating_point() else x for x in inputs))
    with transfer.measure() as meter:
        rollout(policy, *inputs)
    return meter


@pytest.mark.parametrize("heads", [2, 4])
def test_with_sparqs_own_channels_double_sparsity_is_sparq_without_temperature(tmp_path, monkeypatch, heads):
    monkeypatch.setattr(reference.scores, "tempered", untempered)
    inputs = Inputs.random((40,), steps=1)
    query = inputs.step_queries[:, :heads]
    channels = reference.top_channels(query.unflatten(1, (2, -1))[:, :, :, 0], 5)[0]
    path = saved(tmp_path, channels=channels)
    given = {"calibration": path, "r": 5, "k": 9, "group_score": "softmax"}
    policies = (
        *(make_policy("double_sparsity", bits=bits, **given) for bits in (16, 0)),
        make_policy("sparq", r=5, k=9, local=0, mean_value=False),
    )
    with ops.use("reference"):
        found = [rollout(policy, None, query, inputs.keys, inputs.values) for policy in policies]
    torch.testing.assert_close(found[0], found[2])
    torch.testing.assert_close(found[1], found[2])


def untempered(query, channels, scale):
    chosen = query.gather(3, channels[:, :, None].expand(-1, -1, query.shape[2], -1))
    return chosen, torch.full(query.shape[:3], scale)


# ---------------------------------------------------------------- Loki
@pytest.mark.parametrize(("case", "suffix"), [*variants("loki")])
def test_loki(tmp_path, case, suffix):
    given = cases("loki")[case]
    policy = make_policy(
        "loki",
        calibration=saved(tmp_path, basis=torch.from_numpy(given["basis"])),
        r=given["params"]["top_r"],
        k=given["params"]["top_k"],
        group_score=group_score_of(suffix),
    )
    check(policy, given, suffix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("k", "tokens"), [(10, 10), (0.25, 12)])
def test_loki_moves_what_its_formula_says(tmp_path, dtype, k, tokens):
    """T r e + 2 k D e per KV head and row; the basis, 4 D r per KV head, once a step."""
    path = saved(tmp_path, basis=torch.eye(16).expand(2, 16, 16))
    meter = one_step(make_policy("loki", calibration=path, r=5, k=k), dtype)
    rows_and_heads, e, static = 2 * 2, dtype.itemsize, 2 * 16 * 5 * 4
    assert meter.by_kind["static"] == static
    assert meter.read == rows_and_heads * (51 * 5 * e + 2 * tokens * 16 * e) + static


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("double_sparsity", {"r": 0}, "r must be at least 1"),
        ("double_sparsity", {"bits": 8}, "bits"),
        ("double_sparsity", {"r": 5}, "r must be even with 4 bits, not 5"),
        ("double_sparsity", {"bits": 16, "quantise_query": True}, "goes with bits = 4"),
        ("double_sparsity", {"layout": "single"}, "layout"),
        ("double_sparsity", {"layout": "double"}, "layout goes with bits = 0"),
        ("double_sparsity", {"block": 5}, "a block of keys holds 16, 32, 64 tokens, not 5"),
        ("double_sparsity", {"k": 0}, "k must be at least 1"),
        ("double_sparsity", {"group_score": "sum"}, "group_score"),
        ("loki", {"k": 0}, "share above 0"),
        ("loki", {"k": 2.5}, "share above 0"),
        ("loki", {"r": 0}, "r must be at least 1"),
        ("loki", {"group_score": "sum"}, "group_score"),
    ],
)
def test_parameters_that_cannot_be_are_refused(name, wrong, message):
    with pytest.raises(UserError, match=message):
        make_policy(name, calibration="some", **wrong)


# ---------------------------------------------------------------- Twilight
def twilight_cases():
    """All but `mha_ds`, whose labels have 2 bits. The authors' kernel only where its set is the smallest."""
    for case, suffix in variants("twilight"):
        params = cases("twilight")[case]["params"]
        if params["base"] != "ds" and (suffix or params["kernel_set_is_smallest_set"]):
            yield case, suffix


@pytest.mark.parametrize(("case", "suffix"), [*twilight_cases()])
def test_twilight(case, suffix):
    given = cases("twilight")[case]
    params, inner = given["params"], "dense"
    if params["base"] == "quest":
        budget, page = params["base_args"]["token_budget"], params["base_args"]["chunk_size"]
        inner = {
            "quest": {"pages": -(-budget // page), "page": page, "newest_page": False, "group_score": "mean"}
        }
    group_score = "mean" if "mean" in suffix else "union"
    check(make_policy("twilight", inner=inner, p=params["p"], group_score=group_score), given, suffix)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("group_score", ["union", "mean"])
@pytest.mark.parametrize("pages", [None, 3])
def test_twilight_moves_what_its_formula_says(dtype, group_score, pages):
    """The base's side, B0 (D / 2 + ranges), and 2 |union| D e per KV head."""
    inner = "dense" if pages is None else {"quest": {"pages": pages, "page": 4}}
    inputs = Inputs.random((51,), steps=1)
    inputs = Inputs(*(x.to(dtype) if x.is_floating_point() else x for x in inputs))
    spy = Spy(make_policy("twilight", inner=inner, p=0.5, group_score=group_score))
    with transfer.measure() as meter:
        rollout(spy, *inputs)
    read = int(spy.notes.selections[0].counts.sum())
    candidates, side = (52, 0) if pages is None else (12, 2 * 13 * 16 * dtype.itemsize)
    assert 0 < read < 2 * candidates
    assert meter.by_kind["columns"] == 2 * (side + candidates * (16 / 2 + 2 * dtype.itemsize))
    assert meter.by_kind["keys"] == meter.by_kind["values"] == read * 16 * dtype.itemsize


def test_twilight_on_sparq_reads_some_of_sparqs_tokens():
    inputs = Inputs.random()
    sparq = make_policy("sparq", r=4, k=12, local=2)
    notes = []
    for policy in (sparq, make_policy("twilight", inner=sparq.spec(), p=0.6)):
        spy = Spy(policy)
        rollout(spy, *inputs)
        notes.append(spy.notes.selections)
    for all_of_them, some in zip(*notes, strict=True):
        assert bool((some.counts <= all_of_them.counts).all())
        assert int(some.counts.sum()) < int(all_of_them.counts.sum())
        assert torch.equal(some.tail.weight, all_of_them.tail.weight)
        mine, theirs = (set(s.slots[0, 0, : int(s.counts[0, 0])].tolist()) for s in (some, all_of_them))
        assert mine <= theirs


CUT = ["adakv", "pyramidkv", "kvzip", {"dense_layers": {"layers": [0], "inner": "adakv"}}]
CUT += [{"duo_attention": {"full_heads": [[0]]}}, {"anllm": {"anchors": [1]}}]


@pytest.mark.parametrize("wrapper", ["twilight", "refresh"])
@pytest.mark.parametrize("inner", ["h2o", "snapkv", "local_window", *CUT], ids=str)
def test_methods_that_read_a_part_refuse_those_that_drop_tokens(wrapper, inner):
    name = inner if isinstance(inner, str) else next(iter(inner))
    with pytest.raises(UserError, match=f"{wrapper}.inner is {name}, which drops tokens"):
        make_policy(wrapper, inner=inner)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"p": 0.0}, "p must be above 0 and at most 1"),
        ({"p": 1.2}, "p must be above 0 and at most 1"),
        ({"bits": 3}, "bits"),
        ({"group_score": "max"}, "group_score"),
        ({"inner": "h2o"}, "twilight.inner is h2o, which drops tokens"),
    ],
)
def test_twilight_refuses_what_it_cannot_do(wrong, message):
    with pytest.raises(UserError, match=message):
        make_policy("twilight", **({"inner": "dense"} | wrong))
