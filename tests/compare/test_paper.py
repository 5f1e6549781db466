"""The paper's tasks: prompts, order, references and scores are those of the authors' code."""

import hashlib
import json
import sys
from pathlib import Path

import pytest

from kvsieve import UserError
from kvsieve.compare import samples
from kvsieve.compare.tasks import (
    Answer,
    CnnDailyMail,
    Sample,
    Shakespeare,
    SparqNeedle,
    Squad,
    TriviaQA,
    WikiText,
    hub,
    metrics,
    paper,
)  # fmt: skip
from kvsieve.compare.tasks import (
    folder as local,
)
from kvsieve.testing import tokenizers

DATA = Path(__file__).parent.parent / "data" / "sparq_tasks"


def lines(name):
    return [json.loads(line) for line in (DATA / name).open()]


def digest(text):
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def folder(cls):
    return str(DATA / cls.name)


def questions(task):
    return paper._shuffled(task)


@pytest.mark.parametrize(
    ("part", "confusion", "shots"),
    [("validation", 7, 0), ("validation", 7, 1), ("validation", 7, 3), ("train", 3, 1), ("train", 15, 1)],
)
def test_squad(tmp_path, part, confusion, shots):
    expected = [
        row for row in lines("squad_expected.jsonl")
        if (row["part"], row["confusion_contexts"], row["shots"]) == (part, confusion, shots)
    ]  # fmt: skip
    written = lines("squad/rows.jsonl")
    if part == "train":  # the authors' code was given the same rows from the last to the first
        written.reverse()
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    found = questions(Squad(folder=str(tmp_path), confusion_contexts=confusion, shots=shots))
    assert len(expected) in (6, 52)
    assert len(found) == 52
    for question, row in zip(found, expected, strict=False):
        assert question.id == row["id"]
        if "prompt" in row:
            assert question.prompt.endswith("\n" + row["prompt"])
        else:
            assert digest(question.prompt) == row["prefill_sha256"]
            assert question.references == row["answers"]


@pytest.mark.parametrize("single_word", [False, True])
def test_triviaqa(single_word):
    expected = [row for row in lines("triviaqa_expected.jsonl") if ("pythia" in row["model"]) == single_word]
    found = questions(TriviaQA(folder=folder(TriviaQA), single_word=single_word))
    assert [(q.id, digest(q.prompt), q.references) for q in found] == [
        (row["id"], row["prefill_sha256"], row["answers"]) for row in expected
    ]


@pytest.mark.parametrize("cls", [CnnDailyMail, WikiText, Shakespeare])
def test_tasks_with_one_reference(cls):
    found = questions(cls(folder=folder(cls)))
    assert [(q.id, digest(q.prompt), q.references) for q in found] == [
        (row["id"], row["prefill_sha256"], [row["reference"]]) for row in lines(f"{cls.name}_expected.jsonl")
    ]


def test_scores():
    tried = early = 0
    for row in lines("scores.jsonl"):
        kind, wanted = row["metric"].removeprefix("sparq/"), row["score"]
        if kind == "qa_match":
            got = float(metrics.begins_with_any(row["prediction"], row["reference"]))
        elif kind == "rouge_l":
            got = metrics.rouge_l(row["prediction"], row["reference"])
        elif kind == "repetition_match_length":
            said, right = row["prediction"].lstrip(), row["reference"].lstrip()
            got = metrics.matching_characters(said, right)
            if right.startswith(said):  # theirs gives an answer that ends early full marks
                assert (got, wanted) == (len(said), len(right))
                early += got != wanted
                continue
        else:
            sample = Sample([1], ["x" * row["characters"]])
            logs = [-nats for nats in row["nll_nats"]]
            got = WikiText(folder="").score(sample, Answer(log_probabilities=logs))
        assert got == pytest.approx(wanted, abs=1e-9)
        tried += 1
    assert tried > 220
    assert early == 11


