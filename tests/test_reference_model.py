"""The model that ships: what it can do, what its training sees, and that training can be interrupted."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import kvsieve
from kvsieve import corpus, make_policy
from kvsieve.compare.tasks.needle import Needle
from kvsieve.reference_model import data, exams, retrieval, train, words
from kvsieve.reference_model.tokenizer import BOS, PAD, byte_tokenizer
from kvsieve.reference_model.words import Words

RETRIEVAL = ["facts", "things", "several_values", "several_keys", "chains", "records"]
COURSE = train.Course((train.Stage(1.0, 256, train.COURSES["second"].stages[0].recipe),), fall=0.35)


@pytest.fixture(scope="module")
def model():
    return kvsieve.load("reference")


@pytest.fixture(scope="module")
def text():
    return np.frombuffer(corpus.training_text()[:200_000].encode(), np.uint8)


def found(model, policy, samples, context=512):
    """Count the numbers hidden in `context` tokens that are found again."""
    task = Needle(context=context, samples=samples)
    given = [task.sample(model.tokenizer, 0, index) for index in range(samples)]
    prompts = [sample.prompt for sample in given]
    steps = torch.stack(list(kvsieve.decode(model, prompts, policy, max_new_tokens=7, eos_token_id=())), 1)
    answers = [model.tokenizer.decode(row) for row in steps]
    return sum(answer == sample.reference for answer, sample in zip(answers, given, strict=True))


def test_it_ships_small_and_its_card_has_its_scores(model):
    folder = kvsieve.hf.models.REFERENCE_FOLDER
    assert sum(file.stat().st_size for file in folder.iterdir()) < 8e6
    card = (folder / "README.md").read_text()
    assert "| needle (exact match) | 2048 |" in card
    assert model.num_parameters() < 3.3e6


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [("dense", 15, 16), ("sparq", 15, 16), ("h2o", 0, 7), ("local_window", 0, 7)],
)
def test_the_gap_is_there_at_an_eighth_of_the_bytes(model, name, low, high):
    cls = kvsieve.plugins.policy_class(name)
    policy = cls() if name == "dense" else cls.for_compression(1 / 8, 64, 512)
    with kvsieve.transfer.measure() as meter:
        assert low <= found(model, policy, 16) <= high
    assert meter.read / meter.dense_read == (1 if name == "dense" else pytest.approx(1 / 8, rel=0.05))


def test_text_goes_through_its_tokenizer_unchanged(model):
    text = "Größe\t= 3 # ∑\n\0\x7f"
    ids = model.tokenizer(text)["input_ids"]
    assert ids == [BOS, *text.encode()]
    assert model.tokenizer.decode(ids, skip_special_tokens=True) == text
    assert byte_tokenizer()(text)["input_ids"] == ids


def test_training_and_held_out_text_share_no_file():
    assert len(corpus.held_out_text()) > 300_000
    training = corpus.training_text()
    held_out = corpus.held_out_text()
    for start in range(0, len(held_out) - 400, 50_000):
        assert held_out[start : start + 400] not in training


def test_a_name_may_be_drawn_twice(text):
    builder = data._Builder(text, np.random.default_rng(0), 1024, 1.0)
    builder.words.name = lambda: "Bora"
    builder.needles()
    ids, _ = builder.finished()
    assert bytes(ids[ids < 256].astype(np.uint8)).count(b"The secret number of Bora is") == 2


@pytest.mark.parametrize("kind", ["needles", "repetitions", "pairs", *RETRIEVAL])
def test_batches_are_a_function_of_seed_step_and_row(text, kind):
    recipe = data.Recipe({kind: 1.0}, copy=0.5, parts=3)
    ids, weights = data.batch(text, seed=3, step=5, rows=8, length=512, recipe=recipe)
    again, _ = data.batch(text, seed=3, step=5, rows=4, length=512, recipe=recipe)
    assert np.array_equal(ids[:4], again)
    assert not np.array_equal(ids, data.batch(text, seed=3, step=6, rows=8, length=512, recipe=recipe)[0])
    assert ids.shape == weights.shape == (8, 512)
    assert weights[ids == PAD].sum() == 0
    assert set(np.unique(weights)) <= {0.0, data.FILLER, 0.5, data.ANSWER / 2, data.ANSWER}
    assert (weights >= 0.5).any(axis=1).sum() >= 6  # a scene that has no room is plain text instead


@pytest.mark.parametrize("kind", RETRIEVAL)
@pytest.mark.parametrize("room", [250, 500, 2000])
def test_every_answer_stands_in_the_statements(kind, room):
    drawn = Words(np.random.default_rng(room))
    for _ in range(30):
        scene = getattr(retrieval, kind)(drawn, room, 4)
        said = "\n".join(scene.statements)
        assert scene.questions
        for question in scene.questions:
            assert question.answer.strip()
            for part in question.answer.strip(' "').split(", "):
                assert all(
                    word in said
                    for word in part.removesuffix('"').replace(": ", " ").split()
                    if word not in "is="
                )


def test_values_are_asked_for_in_the_order_in_which_they_stand():
    scene = retrieval.several_values(Words(np.random.default_rng(0)), 3000, 4)
    said = "\n".join(scene.statements)
    for question in scene.questions:
        places = [said.index(value) for value in question.answer.strip().split(", ")]
        assert places == sorted(places)
    assert max(question.answer.count(", ") for question in scene.questions) == 3


@pytest.mark.parametrize("name", train.COURSES)
def test_a_course_gets_longer_and_its_shares_are_whole(name):
    course = train.COURSES[name]
    assert [s.until for s in course.stages] == sorted(s.until for s in course.stages)
    assert [s.length for s in course.stages] == sorted(s.length for s in course.stages)
    assert course.stages[-1].until == 1.0
    assert all(sum(s.recipe.mix.values()) == pytest.approx(1.0) for s in course.stages)
    lengths = [train.stage(course, step, 1000, np.random.default_rng(step))[0] for step in range(1000)]
    assert set(lengths) == {s.length for s in course.stages}
    rates = [train.learning_rate(step, 1000, 2e-3, course.fall) for step in range(1000)]
    assert max(rates) == 2e-3
    assert rates[-1] < 1e-5
    assert rates[0] < 1e-4


@pytest.mark.parametrize("kind", exams.KINDS)
def test_an_exam_has_its_answers_in_the_text_and_exactly_its_length(kind):
    for index in range(8):
        exam = exams.exam(kind, 1024, index)
        assert len(exam.prompt) == 1023
        assert exam == exams.exam(kind, 1024, index)
        assert exam.references
        assert all(reference in exam.prompt for reference in exam.references)
        assert exam.new_wording == (index % 2 == 1)
        assert exam.new_tokens >= sum(map(len, exam.references))


def test_no_training_statement_has_the_wording_or_the_noun_of_a_new_exam():
    for wording in exams._NEW:
        assert wording.statement not in retrieval.STATEMENTS
        assert wording.question not in retrieval.QUESTIONS
        assert wording.lead not in retrieval.LEADS
        assert wording.leads not in retrieval.PLURAL_LEADS
    assert set(exams._FACTS).isdisjoint(words._NOUNS)


@pytest.mark.slow
def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "TOKENS_PER_STEP", 512)
    monkeypatch.setattr(train, "SAVE_EVERY", 0.0)
    whole = train.train(tmp_path / "whole", tokens=4 * 512, seed=1, peak=1e-3, course=COURSE)
    update, steps = train._update, []

    def interrupted(*args):
        if len(steps) == 2:
            raise KeyboardInterrupt
        steps.append(1)
        return update(*args)

    monkeypatch.setattr(train, "_update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(tmp_path / "parts", tokens=4 * 512, seed=1, peak=1e-3, course=COURSE)
    monkeypatch.setattr(train, "_update", update)
    train.train(tmp_path / "parts", tokens=4 * 512, seed=1, peak=1e-3, course=COURSE)
    ends = [load_file(tmp_path / run / "checkpoint.safetensors") for run in ("whole", "parts")]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").open()] == [0, 1, 2, 3]
    torch.use_deterministic_algorithms(False)
    assert whole.training


def test_generating_text_from_text(model):
    policy = make_policy("sparq", r=8, k=32, local=8)
    (ids,) = torch.stack(list(kvsieve.decode(model, "import os\nimport ", policy, max_new_tokens=8)), 1)
    assert model.tokenizer.decode(ids).isprintable() or "\n" in model.tokenizer.decode(ids)
