"""The SparQ paper's numbers beside measured ones, and the files that ask for them."""

from fractions import Fraction
from pathlib import Path

import pytest

from kvsieve.compare import config, markdown, paper
from kvsieve.compare.identity import task_parameters
from kvsieve.compare.report import write_report
from kvsieve.compare.results import Results, Row, write_csv

CONFIGS = Path(__file__).parents[2] / "configs" / "paper"
LLAMA = "meta-llama/Llama-2-13b-hf"


def row(task="squad", policy="sparq", label="sparq r=64", ratio=0.33, score=0.8, model=LLAMA, **more):
    parameters = {"confusion_contexts": 7} if task == "squad" else {}
    given = {"task_parameters": parameters, "context": 3840, "metric": "match"}
    given |= dict.fromkeys(("parameters", "not_default", "budget"), "")
    known = {"score": score, "score_low": score - 0.1, "score_high": score + 0.1, "bytes_ratio": ratio}
    return Row(task=task, policy=policy, policy_label=label, model=model, higher_is_better=True, chance=0.0,
               **(given | known | more))  # fmt: skip


def test_every_number_ships_and_some_are_known():
    numbers = paper.published()
    assert len(numbers) == 175 + 21 + 7 + 15
    (wanted,) = [
        n for n in numbers
        if (n.model, n.task, n.policy, n.column) == (LLAMA, "shakespeare", "sparq", Fraction(1, 8))
    ]  # fmt: skip
    assert (wanted.score, wanted.standard_error, wanted.settings, wanted.moved) == (
        190,
        2,
        "r=16 k=128",
        "0.127",
    )


def test_the_setting_closest_to_a_columns_target_stands_beside_it():
    """As in the paper: r=8 moves .109 and r=16 .140 in TriviaQA, and its 1/8 is r=16."""
    rows = [
        row("triviaqa", label=f"sparq r={r}", ratio=ratio, score=score)
        for r, ratio, score in [(8, 0.109, 0.1), (16, 0.140, 0.2), (32, 0.203, 0.3), (64, 0.328, 0.4)]
    ]
    half, eighth = paper.beside(rows)
    assert (half.policy, half.published.score, half.score) == ("sparq r=64", 78.8, pytest.approx(40))
    assert (eighth.policy, eighth.interval) == ("sparq r=16", pytest.approx((10, 30)))
    assert eighth.cells() == [
        "Table 2", "triviaqa", "sparq", "1/8", "0.140 (r=16 k=128)", "78.2 ± 0.8", "20.0 [10.0, 30.0]",
        "0.140", "sparq r=16",
    ]  # fmt: skip


def test_a_band_of_contexts_stands_beside_the_mean_over_what_was_measured_in_it():
    model = "/models/LLaMA-2-7B-32K"  # a folder with the model's name
    rows = [
        row("sparq_needle", "dense", "dense", 1.0, score, model=model, context=context)
        for context, score in [(8192, 0.0), (9216, 0.5), (16384, 1.0)]
    ]
    found = {beside.published.table: beside for beside in paper.beside(rows)}
    assert found["Table 3"].score == 75
    assert found["Table 3"].interval is None
    assert found["Table 3, whole grid"].score == 50
    assert "8,192 to 16,384 tokens" in found["Table 3"].cells()[1]


@pytest.mark.parametrize(
    "other",
    [
        row(model="meta-llama/Llama-2-7b-hf"), row(task_parameters={"confusion_contexts": 3}),
        row(policy="quest"), row(task="needle"),
    ],
)  # fmt: skip
def test_what_the_paper_did_not_measure_has_nothing_beside_it(other):
    assert paper.beside([other]) == []
    assert "paper" not in markdown.markdown(Results([other]), [])


def test_the_summary_says_what_the_columns_really_are():
    said = markdown.markdown(Results([row()]), [])
    assert (
        "| Table 2 | squad | sparq | 1/2 | 0.329 (r=64 k=128) | 80.7 ± 0.8 | 80.0 [70.0, 90.0] | 0.330 |"
        in said
    )
    assert "SparQ's 1/2 is r=64 with k=128, which moves about a third of the bytes" in said


def test_the_page_has_them_where_there_are_some(tmp_path):
    write_csv(tmp_path / "summary.csv", [row(policy="dense", label="dense", ratio=1.0), row()])
    page = write_report(tmp_path).read_text()
    assert '<section id="paper">' in page
    assert "<td>0.329 (r=64 k=128)</td>" in page
    write_csv(tmp_path / "summary.csv", [row(policy="dense", label="dense", ratio=1.0, model="reference")])
    assert 'id="paper"' not in write_report(tmp_path).read_text()


@pytest.mark.parametrize(
    ("table", "files"),
    [("Table 2", "table_2*.yaml"), ("Table 3", "table_3.yaml"), ("Figure 6", "figure_6.yaml")],
)
def test_the_files_ask_for_every_number_of_their_table(table, files):
    found = set()
    for path in sorted(CONFIGS.glob(files)):
        read = config.load(path)
        rows = [
            row(
                task.title,
                policy.name,
                model=model,
                context=task.context,
                task_parameters=task_parameters(task),
            )
            for model in read.models
            for task, _ in read.tasks
            for policy in read.policies
        ]
        found |= {beside.published for beside in paper.beside(rows)}
    assert found >= {number for number in paper.published() if number.table == table}