def test_the_needle():
    tokenizer = tokenizers()["bytes"]
    room = 280  # tokens of needle, question and answer with this tokenizer: the authors leave 128
    expected = lines("sparq_needle_expected.jsonl")
    assert len(expected) == 10
    for number, row in enumerate(expected):
        task = SparqNeedle(row["length"] + room, samples=5, depths=5, folder=folder(SparqNeedle))
        sample = task.sample(tokenizer, 0, number % 5)
        assert sample.facts == {"depth": row["depth"]}
        assert digest(json.dumps(list(sample.prompt))) == row["prompt_sha256"]
    assert task.score(sample, Answer("\n eat a sandwich and sit in Dolores Park on a sunny day.")) == 1
    assert task.score(sample, Answer("Eat a sandwich and sit in Dolores Park on a sunny day")) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"samples": 18}, "sparq_needle has 17 depths: samples cannot be 18"),
        ({"context": 280}, "needs a context of at least 281 tokens, not 280"),
        ({"context": 50_000}, r"has \d+ tokens, and sparq_needle needs 49720 of them"),
    ],
)
def test_a_needle_that_does_not_fit_is_one_sentence(given, message):
    with pytest.raises(UserError, match=message):
        SparqNeedle(folder=folder(SparqNeedle), **given).sample(tokenizers()["bytes"], 0, 0)


@pytest.mark.parametrize("name", tokenizers())
def test_a_prompt_loses_its_beginning_and_new_tokens_are_the_papers(name):
    tokenizer = tokenizers()[name]
    task = Squad(300, samples=3, folder=folder(Squad))
    sample = task.sample(tokenizer, 0, 0)
    question = questions(task)[0]
    assert list(sample.prompt) == tokenizer(question.prompt)["input_ids"][-300:]
    longest = max(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in question.references)
    assert sample.limit == min(30, longest + 5)
    assert sample.facts == {"document": question.id}
    summary = CnnDailyMail(300, samples=1, folder=folder(CnnDailyMail)).sample(tokenizer, 0, 0)
    assert summary.limit == min(128, len(tokenizer(summary.reference, add_special_tokens=False)["input_ids"]))


