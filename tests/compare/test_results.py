"""From samples to rows: groups, labels, comparisons, speeds, and run folders of older versions."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from kvsieve import UserError, make_policy
from kvsieve.compare import cells, config, manifest, results, summary
from kvsieve.compare.cells import Cell, describe_parameters
from kvsieve.compare.manifest import Entry
from kvsieve.compare.markdown import markdown
from kvsieve.compare.report.pivot import pivot
from kvsieve.compare.results import Results, Row
from kvsieve.compare.tasks import KeyValue, Needle, Perplexity, Repetition
from kvsieve.entries import Budget
from kvsieve.specs import PolicySpec

ROOT = Path(__file__).parent.parent.parent
QUICKSTART = ROOT / "benchmarks" / "results" / "quickstart"
OLD_RUN = ROOT / "tests" / "data" / "run_0_1_0"


def entry(cell, policy="dense", samples=16, task="needle", context=512, **values):
    found = {
        "cell": cell, "label": f"{task} {context}, {policy}", "model": "m", "task": task,
        "task_parameters": {},
        "context": context, "policy": policy.split()[0], "policy_label": policy, "parameters": "",
        "not_default": "",
        "budget": policy.partition(" ")[2], "metric": "exact match", "higher_is_better": True,
        "chance": 0.0, "limits": (0.0, 1.0), "samples": samples,
    }  # fmt: skip
    return Entry(**found | values)


def records(cell, scores, tokens_per_second=100.0, **values):
    return [
        {
            "cell": cell, "sample": i, "score": float(score), "steps": 6.0, "bytes_read": 60.0,
            "bytes_written": 6.0, "bytes_dense": 120.0, "kv_bytes": 10.0,
            "tokens_per_second": tokens_per_second, "ran_eagerly": None,
        } | values
        for i, score in enumerate(scores)
    ]  # fmt: skip


def rows_of(*pairs):
    return summary.summarize([one for one, _ in pairs], [r for _, found in pairs for r in found])


def test_a_policy_is_compared_with_dense_on_the_samples_that_both_have():
    dense = [1, 1, 0, 1] * 4
    policy = [1, 0, 1, 1] * 3  # only twelve were measured
    first, second = rows_of(
        (entry("a"), records("a", dense)), (entry("b", "sparq 1/8"), records("b", policy))
    )
    assert (first.mark, first.difference, first.score_low) == ("", None, pytest.approx(0.505, abs=1e-3))
    assert (second.pairs, second.lost, second.won) == (12, 3, 3)
    assert second.changes == "lost 3, won 3 of 12"
    assert second.difference == pytest.approx(0)
    assert second.mark == "indistinguishable"
    assert second.score == pytest.approx(0.75)
    uneven = Results([first, second])
    assert [pivot_cell(uneven, row)["count"] for row in (0, 1)] == ["n=16", "n=12"]
    for text in (markdown(uneven, []), shown(uneven.rows, 120)):
        assert text.count("n=16") == text.count("n=12") == 2  # policies by tasks, and the task's own table
    alike = Results([first, dataclasses.replace(second, samples=16)])
    assert "n=" not in markdown(alike, []) + shown(alike.rows, 120)


def pivot_cell(results, line):
    return pivot(results)["lines"][line]["cells"][0]


def test_a_small_sure_loss_is_found_where_the_samples_are_paired():
    dense = [0.8 + 0.1 * i for i in range(16)]
    worse = [score + 0.02 + 0.001 * (i % 3) for i, score in enumerate(dense)]
    bits = {"higher_is_better": False, "limits": None, "chance": 8.0, "metric": "bits per byte"}
    first, second = rows_of(
        (entry("a", **bits), records("a", dense)), (entry("b", "h2o", **bits), records("b", worse))
    )
    assert first.score_low < second.score_low < first.score_high  # apart, they tell nothing
    assert second.mark == "worse"
    assert (second.lost, second.won) == (None, None)
    assert Results([first, second]).groups[0].difference(second).startswith("+0.02094 (+0.020")


def test_a_policy_that_loses_all_of_the_little_that_dense_scores_is_worse():
    lengths = {"limits": (0, 64), "chance": 0.0, "metric": "characters"}
    few = [4, 5, 6, 4, 5, 6, 0, 4] * 2
    found = rows_of(
        (entry("a", **lengths), records("a", few)),
        (entry("b", "h2o", **lengths), records("b", [0] * 16)),
        (entry("c", "sparq", **lengths), records("c", few[::-1])),
    )
    assert [row.mark for row in found] == ["", "worse", "indistinguishable"]
    assert not Results(found).groups[0].at_chance
    assert found[1].difference_low < 0 < found[1].difference_high  # of what the limits allow
    nothing = rows_of((entry("a", **lengths), records("a", [0] * 12 + [4] * 4)))
    assert Results(nothing).groups[0].at_chance


def test_every_group_has_its_own_dense_row_and_says_its_parameters():
    pairs = []
    for distractors, score in ((0, 1), (7, 0)):
        given = {"task_parameters": {"distractors": distractors, "text": None}}
        pairs.append((entry(f"dense{distractors}", **given), records(f"dense{distractors}", [score] * 16)))
        pairs.append(
            (entry(f"sparq{distractors}", "sparq 1/8", **given), records(f"sparq{distractors}", [score] * 16))
        )
    found = Results(rows_of(*pairs))
    assert [group.task for group in found.groups] == ["needle distractors=0", "needle distractors=7"]
    assert [group.column for group in found.groups] == [
        "needle 512 distractors=0",
        "needle 512 distractors=7",
    ]
    assert [group.dense.score for group in found.groups] == [1, 0]
    assert [row.difference for row in found.rows if row.policy == "sparq"] == [0, 0]
    assert [group.at_chance for group in found.groups] == [False, True]
    assert [row.mark for row in found.rows] == ["", "indistinguishable", "", "chance"]
    text = markdown(found, [])
    assert (
        "Dense attention itself is at chance level on needle 512 distractors=7: no policy is judged" in text
    )
    assert "## needle distractors=0: exact match" in text
    assert "## needle distractors=7: exact match" in text


def test_the_sweep_that_ships_makes_groups_of_its_own(model):
    shipped = ROOT / "configs" / "first_layers_dense.yaml"
    overrides = ["tasks.0.needle.context=400"]
    found = cells.expand(config.load(shipped, overrides), model)
    entries = manifest.entries(found, "reference", {})
    measured = summary.summarize(entries, [r for one in entries for r in records(one.cell, [1, 0, 1])])
    groups = Results(measured).groups
    assert [group.task for group in groups] == ["needle distractors=0", "needle distractors=7"]
    assert [[row.policy for row in group.rows] for group in groups] == 2 * [
        ["dense", "sparq", "dense_layers", "dense_layers"]
    ]


def cell(policy, budget=None, **task):
    given = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
    asked = PolicySpec(type(policy), given, Budget.parse(budget) if budget else None)
    return Cell("id", Needle(**task), policy, asked)


def test_a_label_says_what_is_not_the_default():
    policies = [make_policy("dense"), make_policy("sparq", r=8, k=64), make_policy("sparq"),
                make_policy("dense_layers", layers=[0], inner={"sparq": {"r": 4, "k": 32}})]  # fmt: skip
    assert manifest.policy_labels([cell(policy) for policy in policies]) == [
        "dense", "sparq r=8 k=64", "sparq", "dense_layers layers=[0] inner=sparq(r=4 k=32)",
    ]  # fmt: skip
    assert describe_parameters(policies[1]).startswith("r=8 k=64 local=32 mean_value=true")


def test_policies_of_the_same_budget_are_told_apart():
    single, double = (
        make_policy("sparq", r=8, k=64, local=16, layout=layout) for layout in ("single", "double")
    )
    asked = [cell(single, "1/8"), cell(double, "1/8"), cell(double, "1/8", context=2048)]
    assert manifest.policy_labels(asked) == [
        "sparq 1/8 layout=single",
        "sparq 1/8 layout=double",
        "sparq 1/8 layout=double",
    ]
    asked = [cell(single, "tokens 64"), cell(double, "tokens 64"), cell(make_policy("h2o"), "memory 1/4")]
    assert manifest.policy_labels(asked) == [
        "sparq tokens 64 layout=single",
        "sparq tokens 64 layout=double",
        "h2o memory 1/4",
    ]


def test_a_policy_has_one_label_at_every_context(load, model):
    text = """\
    tasks: [needle: {context: [250, 500], samples: 1}]
    policies:
      - dense
      - sparq: {compression: 1/4}
      - sparq: {compression: 1/4, r: 16}
      - dense_layers: {layers: [0], inner: {sparq: {compression: [1/4, 1/2]}}}
      - dense_layers: {layers: [0], inner: {sparq: {compression: 1/4, layout: single}}}
      - twilight: {compression: 1/2, inner: {quest: {page: 8}}}
      - twilight: {compression: 1/2, inner: quest}
    """
    found = cells.expand(load(text), model)
    first, second = (
        [
            label
            for label, one in zip(manifest.policy_labels(found), found, strict=True)
            if one.task.context == n
        ]
        for n in (250, 500)
    )
    assert first == second == [
        "dense", "sparq 1/4", "sparq 1/4 r=16", "dense_layers layers=[0] inner=sparq(1/4)",
        "dense_layers layers=[0] inner=sparq(1/2)", "dense_layers layers=[0] inner=sparq(1/4 layout=single)",
        "twilight 1/2 inner=quest(page=8)", "twilight 1/2 inner=quest",
    ]  # fmt: skip
    assert found[3].label == "needle 250, dense_layers layers=[0] inner=sparq(1/4)"
    assert found[1].parameters != found[9].parameters  # though the label is the same


def test_speeds_keep_their_spread():
    slow = records("a", [1] * 8, 110.0) + records("a", [1] * 16, 1147.0)[8:]
    assert len(slow) == 16
    steady = records("b", [1] * 8, [100.0, 105.0]) + records("b", [1] * 16, [98.0])[8:]
    none = records("c", [1] * 16, None)
    rows = rows_of((entry("a"), slow), (entry("b", "sparq 1/8"), steady), (entry("c", "h2o 1/8"), none))
    assert [row.noisy for row in rows] == [True, False, False]
    assert [(row.tokens_per_second_min, row.tokens_per_second_max) for row in rows] == [
        (110, 1147), (98, 105), (None, None),
    ]  # fmt: skip
    assert rows[1].tokens_per_second == 100
    text = markdown(Results(rows), [])
    assert "| 628 noisy |" in text
    assert "tokens/s differ by more than 20% of their median" in text


def test_a_csv_gives_back_the_rows(tmp_path):
    entries = [entry("a", task_parameters={"text": "my, file.txt", "n": None}),
               entry("b", "sparq 1/8", task_parameters={"text": "my, file.txt", "n": None})]  # fmt: skip
    rows = rows_of((entries[0], records("a", [1, 0] * 8)), (entries[1], records("b", [1, 1] * 8)))
    results.write_csv(tmp_path / "summary.csv", rows)
    for before, after in zip(rows, results.read_csv(tmp_path / "summary.csv"), strict=True):
        for field in dataclasses.fields(Row):
            expected = getattr(before, field.name)
            if isinstance(expected, float):
                expected = pytest.approx(expected, rel=1e-5, abs=1e-9)
            assert getattr(after, field.name) == expected, field.name


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"context": "long"}, "line 2: context: 'long' is not a number"),
        ({"context": ""}, "line 2: context: '' is not a number of tokens"),
        ({"score": "high"}, "line 2: score: 'high' is not a number"),
        ({"task_parameters": "[1]"}, r"line 2: task_parameters: '\[1\]' is no JSON object"),
        ({"task_parameters": "{"}, "line 2: "),
    ],
)
def test_a_csv_that_is_none_is_a_message(tmp_path, line, message):
    found = {"task": "needle", "context": "512", "policy": "dense"} | line
    (tmp_path / "summary.csv").write_text(",".join(found) + "\n" + ",".join(found.values()) + "\n")
    with pytest.raises(UserError, match=message):
        results.read_csv(tmp_path / "summary.csv")


@pytest.fixture
def old_run(tmp_path):
    """A run folder of version 0.1.0, as it stood in the repository: without cells.json."""
    for name in ("samples.jsonl", "config.yaml", "environment.json"):
        shutil.copy(OLD_RUN / name, tmp_path / name)
    return tmp_path


def test_a_run_folder_of_version_0_1_0_is_read(old_run):
    rows = summary.write(old_run)
    assert len(rows) == 35
    dense, half, *_ = rows
    assert (dense.task, dense.model, dense.task_parameters) == (
        "needle",
        "reference",
        {"distractors": 0, "text": None},
    )
    assert (half.policy_label, half.budget, half.mark) == ("sparq 1/2", "1/2", "indistinguishable")
    assert half.parameters.startswith("r=32 k=256 local=64 mean_value=true")
    by_label = {(row.task, row.policy_label): row for row in rows}
    perplexity = by_label["perplexity", "sparq 1/8"]
    assert (perplexity.difference_low, perplexity.difference_high) == (
        pytest.approx(0.0125, abs=1e-4), pytest.approx(0.0389, abs=1e-4),
    )  # fmt: skip
    assert perplexity.mark == "few"
    assert by_label["repetition", "h2o 1/8"].mark == "worse"


def test_a_cells_json_of_version_0_1_0_keeps_its_order_and_its_failures(old_run):
    rows = summary.write(old_run)
    found = manifest.read(
        old_run, [json.loads(line) for line in (old_run / "samples.jsonl").read_text().splitlines()]
    )
    old = (
        "cell",
        "label",
        "model",
        "policy",
        "parameters",
        "metric",
        "higher_is_better",
        "samples",
    )
    cells = [
        {name: getattr(one, name) for name in old} | {"compression": one.budget, "error": None}
        for one in reversed(found)
    ]
    cells[0] |= {"samples": 4, "error": "no luck"}
    (old_run / "cells.json").write_text(json.dumps(cells))
    again = summary.write(old_run)
    assert [row.policy_label for row in again] == [row.policy_label for row in reversed(rows)]
    assert again[0].samples == 4
    assert "no luck" in (old_run / "summary.md").read_text()


def test_the_committed_summaries_are_those_of_their_samples(tmp_path):
    for name in ("samples.jsonl", "cells.json"):
        shutil.copy(QUICKSTART / name, tmp_path / name)
    summary.write(tmp_path)
    for name in ("summary.csv", "summary.md"):
        assert (tmp_path / name).read_text() == (QUICKSTART / name).read_text()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda folder: (folder / "samples.jsonl").unlink(),
            "is not the folder of a run: it has no cells.json",
        ),
        (lambda folder: (folder / "cells.json").write_text("{"), "cells.json cannot be read"),
        (lambda folder: (folder / "cells.json").write_text("[7]"), "cells.json cannot be read"),
        (lambda folder: (folder / "cells.json").write_text('[{"cell": []}]'), "cells.json cannot be read"),
        (
            lambda folder: (folder / "samples.jsonl").write_text(
                (folder / "samples.jsonl").read_text().replace('"sparq": {', '"gone": {')
            ),
            "cannot be made from the samples: .*unknown policy 'gone'",
        ),
    ],
)
def test_a_folder_that_cannot_be_read_is_one_sentence(old_run, damage, message):
    damage(old_run)
    with pytest.raises(UserError, match=message):
        summary.write(old_run)


def test_what_ran_eagerly_on_a_gpu_is_said_where_the_speeds_are():
    def row(policy, why):
        return rows_of((entry("a", policy), records("a", [1], ran_eagerly=why)))[0]

    rows = [row("dense", ""), row("h2o 1/8", "it looks"), row("sparq 1/8", None), row("h2o 1/8", "it looks"),
            row("odd 1/8", "it looks")]  # fmt: skip
    assert results.eager_notes(rows) == ["Not as one CUDA graph a step: h2o 1/8, odd 1/8 (it looks)."]


def test_every_task_says_its_chance_level_and_its_limits():
    said = {kind: (kind.chance, kind().limits) for kind in (Needle, KeyValue, Perplexity)}
    assert said == {Needle: (0, (0, 1)), KeyValue: (0, (0, 1)), Perplexity: (8, None)}
    assert Repetition(length=128).limits == (0, 128)
    assert Repetition.chance == 0


# -------------------------------------------------------------------- in a terminal
def shown(rows, width, details=True):
    from kvsieve.compare.terminal import show

    console = Console(width=width, record=True, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115
    show(Results(rows), console, details=details)
    return console.export_text()


@pytest.fixture
def quickstart(old_run):
    summary.write(old_run)
    return results.read_csv(old_run / "summary.csv")


def test_the_terminal_shows_policies_by_tasks_and_the_rest_on_request(quickstart):
    first = shown(quickstart, 120, details=False)
    assert re.search(r"h2o 1/8 +0\.13 +0 ▼ +0 ▼ +4\.88 ▼ +1\.4 +0 ▼", first)
    assert "▼ worse, ▲ better than dense" in first
    assert "Too few samples to tell policies from dense: perplexity 1024." in first
    assert "needle: exact match" not in first
    text = shown(quickstart, 120)
    assert text.startswith(first.rstrip())
    assert re.search(r"sparq 1/8 +1\.252 +0\.733 to 1\.771 +\+0\.026 \(\+0\.013 to \+0\.039\)", text)
    assert re.search(r"noisy 462", text)
    assert "No room" not in text


@pytest.mark.parametrize("width", [100, 80, 60, 45])
def test_a_narrow_terminal_shows_all_tasks_and_says_which_details_it_leaves_out(quickstart, width):
    text = shown(quickstart, width)
    assert max(map(len, text.splitlines())) <= width
    assert "…" not in text
    one_line = " ".join(text.split())
    headings = {"95 % interval", "answers", "KV MB", "tokens/s", "bytes read", "against dense"}
    overview, *tables = re.split(r"\b(?=needle: |repetition: |perplexity: |key_value: )", one_line)
    assert len(tables) == 4
    for table in tables:
        said = re.search(r"No room here for (.*?): see summary.md", table)
        left_out = set(said[1].split(", ")) if said else set()
        above = table.partition("──")[0]
        for heading in headings - {"answers"}:
            assert (heading in above) != (heading in left_out), (heading, table)
    # In as many tables as it takes, each with all policies.
    assert overview.count("sparq 1/8") == overview.count("dense 1.00") == overview.count("──── dense")
    words = overview.partition("▼ worse")[0].split()
    found = {task: words.count(task) for task in ("needle", "repetition", "perplexity", "key_value")}
    assert found == {"needle": 2, "repetition": 1, "perplexity": 1, "key_value": 1}


def test_a_policy_that_lost_the_answers_is_not_green():
    rows = rows_of(
        (entry("a"), records("a", [1] * 16)), (entry("b", "h2o 1/8"), records("b", [0] * 16)),
        (entry("c", "odd 1/8"), records("c", [0, 1] * 8)),
    )  # fmt: skip
    from kvsieve.compare.terminal import task_table

    console = Console(width=120, record=True, file=open("/dev/null", "w"), force_terminal=True)  # noqa: SIM115
    console.print(task_table(Results(rows).groups, console))
    assert {row.mark for row in rows[1:]} == {"worse"}
    assert "\x1b[32m" not in console.export_text(styles=True)


def test_brackets_in_a_name_are_shown_as_they_are():
    rows = rows_of((entry("a", task="a[red]b"), records("a", [1])),
                   (entry("b", "dense_layers layers=[0]", task="a[red]b"), records("b", [1])))  # fmt: skip
    text = shown(rows, 120)
    assert "dense_layers layers=[0]" in text
    assert "a[red]b: exact match" in text
