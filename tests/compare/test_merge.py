"""Runs joined: policies, samples and machines of one protocol; others are refused, or shown apart."""

import json
import shutil

import pytest
from typer.testing import CliRunner

from kvsieve import UserError
from kvsieve.cli import app
from kvsieve.compare import diagnostics, merge, samples, summary
from kvsieve.compare.results import Results

TASKS = "batch_size: 2\ntasks: [needle: {context: 120, samples: 4}]\n"


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    """Folders of runs: dense and h2o; sparq with fewer samples, and dense."""
    import kvsieve
    from kvsieve.compare import config, run

    folder, model = tmp_path_factory.mktemp("runs"), kvsieve.load(str(model_folder))
    texts = {
        "a": TASKS + "policies: [dense, h2o: {compression: 1/4}]\n",
        "b": TASKS.replace("4}", "2}") + "policies: [sparq: {compression: 1/4}, dense]\n",
    }
    for name, text in texts.items():
        (folder / f"{name}.yaml").write_text(f"model: {model_folder}\n{text}")
        run.compare(config.load(folder / f"{name}.yaml"), folder / name, model=model)
    return folder


def joined(*folders, out, **options):
    notes = merge.merge(list(folders), out, **options)
    return summary.write(out), notes


def changed(run, folder, environment=None, protocol=None):
    """A copy of a run as another machine, or another version of a package, would have made it.

    With another protocol the cells have other ids.
    """
    shutil.copytree(run, folder)
    found = json.loads((folder / "environment.json").read_text())
    (folder / "environment.json").write_text(json.dumps(found | (environment or {})))
    if protocol:
        for name in ("cells.json", "protocol.json", "samples.jsonl"):
            text = (folder / name).read_text()
            for cell in json.loads((run / "protocol.json").read_text()):
                text = text.replace(cell, cell[::-1])
            (folder / name).write_text(text)
        records = samples.read(run / "samples.jsonl")  # whose checksums are no longer right above
        samples.write(folder / "samples.jsonl", [one | {"cell": one["cell"][::-1]} for one in records])
        known = json.loads((folder / "protocol.json").read_text())
        fields = {cell: fields | protocol for cell, fields in known.items()}
        (folder / "protocol.json").write_text(json.dumps(fields))
    return folder


def test_policies_of_two_runs_stand_in_one_table(runs, tmp_path):
    rows, notes = joined(runs / "a", runs / "b", out=tmp_path / "out")
    assert [(row.policy, row.samples, row.pairs) for row in rows] == [
        ("dense", 4, None), ("h2o", 4, 4), ("sparq", 2, 2),
    ]  # fmt: skip
    assert len(Results(rows).groups) == 1
    assert notes == ["2 samples are in a and in b: those of a count"]
    alone = summary.write(runs / "a")
    assert rows[:2] == alone


def test_the_report_of_a_merge_can_be_made_again(runs, tmp_path):
    rows, _ = joined(runs / "b", runs / "a", out=tmp_path / "out")
    assert summary.write(tmp_path / "out") == rows
    again, _ = joined(runs / "a", runs / "b", out=tmp_path / "out")  # an earlier merge is replaced
    assert {row.policy: row.score for row in again} == {row.policy: row.score for row in rows}


def test_speed_stays_that_of_each_machine(runs, tmp_path):
    other = changed(runs / "a", tmp_path / "there", environment={"cpu": "Other CPU", "gpu": None})
    rows, notes = joined(runs / "a", other, runs / "b", out=tmp_path / "out")
    here = json.loads((runs / "a" / "environment.json").read_text())["cpu"]
    dense, h2o, sparq = rows
    assert [part.rpartition(": ")[0] for part in h2o.machine.split("; ")] == [here, "Other CPU"]
    assert [part.rpartition(": ")[0] for part in sparq.machine.split("; ")] == [here]
    assert {row.tokens_per_second for row in rows} == {None}
    assert h2o.speed == h2o.machine
    assert (dense.samples, h2o.samples) == (4, 4)
    assert notes[0] == "8 samples are in a and in there: those of a count"
    environment = json.loads((tmp_path / "out" / "environment.json").read_text())
    assert environment["runs"]["there"]["cpu"] == "Other CPU"
    assert environment["dtype"] == "float32"


def test_a_machine_with_smaller_batches_keeps_its_speed(runs, tmp_path):
    other = changed(runs / "a", tmp_path / "there", environment={"cpu": "Other CPU", "gpu": None})
    larger = [one | {"rows": 8} for one in samples.read(runs / "a" / "samples.jsonl")]
    samples.write(other / "samples.jsonl", larger)
    loads = {"run": {"not_to_be_quoted": "others had 50%"}}
    changed(other, tmp_path / "busy", environment={"load": loads})
    rows, _ = joined(runs / "a", tmp_path / "busy", out=tmp_path / "out")
    here = json.loads((runs / "a" / "environment.json").read_text())["cpu"]
    for row in rows:
        assert [part.rpartition(": ")[0] for part in row.machine.split("; ")] == [here, "Other CPU"]
    said = (tmp_path / "out" / "summary.md").read_text()
    assert "tokens/s of busy are not to be quoted: others had 50%." in said


