"""Every task that ships obeys the laws of kvsieve.testing, and each law can be broken."""

import dataclasses
import itertools
import typing
from pathlib import Path

import pytest

import kvsieve
from kvsieve import plugins
from kvsieve.compare.tasks import (
    CnnDailyMail,
    Conversation,
    KeyValue,
    Needle,
    Passkey,
    Perplexity,
    Repetition,
    Retrieval,
    Shakespeare,
    SparqNeedle,
    Squad,
    TriviaQA,
    WikiText,
)
from kvsieve.compare.tasks.retrieval import Kind
from kvsieve.testing import TASK_LAWS, check_task, tokenizers
from kvsieve.testing.task_laws import prompt_and_answer_fit

ROWS = Path(__file__).parent.parent / "data" / "sparq_tasks"
PAPER = {
    cls.name: cls(20_000, samples=5, folder=str(ROWS / cls.name))
    for cls in (Squad, TriviaQA, CnnDailyMail, WikiText, Shakespeare)
}
# The paper stops these answers after 128 tokens, which may be bytes here.
CUT_BY_THE_PAPER = {"cnn_dailymail", "shakespeare"}
CASES = {
    **PAPER,
    "sparq_needle": SparqNeedle(700, samples=5, folder=str(ROWS / "sparq_needle")),
    "needle": Needle(400, distractors=2),
    "repetition": Repetition(400),
    "perplexity": Perplexity(300, tokens=20),
    "key_value": KeyValue(300),
    **{f"retrieval {kind}": Retrieval(1200, kind=kind) for kind in typing.get_args(Kind)},
    "retrieval uuids": Retrieval(1200, kind="multikey", values="uuids", haystack="statements"),
    "key_value uuids": KeyValue(600, words="uuids"),
    "passkey": Passkey(500),
    "number_string": Passkey(500, kind="number_string"),
    "retrieval noise": Retrieval(1200, kind="multivalue", haystack="noise"),
    "key_value_after": KeyValue(300, question="after"),
    "needle_after": Needle(500, question="after", questions=3),
    "conversation": Conversation(700, turns=8, told=3),
}


def test_every_task_has_a_case():
    shipped = {name for name, entry in plugins.tasks().items() if entry.plugin == "builtin_tasks"}
    assert shipped == {task.name for task in CASES.values()}


@pytest.mark.parametrize(
    ("case", "law"),
    [
        pytest.param(case, law, id=f"{case}-{law.__name__}")
        for case, law in itertools.product(CASES, TASK_LAWS)
        if not (law is prompt_and_answer_fit and case in CUT_BY_THE_PAPER)
    ],
)
def test_law(law, case):
    law(CASES[case])


@dataclasses.dataclass(frozen=True)
class Echo(kvsieve.Task):
    """Obeys all laws: say the number that stands in the prompt."""

    name = "echo"
    metric = "exact match"
    limits = (0.0, 1.0)

    def sample(self, tokenizer, seed, index):
        if self.context < 60:
            raise kvsieve.UserError("needs 60 tokens")
        number = str(1000 + index)
        prompt = tokenizer(f"Say {number}:", add_special_tokens=False)["input_ids"]
        return kvsieve.Sample(prompt, [number], new_tokens=8, stop=["\n"])

    def score(self, sample, answer):
        return float(answer.text == sample.reference)


def changed(**fields):
    """Echo whose samples differ in these fields."""

    @dataclasses.dataclass(frozen=True)
    class Changed(Echo):
        def sample(self, tokenizer, seed, index):
            sample = super().sample(tokenizer, seed, index)
            return dataclasses.replace(sample, **{k: v(sample, tokenizer, self) for k, v in fields.items()})

    return Changed(context=100)


@dataclasses.dataclass(frozen=True)
class AcceptsAll(Echo):
    def score(self, sample, answer):
        return 1.0


@dataclasses.dataclass(frozen=True)
class Counts(Echo):
    """Remembers how often it was asked."""

    def sample(self, tokenizer, seed, index):
        asked.append(index)
        return super().sample(tokenizer, seed, len(asked))


@dataclasses.dataclass(frozen=True)
class RefusesAll(Echo):
    def score(self, sample, answer):
        return 0.0


@dataclasses.dataclass(frozen=True)
class NeverTooShort(Echo):
    def sample(self, tokenizer, seed, index):
        return Echo(100).sample(tokenizer, seed, index)


asked = []
BROKEN = {
    "asked again": Counts(100),
    "all samples are the same": changed(prompt=lambda sample, *_: [1, 2, 3]),
    "the perfect answer '1000' scores 0.0, not 1.0": RefusesAll(100),
    "an empty answer scores 1.0, a perfect one 1.0": AcceptsAll(100),
    "a prompt of 101 tokens": changed(prompt=lambda s, *_: [*s.prompt, *[1] * (101 - len(s.prompt))]),
    "a token id outside the vocabulary": changed(prompt=lambda s, tokenizer, _: [*s.prompt, len(tokenizer)]),
    "'1000' takes 4 tokens, and new_tokens are 2": changed(new_tokens=lambda *_: 2),
    "'0' ends the perfect answer": changed(stop=lambda *_: ["0"]),
    "3 characters are too few for '1000'": changed(characters=lambda *_: 3),
    "context=1, samples=32) with bytes: a prompt of 9 tokens": NeverTooShort(100),
    "Echo names no metric": dataclasses.dataclass(frozen=True)(type("Echo", (Echo,), {"metric": ""}))(100),
}


def test_a_small_task_obeys_them():
    check_task(Echo(100))


@pytest.mark.parametrize("complaint", BROKEN)
def test_a_broken_task_breaks_a_law(complaint):
    with pytest.raises(AssertionError) as caught:
        check_task(BROKEN[complaint])
    assert complaint in str(caught.value)


@pytest.mark.parametrize("text", ["Hello there", " 123456", "\n x = 1\n", "\N{EURO SIGN} ünï", "ends "])
def test_the_tokenizers_lose_nothing(text):
    for tokenizer in tokenizers().values():
        ids = tokenizer("a:" + text, add_special_tokens=False)["input_ids"]
        assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == "a:" + text


def test_the_tokenizers_differ():
    words = {
        name: len(tokenizer("and 1234", add_special_tokens=False)["input_ids"])
        for name, tokenizer in tokenizers().items()
    }
    assert len(set(words.values())) == 3, words
    assert {tokenizer.bos_token_id is None for tokenizer in tokenizers().values()} == {True, False}
