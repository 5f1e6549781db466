"""Prompts of different lengths and answers that end apart: every row is charged what it takes alone."""

import dataclasses

import pytest

import kvsieve
from kvsieve.compare.cells import Cell
from kvsieve.compare.execute.cell import Measurement
from kvsieve.compare.execute.said import Said
from kvsieve.compare.tasks import text as texts
from kvsieve.reference_model.tokenizer import EOS, byte_tokenizer
from kvsieve.testing import tokenizers
from kvsieve.testing.spy import Spy

TEXT = [*kvsieve.corpus.held_out_text()[:400].encode()]
SIZES = ((90, 9), (150, 30), (40, 3))  # of the prompts, and of their answers


@dataclasses.dataclass(frozen=True)
class Ragged(kvsieve.Task):
    """Every answer is right."""

    name = "ragged"
    metric = "none"
    forced: bool = False

    def sample(self, tokenizer, seed, index):
        size, new = SIZES[index]
        forced = TEXT[size : size + new] if self.forced else ()
        facts = {"size": size, "nested": [None, {"a": 1.5}]}
        return kvsieve.Sample(
            TEXT[:size], ["a", "b"], new_tokens=new, forced=forced, facts=facts, needs="all"
        )

    def score(self, sample, answer):
        return 1.0


def records(model, policy, batches, forced=False):
    task = Ragged(context=200, forced=forced)
    measurement = Measurement(model, Cell("0", task, policy, None))
    samples = [task.sample(model.tokenizer, 0, i) for i in range(3)]
    found = []
    for batch in batches:
        found += measurement.batch(batch, [samples[i] for i in batch])
    return [{k: v for k, v in record.items() if k not in ("rows", "tokens_per_second")} for record in found]


POLICIES = [
    kvsieve.make_policy("dense"),
    kvsieve.make_policy("sparq", r=4, k=16, local=4),
    kvsieve.make_policy("sparq", r=4, k=16, local=4, layout="double"),
    kvsieve.make_policy("h2o", budget=32, recent=8),
    kvsieve.make_policy("snapkv", budget=32, window=8),
    kvsieve.make_policy("adakv", budget=32, window=8),
    kvsieve.make_policy("quest", page=8, pages=4),
]


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy.name)
@pytest.mark.parametrize("forced", [False, True], ids=["decoded", "forced"])
def test_a_row_of_a_ragged_batch_is_charged_as_if_alone(model, policy, forced):
    together = records(model, policy, [[0, 1, 2]], forced)
    assert together == records(model, policy, [[0], [1], [2]], forced)
    assert [record["steps"] for record in together] == [new - 1 for _, new in SIZES]
    assert together[0]["kv_bytes"] < together[1]["kv_bytes"] or policy.keeps == 32


def test_the_slots_of_a_record_are_the_kept_sets_and_what_was_said(model):
    spy = Spy(kvsieve.make_policy("adakv", budget=32, window=8))
    found = records(model, spy, [[0, 1, 2]])
    kept = [
        sum(len(head) for layer in spy.notes.cuts for head in layer[row])
        / sum(len(layer[row]) for layer in spy.notes.cuts)
        for row in range(3)
    ]
    assert [record["slots"] - record["steps"] for record in found] == kept


def test_rows_that_end_apart_share_a_captured_step(recorded, model):
    policy = POLICIES[1]
    captured = records(model, policy, [[0, 1, 2], [2, 1, 0]])
    alone = records(model, policy, [[0], [1], [2]])
    assert captured == alone + alone[::-1]


def test_a_record_says_what_was_asked(model):
    (record,) = records(model, POLICIES[0], [[1]])
    assert record["references"] == ["a", "b"]
    assert record["needs"] == "all"
    assert record["facts"] == {"size": 150, "nested": [None, {"a": 1.5}]}
    assert record["prompt_end"] == bytes(TEXT[:150]).decode()


def test_of_a_long_prompt_the_last_400_characters_are_stored(model):
    measurement = Measurement(model, Cell("0", Ragged(), POLICIES[0], None))
    text = "ü€x" * 400
    found = measurement._asked(kvsieve.Sample([*text.encode()], ["a"]))
    assert found["prompt_end"] == text[-400:]


def said(tokens, **limits):
    row = Said(kvsieve.Sample([65], ["x" * 50], **limits), byte_tokenizer(), [EOS])
    for n, token in enumerate(tokens, start=1):
        row.take(token)
        if row.complete:
            return row.text, n
    return row.text, None


@pytest.mark.parametrize(
    ("limits", "text", "took"),
    [
        ({}, "one two\nthree", None),
        ({"new_tokens": 5}, "one t", 5),
        ({"characters": 3}, "one", 3),
        ({"stop": ["\n"]}, "one two", 8),
        ({"stop": ["three", "o\nt"]}, "one tw", 9),
        ({"stop": ["one"], "new_tokens": 40}, "", 3),
    ],
)
def test_an_answer_ends_where_the_sample_says(limits, text, took):
    assert said(b"one two\nthree", **limits) == (text, took)


@pytest.mark.parametrize("name", ["bytes", "bpe", "metaspace"])
@pytest.mark.parametrize("prompt", ["The secret is", "Zwölf —", "漢字"])
def test_a_text_that_grows_is_that_of_all_its_tokens(monkeypatch, name, prompt):
    tokenizer = tokenizers()[name]
    before, after = (texts.encode(tokenizer, text) for text in (prompt, " naïve — 漢字 🙂 x  =\n\t3" * 4))
    row = Said(kvsieve.Sample(before, ["x" * 500], stop=["no such"]), tokenizer, [])
    decode, sizes = texts.decode, []
    for n, token in enumerate(after, start=1):
        expected = texts.continuation(tokenizer, before, after[:n])
        with monkeypatch.context() as patch:
            patch.setattr(texts, "decode", lambda one, ids: sizes.append(len(ids)) or decode(one, ids))
            row.take(token)
        if not expected.endswith(texts.UNFINISHED):  # bytes alone spoil whole characters before them, too
            assert row.text == expected
    assert max(sizes) <= 20  # however long the answer


def test_the_end_token_ends_an_answer_and_is_no_part_of_it():
    assert said([*b"one", EOS, *b"two"]) == ("one", 4)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"references": "one"}, "references are a list of texts, not the text 'one'"),
        ({"references": []}, "needs a reference"),
        ({"references": ["a"], "stop": "\n"}, "stop are a list of texts"),
        ({"references": ["a"], "facts": {"depth": object()}}, "facts of a sample are not plain data"),
        ({"references": ["a"], "facts": {"depth": float("nan")}}, "facts of a sample are not plain data"),
    ],
)
def test_a_sample_that_cannot_be_stored_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        kvsieve.Sample([1], **wrong)