def test_machines_of_one_name_that_are_not_alike_are_told_apart(runs, tmp_path):
    other = changed(runs / "a", tmp_path / "there", environment={"threads": 64})
    rows, _ = joined(runs / "a", other, out=tmp_path / "out")
    assert [part.rpartition(": ")[0].rpartition(" (")[2] for part in rows[0].machine.split("; ")] == [
        "a)", "there)",
    ]  # fmt: skip


def test_runs_of_another_protocol_are_refused_with_all_that_differs(runs, tmp_path):
    other = changed(runs / "b", tmp_path / "c", protocol={"torch": "9.9", "seed": 5})
    with pytest.raises(UserError) as caught:
        joined(runs / "a", other, out=tmp_path / "out")
    torch = json.loads((runs / "a" / "environment.json").read_text())["torch"]
    assert str(caught.value).splitlines() == [
        f"a and c differ in torch ({torch} -> 9.9), seed (0 -> 5)",
        "such results are not mixed; --apart shows them side by side",
    ]
    assert not (tmp_path / "out").exists()


def test_apart_they_stand_side_by_side(runs, tmp_path):
    other = changed(runs / "b", tmp_path / "c", protocol={"torch": "9.9"})
    rows, notes = joined(runs / "a", other, out=tmp_path / "out", apart=True)
    assert notes == []
    assert [group.column for group in Results(rows).groups] == ["needle 120 in a", "needle 120 in c"]
    assert [(row.run, row.policy, row.pairs) for row in rows] == [
        ("a", "dense", None), ("a", "h2o", 4), ("c", "sparq", 2), ("c", "dense", None),
    ]  # fmt: skip


def test_a_run_that_does_not_say_its_protocol_is_shown_apart_only(runs, tmp_path):
    shutil.copytree(runs / "b", tmp_path / "old")
    (tmp_path / "old" / "protocol.json").unlink()
    with pytest.raises(UserError, match="does not say how .* was measured .*: it can only be shown apart"):
        joined(runs / "a", tmp_path / "old", out=tmp_path / "out")
    rows, _ = joined(runs / "a", tmp_path / "old", out=tmp_path / "out", apart=True)
    assert len(rows) == 4


def test_what_cannot_be_joined_is_one_sentence(runs, tmp_path):
    (tmp_path / "empty").mkdir()
    cells = json.loads((runs / "a" / "cells.json").read_text())
    newer = shutil.copytree(runs / "a", tmp_path / "newer")
    (newer / "cells.json").write_text(json.dumps([one | {"mood": 1} for one in cells]))
    found = json.loads((newer / "environment.json").read_text())
    (newer / "environment.json").write_text(json.dumps(found | {"kvsieve": "9.0"}))
    for folders, message in [
        ([tmp_path / "empty"], "is not the folder of a run: it has no cells.json, and no samples"),
        ([newer], "newer was written by another version of kvsieve (9.0; this is "),
        ([runs / "a"], "a run is named twice: "),
        ([tmp_path / "nowhere"], "is not the folder of a run"),
    ]:
        result = CliRunner().invoke(app, ["report", *map(str, [runs / "a", *folders])])
        assert result.exit_code == 2
        (line,) = result.stderr.splitlines()
        assert message in line
    result = CliRunner().invoke(app, ["report", str(newer)])
    assert "another version of kvsieve (9.0; this is " in result.stderr
    with pytest.raises(UserError, match="holds a run of its own: give another folder"):
        joined(runs / "a", runs / "b", out=runs / "a")
    assert "are for several runs" in CliRunner().invoke(app, ["report", str(newer), "--apart"]).stderr


def with_diagnostics(run, folder, method="8 steps"):
    """A copy of a run with diagnostics of its first samples."""
    shutil.copytree(run, folder)
    numbers = {name: [[0.5]] for name in diagnostics.NUMBERS}
    lines = [
        {"cell": one["cell"], "sample": 0, "method": method, "steps": 3, "layers": [0]} | numbers
        for one in json.loads((folder / "cells.json").read_text())
    ]
    samples.write(folder / diagnostics.NAME, lines)
    return folder


def test_diagnostics_are_joined_if_they_were_made_in_one_way(runs, tmp_path):
    a, b = with_diagnostics(runs / "a", tmp_path / "a"), with_diagnostics(runs / "b", tmp_path / "b")
    joined(a, b, out=tmp_path / "out")
    found = diagnostics.by_policy(tmp_path / "out")
    assert [(one.label, one.samples) for one in found] == [("dense", 1), ("h2o 1/4", 1), ("sparq 1/4", 1)]
    joined(a, b, out=tmp_path / "apart", apart=True)
    labels = [one.label for one in diagnostics.by_policy(tmp_path / "apart")]
    assert labels == ["dense in a", "h2o 1/4 in a", "sparq 1/4 in b", "dense in b"]
    other = with_diagnostics(runs / "b", tmp_path / "other", method="4 steps")
    _, notes = joined(a, other, out=tmp_path / "out")
    assert notes[-1] == "diagnostics were made in several ways (8 steps; 4 steps) and are left out"
    assert diagnostics.by_policy(tmp_path / "out") == []


def test_the_command_joins_and_reports(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, ["report", str(runs / "a"), str(runs / "b")])
    assert result.exit_code == 0
    assert "note: 2 samples are in a and in b: those of a count" in result.stderr
    assert "sparq" in result.stdout
    assert (tmp_path / "results" / "a+b" / "summary.csv").exists()
    assert (tmp_path / "results" / "a+b" / "report.html").exists()
