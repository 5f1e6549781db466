"""Pass keys and number strings, scored as InfiniteBench does."""

import itertools
import json
import re
from pathlib import Path

import pytest

from kvsieve import UserError
from kvsieve.compare.tasks import Answer, KeyValue, Passkey, Sample
from kvsieve.compare.tasks import text as texts
from kvsieve.testing import tokenizers

ROWS = [
    json.loads(line) for line in (Path(__file__).parent.parent / "data/infinitebench_scores.jsonl").open()
]


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_the_score_is_infinitebenchs(row):
    sample = Sample([1], [row["reference"]])
    assert Passkey(kind=row["kind"]).score(sample, Answer(row["prediction"])) == row["score"]


@pytest.mark.parametrize("name", tokenizers())
def test_the_key_stands_where_the_facts_say(name):
    tokenizer = tokenizers()[name]
    for index in range(6):
        sample = Passkey(900).sample(tokenizer, 0, index)
        prompt = texts.decode(tokenizer, sample.prompt)
        assert len(sample.prompt) == 900
        assert re.fullmatch("[0-9]{5}", sample.reference)
        assert prompt.count(sample.reference) == 2
        assert abs(prompt.index(sample.reference) / len(prompt) - sample.facts["depth"]) < 0.2


def test_a_number_string_repeats_its_digits():
    for index in range(6):
        key = Passkey(900, kind="number_string").sample(tokenizers()["bytes"], 0, index).reference
        assert re.fullmatch("[0-9]{10}", key)
        assert len([None for _ in itertools.groupby(key)]) <= 5


def test_a_context_that_is_too_short_names_the_shortest_that_is_not():
    tokenizer = tokenizers()["bpe"]
    with pytest.raises(UserError, match=r"^passkey needs a context of at least (\d+) tokens") as caught:
        Passkey(20).sample(tokenizer, 0, 0)
    least = int(re.search(r"least (\d+)", str(caught.value))[1])
    assert len(Passkey(least).sample(tokenizer, 0, 0).prompt) == least


@pytest.mark.parametrize("name", tokenizers())
def test_keys_and_values_may_be_uuids(name):
    sample = KeyValue(900, words="uuids").sample(tokenizers()[name], 0, 0)
    prompt = texts.decode(tokenizers()[name], sample.prompt)
    assert len(sample.prompt) == 900
    assert re.fullmatch("[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", sample.reference)
    key = re.search(r'\n\{"([0-9a-f-]{36})": "$', prompt)[1]
    assert f'"{key}": "{sample.reference}"' in prompt
    assert KeyValue(words="uuids").score(sample, Answer(sample.reference + '"}')) == 1
    assert KeyValue(words="uuids").score(sample, Answer(sample.reference[:8])) == 0