def test_a_parquet_file_has_the_same_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    written = lines("cnn_dailymail/rows.jsonl")
    pyarrow.parquet = pytest.importorskip("pyarrow.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(written), tmp_path / "rows.parquet")
    own = CnnDailyMail(folder=str(tmp_path))
    assert questions(own) == questions(CnnDailyMail(folder=folder(CnnDailyMail)))
    assert own.source() != CnnDailyMail(folder=folder(CnnDailyMail)).source()


# -------------------------------------------------------------------- from the hub
@pytest.fixture
def on_the_hub(monkeypatch):
    """Answers for the hub, which tests have no network to: rows, or what datasets raises."""
    datasets = pytest.importorskip("datasets", reason="needs datasets: pip install 'kvsieve[tasks]'")
    hub.read.cache_clear()
    hub.digest.cache_clear()
    paper._shuffled.cache_clear()
    asked = []

    def answer(found):
        def load_dataset(name, config, split, revision):
            asked.append((name, config, split, revision))
            if isinstance(found, Exception):
                raise found
            return datasets.Dataset.from_list(found)

        monkeypatch.setattr(datasets, "load_dataset", load_dataset)
        return asked

    return answer


@pytest.mark.parametrize("cls", [Squad, TriviaQA, CnnDailyMail, WikiText, Shakespeare])
def test_the_hubs_rows_make_the_same_questions(cls, on_the_hub):
    asked = on_the_hub(lines(f"{cls.name}/rows.jsonl"))
    assert questions(cls()) == questions(cls(folder=folder(cls)))
    assert asked == [(cls.hub.name, cls.hub.config, cls.hub.split, cls.hub.revision)]


def test_data_set_revision_and_split_can_be_others(on_the_hub):
    asked = on_the_hub(lines("squad/rows.jsonl"))
    Squad(split="train").rows()
    Squad(dataset="me/squad", revision="abc").rows()
    assert asked == [(*Squad.hub[:2], "train", Squad.hub.revision), ("me/squad", None, "validation", "abc")]
    with pytest.raises(ValueError, match="a folder has no dataset, revision or split"):
        Squad(folder="here", split="train")


def test_other_rows_are_another_text(on_the_hub):
    rows = lines("shakespeare/rows.jsonl")
    on_the_hub(rows)
    before = Shakespeare().source()
    hub.read.cache_clear()
    hub.digest.cache_clear()
    on_the_hub(rows[:-1])
    assert Shakespeare().source() != before


def test_a_data_set_in_the_cache_of_this_machine(tmp_path, monkeypatch):
    """Through datasets itself, without a network."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    written = lines("cnn_dailymail/rows.jsonl")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in written))
    found = questions(CnnDailyMail(dataset=str(tmp_path / "data")))
    assert found == questions(CnnDailyMail(folder=folder(CnnDailyMail)))
    with pytest.raises(UserError, match='cannot be read from the hub: Unknown split "nowhere"'):
        CnnDailyMail(dataset=str(tmp_path / "data"), split="nowhere").rows()


@pytest.mark.parametrize(
    ("found", "message"),
    [
        (
            ConnectionError("Couldn't reach it"),
            r"squad@7b6d24c4, split validation: the hub cannot be reached \(Couldn't reach it\): give",
        ),
        (FileNotFoundError("It is a gated dataset on the Hub.\nLog in"), "is gated on the hub: ask for acc"),
        (ValueError("Unknown revision"), "cannot be read from the hub: Unknown revision$"),
        ([{"id": 1, "title": ""}], "has no column 'context'; needed: id, title, context"),
        ([], "has no column 'id'"),
    ],
)  # fmt: skip
def test_what_the_hub_does_not_give_is_one_sentence(found, message, on_the_hub):
    on_the_hub(found)
    with pytest.raises(UserError, match=message) as caught:
        Squad().sample(tokenizers()["bpe"], 0, 0)
    assert "\n" not in str(caught.value)


def test_without_datasets_the_message_says_what_to_install(monkeypatch):
    hub.read.cache_clear()
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'kvsieve\[tasks\]', or give a folder"):
        WikiText().rows()


# -------------------------------------------------------------------- bad input
ROW = {"id": "1", "title": "A", "context": "B", "question": "C", "answers": {"text": ["the."]}}


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"holds no \.jsonl and no \.parquet files"),
        ({"a.jsonl": ""}, "its files hold no rows"),
        ({"a.jsonl": "{"}, r"a\.jsonl:1: is not JSON"),
        ({"a.jsonl": "[]"}, r"a\.jsonl: row 1 has no column 'id'; needed: id, title"),
        ({"a.jsonl": '{"id": 1, "title": ""}'}, "row 1 has no column 'context'"),
        ({"a.parquet": "PAR"}, r"a\.parquet: is no parquet file"),
        (
            {"a.jsonl": json.dumps(ROW | {"answers": {"text": [" ."]}})},
            r"question 1 normalise to nothing: \[' \.'\]",
        ),
        ({"a.jsonl": json.dumps(ROW)}, "squad has 1 questions in .*: samples cannot be 32"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    samples = 1 if "normalise" in message else 32
    with pytest.raises(UserError, match=message) as caught:
        Squad(folder=str(tmp_path), samples=samples).sample(tokenizers()["bpe"], 0, 0)
    assert "\n" not in str(caught.value)


def test_a_folder_that_is_not_there_is_named():
    with pytest.raises(UserError, match="nowhere: no such folder"):
        local.digest("nowhere")


def test_the_papers_tasks_run_in_a_comparison(compare):
    listed = "\n".join(
        f"      - {cls.name}: {{context: 150, samples: 2, folder: {folder(cls)}}}"
        for cls in (Squad, TriviaQA)
    )
    outcome = compare(f"batch_size: 2\ntasks:\n{listed}\npolicies: [dense, h2o: {{compression: 1/4}}]\n")
    assert outcome.failures == {}
    assert [row.samples for row in outcome.rows] == [2] * 4
    written = samples.read(outcome.folder / "samples.jsonl")
    first = questions(Squad(folder=folder(Squad)))[0]
    assert written[0]["facts"] == {"document": first.id}
    assert written[0]["references"] == first.references
    assert written[0]["prompt_end"] == first.prompt[-150:]
