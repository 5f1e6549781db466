"""The family `retrieval`: structure, exact lengths, words apart from the reference model's training."""

import itertools
import json
import re
from pathlib import Path
from typing import get_args

import pytest

from kvsieve import UserError
from kvsieve.compare.tasks import Answer, Retrieval, Sample, metrics, words
from kvsieve.compare.tasks import text as texts
from kvsieve.compare.tasks.retrieval import Kind
from kvsieve.reference_model import words as trained
from kvsieve.testing import tokenizers

DATA = Path(__file__).parent.parent / "data"
KINDS = get_args(Kind)
FACT = re.compile(r"The password for ([a-z]+-[a-z]+) is ([0-9a-f-]+)\.\n")


@pytest.fixture(params=tokenizers())
def tokenizer(request):
    return tokenizers()[request.param]


def asked(tokenizer, index=0, context=1500, **parameters):
    sample = Retrieval(context, **parameters).sample(tokenizer, 0, index)
    return sample, texts.decode(tokenizer, sample.prompt)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("context", [1100, 1357, 4100])
def test_a_prompt_is_as_long_as_its_context_to_the_token(tokenizer, kind, context):
    if kind == "common_words" and context == 4100 and len(tokenizer) == 259:
        context = 5000
    for index in (0, 3):
        sample, _ = asked(tokenizer, index, context, kind=kind)
        assert len(sample.prompt) == context


@pytest.mark.parametrize(
    ("kind", "stated", "references"),
    [("single", 1, 1), ("multikey", 4, 1), ("multivalue", 4, 4), ("multiquery", 4, 4)],
)
@pytest.mark.parametrize("haystack", ["prose", "noise", "statements"])
def test_facts_stand_in_the_text_and_those_asked_for_are_the_references(kind, stated, references, haystack):
    for index in range(4):
        sample, prompt = asked(tokenizers()["bytes"], index, kind=kind, haystack=haystack)
        facts = FACT.findall(prompt)
        assert len(facts) == stated or (haystack == "statements" and len(facts) > 10)
        question = prompt.rsplit("\n", 2)[1]
        keys = re.findall("[a-z]+-[a-z]+", question)
        assert [value for key, value in facts if key in keys] == list(sample.references)
        assert len(sample.references) == references
        assert sample.needs == "all"


def test_one_fact_is_asked_for_at_evenly_spread_depths():
    found = []
    for index in range(16):
        sample, prompt = asked(tokenizers()["bytes"], index, kind="multikey", haystack="noise")
        key = re.search("What is the password for (.*)\\?", prompt)[1]
        found.append((prompt.index(f"The password for {key}") / len(prompt), sample.facts["depth"]))
    assert all(abs(at - depth) < 0.15 for at, depth in found)
    places = sorted(depth for _, depth in found)
    assert max(b - a for a, b in itertools.pairwise([0, *places, 1])) < 0.13


def test_a_chain_stands_in_its_order():
    sample, prompt = asked(tokenizers()["bytes"], kind="tracking", parts=3)
    value = re.search("equal to (\\d+)\\.\nThe variables", prompt)[1]
    steps = re.findall(r"([A-Z]{5}) is equal to (\w+)\.\n", prompt)
    assert [a for _, a in steps] == [value, *sample.references[:-1]]
    assert [b for b, _ in steps] == list(sample.references)
    assert len(steps) == 4 == sample.facts["level"] + 1


@pytest.mark.parametrize(("context", "often", "seldom"), [(1500, 6, 1), (6000, 30, 3)])
def test_common_words_stand_more_often(context, often, seldom):
    sample, prompt = asked(tokenizers()["bytes"], context=context, kind="common_words")
    listed = prompt.split("\n")[1].split()
    counts = {word: listed.count(word) for word in listed}
    assert {word for word, n in counts.items() if n == often} == set(sample.references)
    assert set(counts.values()) == {often, seldom}
    assert len(sample.references) == 10


def test_frequent_words_follow_zipf():
    sample, prompt = asked(tokenizers()["bytes"], context=6000, kind="frequent_words")
    listed = prompt.split("\n")[1].split()
    counts = sorted({word: listed.count(word) for word in listed}.items(), key=lambda one: -one[1])
    assert counts[0][0] == "..."
    assert [word for word, _ in counts[1:4]] == list(sample.references)
    assert counts[1][1] / counts[0][1] == pytest.approx(1 / 4, rel=0.05)
    assert len(prompt.rstrip().split("\n")[1]) > 5600  # as many as fit


@pytest.mark.parametrize("kind", KINDS)
def test_a_context_that_is_too_short_names_the_shortest_that_is_not(tokenizer, kind):
    with pytest.raises(
        UserError, match=rf"^retrieval {kind} needs a context of at least (\d+) tokens"
    ) as caught:
        Retrieval(20, kind=kind).sample(tokenizer, 0, 0)
    least = int(re.search(r"least (\d+)", str(caught.value))[1])
    if kind == "frequent_words":  # its vocabulary grows with the context
        least += 50
    assert len(Retrieval(least, kind=kind).sample(tokenizer, 0, 0).prompt) == least
    if kind != "frequent_words":
        with pytest.raises(UserError, match=f"at least {least} tokens"):
            Retrieval(least - 1, kind=kind).sample(tokenizer, 0, 0)


def test_a_text_file_is_a_haystack(tmp_path):
    path = tmp_path / "own.txt"
    path.write_text("".join(f"Line {n} of an own text.\n" for n in range(90)))
    sample, prompt = asked(tokenizers()["bpe"], context=600, text=str(path))
    assert len(sample.prompt) == 600
    assert "of an own text" in prompt
    assert Retrieval(text=str(path)).source() != Retrieval().source()
    with pytest.raises(UserError, match="the text of retrieval single is too short: a context of 9000 needs"):
        asked(tokenizers()["bpe"], context=9000, text=str(path))


def test_no_word_of_a_key_or_a_list_was_trained_on():
    starts = {word[0] for word in trained._ONSETS} | {word[0] for word in trained.SYLLABLES}
    unheard = words.words().unheard()
    assert not starts & {word[0] for some in unheard for word in some}
    assert "password" not in {noun.split()[-1] for noun in trained._NOUNS}
    for kind in ("single", "multivalue"):
        sample, prompt = asked(tokenizers()["bytes"], kind=kind)
        assert all(
            set(key.split("-")) <= {*unheard.nouns, *unheard.adjectives} for key, _ in FACT.findall(prompt)
        )
    sample, _ = asked(tokenizers()["bytes"], kind="common_words")
    assert all(word[0] not in starts for word in sample.references)


def test_there_are_always_enough_words():
    import numpy as np

    found = words.singles(np.random.default_rng(0), 20_000)
    assert len(set(found)) == 20_000
    assert not [word for word in found if word[0] not in "aeiou"]


@pytest.mark.parametrize("row", [json.loads(line) for line in (DATA / "ruler_scores.jsonl").open()], ids=str)
def test_the_score_is_rulers(row):
    sample = Sample([1], row["reference"], "all")
    assert Retrieval().score(sample, Answer(row["prediction"])) == pytest.approx(row["score"] / 100, abs=5e-5)


def test_control_characters_are_line_breaks():
    assert metrics.share_found("a\x0bb", ["a\nb"]) == 1
