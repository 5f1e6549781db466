"""Tasks: prompts of an exact length whose answer is in them, and scores."""

import math
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvsieve import UserError, corpus
from kvsieve.compare.tasks import Answer, KeyValue, Needle, Perplexity, Repetition, Sample
from kvsieve.compare.tasks import text as texts
from kvsieve.compare.tasks.needle import _NAMES
from kvsieve.reference_model.tokenizer import BOS, byte_tokenizer
from kvsieve.reference_model.words import SYLLABLES

TASKS = [Needle(300), Needle(400, distractors=3), Repetition(300), Perplexity(300, tokens=40), KeyValue(300)]


def bpe_tokenizer():
    """Merges bytes to words, as most models' tokenizers do; has no token for the beginning."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([corpus.held_out_text()[:50_000]], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {"bytes": byte_tokenizer(), "bpe": bpe_tokenizer()}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.name}-{task.context}")
def test_prompts_are_exact_deterministic_and_different(task, tokenizer):
    samples = [task.sample(tokenizer, seed=3, index=i) for i in range(6)]
    assert {len(sample.prompt) for sample in samples} == {task.context}
    assert samples == [task.sample(tokenizer, seed=3, index=i) for i in range(6)]
    assert len({tuple(sample.prompt) for sample in samples}) == 6
    assert task.sample(tokenizer, seed=4, index=0) != samples[0]
    assert all((sample.prompt[0] == BOS) == (tokenizer.bos_token_id is not None) for sample in samples)


@pytest.mark.parametrize("task", TASKS, ids=lambda task: f"{task.name}-{task.context}")
def test_the_best_answer_gets_the_best_score(task, tokenizer):
    sample = task.sample(tokenizer, seed=0, index=1)
    best = {"needle": 1, "repetition": 64, "perplexity": 0, "key_value": 1}[task.name]
    answer = Answer(sample.reference, log_probabilities=[0.0] * len(sample.forced))
    assert task.score(sample, answer) == best


def test_needle_stands_in_the_prompt_and_is_asked_for_at_its_end(tokenizer):
    task = Needle(400, distractors=2)
    for i in range(5):
        sample = task.sample(tokenizer, 0, i)
        prompt = texts.decode(tokenizer, sample.prompt)
        key = re.search(r"\nThe secret number of (\w+) is$", prompt)[1]
        assert f"\nThe secret number of {key} is{sample.reference}.\n" in prompt
        assert re.fullmatch(r" \d{6}", sample.reference)
        stated = re.findall(r"\nThe secret number of (\w+) is (\d{6})\.\n", prompt)
        assert len(set(stated)) == len(stated) == 3


def test_needle_depths_are_spread():
    task, tokenizer = Needle(600), byte_tokenizer()
    prompts = [bytes(task.sample(tokenizer, 0, i).prompt[1:]) for i in range(16)]
    places = sorted(prompt.index(b"\nThe secret number") / 600 for prompt in prompts)
    assert max(b - a for a, b in zip([0, *places], [*places, 0.9], strict=True)) < 0.2


def test_needle_names_were_never_trained_on():
    made_up = re.compile(f"(?i:{'|'.join(SYLLABLES)})+")
    assert [name for name in _NAMES if made_up.fullmatch(name)] == []
    assert len(set(_NAMES)) == len(_NAMES)


@pytest.mark.parametrize(
    ("answer", "score"),
    [(" 123456", 1), ("123456", 1), (" 123457", 0), (" 12345", 0), ("", 0), (" 1234567", 1)],
)
def test_needle_score(answer, score):
    assert Needle(64).score(Sample([], [" 123456"]), Answer(answer)) == score


def test_repetition_goes_on_as_the_text_does(tokenizer):
    task = Repetition(350, prompt=20, length=30)
    for i in range(5):
        sample = task.sample(tokenizer, 0, i)
        prompt = texts.decode(tokenizer, sample.prompt)
        asked = prompt[-20:]
        assert prompt[-21] == "\n"
        assert (asked + sample.reference) in prompt[:-20]
        assert prompt[:-20].count(asked) == 1
        assert len(sample.reference) == 30


@pytest.mark.parametrize(
    ("answer", "reference", "score"),
    [
        ("abcd", "abcd", 4),
        ("abxd", "abcd", 2),
        ("", "abcd", 0),
        (" abcd", "abcd", 4),  # some tokenizers put a space first
        ("bcd", " bcd", 4),  # and some take it away
        ("    x", "    x", 5),  # indentation counts
        ("   x", "    x", 3),
        ("abcdef", "abcd", 4),
    ],
)
def test_repetition_score(answer, reference, score):
    assert Repetition(64).score(Sample([], [reference]), Answer(answer)) == score


def test_perplexity_is_in_bits_per_byte(tokenizer):
    task = Perplexity(200, tokens=40)
    sample = task.sample(tokenizer, 0, 0)
    assert len(sample.forced) == 40
    assert tokenizer.decode(sample.forced) == sample.reference
    half = [math.log(0.5)] * 40
    assert task.score(sample, Answer(log_probabilities=half)) == pytest.approx(40 / len(sample.reference))


def test_key_value_asks_for_one_of_the_pairs(tokenizer):
    asked = []
    for i in range(8):
        sample = KeyValue(500).sample(tokenizer, 0, i)
        prompt = texts.decode(tokenizer, sample.prompt)
        pairs = re.findall(r'"([0-9a-f]{8})": "([0-9a-f]{8})"', prompt)
        key = re.search(r'\n\{"([0-9a-f]{8})": "$', prompt)[1]
        assert dict(pairs)[key] == sample.reference
        asked.append([k for k, _ in pairs].index(key) / len(pairs))
    assert min(asked) < 0.3
    assert max(asked) > 0.7


@pytest.mark.parametrize("task", [Needle(60), Repetition(100), Repetition(1), KeyValue(60)], ids=repr)
def test_a_context_that_is_too_short_is_refused(task):
    with pytest.raises(UserError, match=r"context|longer"):
        task.sample(byte_tokenizer(), 0, 0)


def test_own_text(tmp_path, tokenizer):
    path = tmp_path / "own.txt"
    path.write_text("".join(f"Line {n} of a text — with ümlauts.\n" for n in range(200)), encoding="utf-8")
    task = Perplexity(100, tokens=20, text=str(path))
    sample = task.sample(tokenizer, 0, 0)
    assert "of a text" in texts.decode(tokenizer, sample.prompt)
    assert task.source() != Perplexity(100).source()
    with pytest.raises(UserError, match=r"own\.txt is too short: \d+ tokens, and a prompt needs"):
        Perplexity(100_000, text=str(path)).sample(tokenizer, 0, 0)
    with pytest.raises(UserError, match=r"nowhere\.txt: cannot be read"):
        Needle(100, text="nowhere.txt").sample(tokenizer, 0, 0)


@pytest.mark.parametrize(
    "wrong", [lambda: Needle(0), lambda: Needle(samples=0), lambda: Needle(distractors=-1),
              lambda: Repetition(prompt=0), lambda: Perplexity(tokens=1)]
)  # fmt: skip
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match="must be"):
        wrong()
