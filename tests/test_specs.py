"""Policies from plain data: one strictness, through whichever door they come."""

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, ClassVar, Literal

import numpy as np
import pytest
from pydantic import Field

from kvsieve import Policy, UserError, make_policy, specs, values
from kvsieve.bench.contenders import contenders
from kvsieve.compare import config
from kvsieve.compare.sweep import policy_from_options


def through_make_policy(key, value, folder):
    make_policy("sparq", **{key: value})


def through_yaml(key, value, folder):
    path = folder / "it.yaml"
    path.write_text(
        config.dump({"model": "reference", "tasks": ["needle"], "policies": [{"sparq": {key: value}}]})
    )
    config.load(path)


def through_generate(key, value, folder):
    policy_from_options(config.dump({"sparq": {key: value}}), None, [])


def through_the_parameters_of_generate(key, value, folder):
    policy_from_options("sparq", None, [config.dump({key: value}).strip().strip("{}").replace(": ", "=")])


def through_bench(key, value, folder):
    contenders([config.dump({"sparq": {key: value}})], ["double"], 64, 1024)


@pytest.mark.parametrize(
    "door",
    [through_make_policy, through_yaml, through_generate, through_the_parameters_of_generate, through_bench],
)
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("k", True, "sparq.k: must be an integer (got True)"),
        ("k", "16", "sparq.k: must be an integer (got '16')"),
        ("k", 1.5, "sparq.k: must be an integer (got 1.5)"),
        ("k", None, "sparq.k: must be an integer (got None)"),
        ("mean_value", 1, "sparq.mean_value: must be true or false (got 1)"),
        ("mean_value_limit", "1", "sparq.mean_value_limit: must be a number (got '1')"),
        ("mean_value_limit", float("nan"), "sparq.mean_value_limit: must be a number (got nan)"),
        ("group_score", "mean", "sparq.group_score: must be 'softmax' or 'logits' (got 'mean')"),
        (
            "compression",
            2,
            "sparq.compression: must be a fraction of dense attention's bytes, above 0 and up to 1",
        ),
        ("compression", True, "sparq.compression: must be a fraction of dense attention's bytes"),
        ("rr", 3, "sparq.rr: unknown parameter of sparq 'rr'; did you mean 'r'? Legal: block, compression"),
        ("k", 0, "sparq.k must be at least 1, not 0"),
    ],
)
def test_every_door_refuses_the_same_values_with_the_same_words(tmp_path, door, key, value, message):
    with pytest.raises(UserError) as caught:
        door(key, value, tmp_path)
    assert message in str(caught.value)


def test_an_integer_serves_as_a_number_a_list_as_a_tuple_and_numpy_s_numbers_as_python_s():
    limit = make_policy("sparq", mean_value_limit=1).mean_value_limit
    assert (limit, type(limit)) == (1.0, float)
    assert make_policy("dense_layers", layers=[0, -1], inner="h2o").layers == (0, -1)
    k = make_policy("sparq", k=np.int64(64), mean_value_limit=np.float32(0.5)).k
    assert (k, type(k)) == (64, int)


def test_all_mistakes_are_told_at_once():
    with pytest.raises(UserError) as caught:
        make_policy("dense_layers", layers=[0, "x"], inner={"sparq": {"k": True, "rr": 1}})
    assert str(caught.value).splitlines() == [
        "dense_layers.layers.1: must be an integer (got 'x')",
        "dense_layers.inner.sparq.k: must be an integer (got True)",
        "dense_layers.inner.sparq.rr: unknown parameter of sparq 'rr'; did you mean 'r'? Legal: "
        "block, compression, group_score, k, layout, local, mean_value, mean_value_limit, r, tokens",
    ]


@pytest.mark.parametrize("ratio", ["1/8", "1 / 8", 0.125, Fraction(1, 8)])
def test_a_compression_gives_the_parameters_that_are_left_out(ratio):
    policy = make_policy("sparq", compression=ratio, head_size=64, context=4096, local=3)
    assert (policy.r, policy.k, policy.local) == (8, 256, 3)


