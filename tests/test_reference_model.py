"""The model that ships: what it can do, what its training sees, and that training can be interrupted."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import kvsieve
from kvsieve import corpus, make_policy
from kvsieve.compare.tasks.needle import Needle
from kvsieve.reference_model import data, train
from kvsieve.reference_model.tokenizer import BOS, PAD, byte_tokenizer


@pytest.fixture(scope="module")
def model():
    return kvsieve.load("reference")


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


def test_batches_are_a_function_of_seed_step_and_row():
    text = np.frombuffer(corpus.training_text()[:200_000].encode(), np.uint8)
    ids, weights = data.batch(text, seed=3, step=5, rows=8, length=256, copy=0.5)
    again, _ = data.batch(text, seed=3, step=5, rows=4, length=256, copy=0.5)
    assert np.array_equal(ids[:4], again)
    assert not np.array_equal(ids, data.batch(text, seed=3, step=6, rows=8, length=256, copy=0.5)[0])
    assert ids.shape == weights.shape == (8, 256)
    assert weights[ids == PAD].sum() == 0
    assert set(np.unique(weights)) <= {0.0, data.FILLER, 0.5, data.ANSWER / 2, data.ANSWER}


@pytest.mark.slow
def test_an_interrupted_training_ends_where_an_uninterrupted_one_does(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "TOKENS_PER_STEP", 512)
    monkeypatch.setattr(train, "SAVE_EVERY", 1)
    whole = train.train(tmp_path / "whole", tokens=4 * 512, seed=1, peak=1e-3)
    update, steps = train._update, []

    def interrupted(*args):
        if len(steps) == 2:
            raise KeyboardInterrupt
        steps.append(1)
        return update(*args)

    monkeypatch.setattr(train, "_update", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train.train(tmp_path / "parts", tokens=4 * 512, seed=1, peak=1e-3)
    monkeypatch.setattr(train, "_update", update)
    train.train(tmp_path / "parts", tokens=4 * 512, seed=1, peak=1e-3)
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
