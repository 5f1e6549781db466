"""Tasks: prompts of an exact length whose answer is in them, and scores."""

import dataclasses
import math
import re

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from kvsieve import UserError, corpus
from kvsieve.compare.tasks import (
    Answer,
    Conversation,
    KeyValue,
    Needle,
    Passkey,
    Perplexity,
    Repetition,
    Retrieval,
    Sample,
)
from kvsieve.compare.tasks import text as texts
from kvsieve.compare.tasks.needle import NAMES
from kvsieve.reference_model.tokenizer import BOS, byte_tokenizer
from kvsieve.reference_model.words import SYLLABLES
from kvsieve.testing import tokenizers

TASKS = [Needle(300), Needle(400, distractors=3), Repetition(300), Perplexity(300, tokens=40), KeyValue(300),
         Conversation(700, turns=8, told=3)]  # fmt: skip


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
    best = {"needle": 1, "repetition": 64, "perplexity": 0, "key_value": 1, "conversation": 1}[task.name]
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
    assert [name for name in NAMES if made_up.fullmatch(name)] == []
    assert len(set(NAMES)) == len(NAMES)


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


MIXED = "Zwölf Boxkämpfer — 漢字仮名交じり文、 x = 3 # ключ 🙂\n"


@pytest.mark.parametrize("name", ["bytes", "bpe", "metaspace"])
def test_perplexity_counts_the_bytes_of_what_was_predicted(tmp_path, name):
    tokenizer, path = tokenizers()[name], tmp_path / "own.txt"
    path.write_text(MIXED * 40, encoding="utf-8")
    task = Perplexity(150, tokens=40, text=str(path))
    for i in range(12):
        sample = task.sample(tokenizer, 0, i)
        assert sample.reference in MIXED * 3
        assert sample.reference.encode("utf-8", "strict")
        assert 37 <= len(sample.forced) <= 43
        assert len(sample.prompt) in range(147, 151)
        if name == "bytes":
            assert bytes(sample.forced) == sample.reference.encode()
            continuing = bytes(sample.prompt[1:]).decode() + sample.reference
            assert continuing in MIXED * 5


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


@pytest.mark.parametrize(
    "task",
    [Needle(400, distractors=2), KeyValue(300), Passkey(500), Retrieval(1200, kind="multiquery"),
     Retrieval(1200, kind="frequent_words")],
    ids=lambda task: task.title,
)  # fmt: skip
def test_a_question_after_the_prompt_is_the_one_that_was_in_it(task, tokenizer):
    after = dataclasses.replace(task, question="after")
    for i in range(3):
        inside, outside = task.sample(tokenizer, 0, i), after.sample(tokenizer, 0, i)
        assert [*outside.prompt, *outside.questions[0]] == inside.prompt
        assert inside.segments == (len(outside.prompt), len(outside.questions[0]))
        assert (inside.references, inside.facts) == (outside.references, outside.facts)
        assert outside.asked(0).prompt == inside.prompt
    assert after.title == f"{task.title} asked after"


def test_needle_asks_several_questions_about_one_text(tokenizer):
    task = Needle(600, question="after", questions=4, distractors=1)
    sample = task.sample(tokenizer, 0, 2)
    prompt = texts.decode(tokenizer, sample.prompt)
    for question, reference in zip(sample.questions, sample.references, strict=True):
        assert prompt.count(texts.decode(tokenizer, list(question)) + reference) == 1
    assert prompt.count("The secret number of") == 5
    right, wrong = list(sample.references), [" 1", *sample.references[1:3], ""]
    assert task.score(sample, Answer(texts=right)) == 1
    assert task.score(sample, Answer(texts=wrong)) == 0.5
    assert task.score(sample, Answer()) == 0
    assert task.title == "needle 4 asked after"


def test_a_conversation_tells_facts_in_some_turns_and_asks_for_one_in_the_last(tokenizer):
    task = Conversation(900, turns=10, told=3)
    asked_in = set()
    for i in range(10):
        sample = task.sample(tokenizer, 0, i)
        ends = [sum(sample.segments[: n + 1]) for n in range(11)]
        assert ends[-1] == len(sample.prompt) == 900
        turns = [
            texts.decode(tokenizer, sample.prompt[start:end])
            for start, end in zip([0, *ends], ends, strict=False)
        ]
        assert turns[0].count("\nUser: ") == 1
        assert all(turn.startswith("\nUser: ") for turn in turns[1:])
        name = re.search(r"\nThe secret number of (\w+) is$", turns[10])[1]
        told = [n for n, turn in enumerate(turns[:10]) if "The secret number of" in turn]
        (there,) = [n for n in told if f"The secret number of {name} is{sample.reference}.\n" in turns[n]]
        assert len(told) == 3
        assert sample.facts["turns_ago"] == 10 - there
        asked_in.add(there)
    assert len(asked_in) >= 8  # any turn as often


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: Needle(question="later"), "question must be 'prefill' or 'after', not 'later'"),
        (lambda: KeyValue(question="later"), "question must be 'prefill' or 'after', not 'later'"),
        (lambda: Needle(questions=3), "3 questions cannot be in one prompt: give `question: after`"),
        (lambda: Needle(question="after", questions=len(NAMES), distractors=1), "distractors must be 0 to"),
        (lambda: Conversation(turns=3, told=4), "told must be at most 3, not 4"),
        (lambda: Sample([1], ["a"], questions=[[1], [2]]), "2 questions have 1 references"),
        (lambda: Sample([1, 2], ["a"], segments=[1]), r"the segments \[1\] of a prompt of 2 tokens"),
    ],
)
def test_questions_and_segments_that_do_not_fit_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        wrong()