def test_a_compression_within_a_nested_policy_is_of_the_same_context():
    policy = make_policy(
        "dense_layers", layers=[0], inner={"h2o": {"compression": "1/8"}}, head_size=64, context=512
    )
    assert policy.inner.budget == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {},
            "sparq: which parameters a budget means depends on the model and the context: give head_size=",
        ),
        ({"head_size": 64}, "give head_size=... (channels per head) and context=... (tokens)"),
        ({"head_size": True, "context": 9}, "head_size: must be an integer of at least 1 (got True)"),
        ({"head_size": 64, "context": 0}, "context: must be an integer of at least 1 (got 0)"),
        (
            {"head_size": 64, "context": 16, "local": 9},
            "compression 1/8 at context 16: sparq.local must be from 0 to k",
        ),
    ],
)
def test_a_compression_without_its_context_says_what_to_give(arguments, message):
    with pytest.raises(UserError) as caught:
        make_policy("sparq", compression="1/8", **arguments)
    assert message in str(caught.value)


def test_a_spec_is_as_good_as_a_name():
    policy = make_policy("dense_layers", layers=[0], inner={"sparq": {"k": 64}})
    assert make_policy(policy.spec()) == policy
    assert make_policy({"sparq": {"k": 64}}, r=8) == make_policy("sparq", k=64, r=8)
    assert make_policy({"sparq": None}) == make_policy("sparq")
    assert make_policy(policy) is policy
    for wrong in (3, ["sparq"], {}, {"sparq": {}, "h2o": {}}):
        with pytest.raises(UserError, match="a policy is a name or one name with its parameters"):
            make_policy(wrong)


def test_whatever_a_policy_s_constructor_raises_is_told_with_its_name():
    @dataclass(frozen=True)
    class Moody(Policy):
        n: int = 1
        name: ClassVar[str] = "moody"

        def __post_init__(self):
            raise RuntimeError("not today")

    with pytest.raises(UserError, match="^moody: RuntimeError: not today$"):
        specs.build(Moody, {"n": 2})


@pytest.mark.parametrize(
    ("kind", "legal"),
    [
        (int, "an integer"),
        (int | None, "an integer or null"),
        (tuple[int, ...], "a list of integers"),
        (tuple[int, int], "a list of 2 integers"),
        (list[str], "a list of texts"),
        (list[int | str], "a list of values"),
        (dict[str, int], "`key: value` pairs"),
        (Literal["a", "b", 3], "'a', 'b' or 3"),
        (Annotated[int, Field(ge=0, le=7)], "an integer from 0 to 7"),
        (Annotated[float, Field(gt=0)], "a number above 0"),
        (Annotated[str, Field(min_length=1)], "text, not empty"),
        (Path, "a path"),
    ],
)
def test_what_is_legal_is_said_in_words(kind, legal):
    mistakes = []
    assert values.read_value(kind, object(), ("it",), mistakes) is values.NOTHING
    assert [mistake.message for mistake in mistakes] == [f"must be {legal}"]


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        (tuple[int, ...] | None, [1, "x"], "it.1: must be an integer (got 'x')"),
        (list[list[int]], [[1], [2, None]], "it.1.1: must be an integer (got None)"),
        (tuple[int, int], [1], "it: must be a list of 2 integers (got [1])"),
        (Annotated[int, Field(ge=0, le=7)], 8, "it: must be an integer from 0 to 7 (got 8)"),
        (str, 3, "it: must be text: put it in quotes (got 3)"),
        (int, 2**63, "it: an integer of more than 64 bits (got 9223372036854775808)"),
        (dict[str, int], {"a": "x"}, "it: must be `key: value` pairs (got {'a': 'x'})"),
    ],
)
def test_a_mistake_is_shown_at_the_item_that_is_wrong(kind, given, message):
    mistakes = []
    values.read_value(kind, given, ("it",), mistakes)
    assert [str(mistake) for mistake in mistakes] == [message]


@pytest.mark.parametrize(
    "kind",
    [
        int,
        float,
        str,
        bool,
        tuple[int, ...],
        dict[str, int],
        Literal["a"],
        int | None,
        set[int],
        int | list[int],
    ],
)
def test_no_wording_of_pydantic_leaks(kind):
    for given in (None, True, 1, 1.5, "x", [], ["x"], {}, {1: 2}, object(), [[]], float("inf"), (1, True)):
        mistakes = []
        value = values.read_value(kind, given, (), mistakes)
        assert (value is values.NOTHING) == bool(mistakes)
        assert all(mistake.message.startswith("must be ") for mistake in mistakes)
