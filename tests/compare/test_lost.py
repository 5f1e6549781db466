"""Files that other programs change, remove or put in the way of a run: nothing measured is lost."""

import json
import os
import signal
import stat

import pytest
from typer.testing import CliRunner

from kvsieve import UserError
from kvsieve.cli import app
from kvsieve.compare import journal, samples
from kvsieve.compare.execute.cell import Measurement
from kvsieve.compare.samples import Store

CONFIG = """\
    tasks: [needle: {context: 120, samples: 4}]
    policies: [dense, sparq: {compression: 1/4}]
    """


def emptied(path):
    path.write_bytes(b"")


def deleted(path):
    path.unlink()


def saved_by_an_editor(path):
    """Without its first line, by renaming a new file onto it."""
    beside = path.with_suffix(".new")
    beside.write_bytes(path.read_bytes().partition(b"\n")[2])
    beside.rename(path)


def edited_in_place(path):
    data = path.read_bytes()
    path.write_bytes(data.replace(b'"score": 0.0', b'"score": 1.0'))
    assert path.read_bytes() != data


def folder_deleted(path):
    for file in path.parent.iterdir():
        file.unlink()
    path.parent.rmdir()


@pytest.fixture
def meddle(monkeypatch):
    """Calls a function before the batch `number` of a run, or after the last one."""

    def meddle(number, action):
        measured = Measurement.batch
        count = 0

        def batch(*given):
            nonlocal count
            count += 1
            if count == number:
                action()
            found = measured(*given)
            if number == "last" and count == 8:
                action()
            return found

        monkeypatch.setattr(Measurement, "batch", batch)

    return meddle


@pytest.mark.parametrize(
    ("what", "when"),
    [
        (emptied, 5),
        (saved_by_an_editor, 5),
        (edited_in_place, 5),
        (deleted, "last"),
        (folder_deleted, "last"),
    ],
)
def test_samples_that_vanish_during_a_run_are_written_again(compare, meddle, tmp_path, what, when):
    path = tmp_path / "out" / "samples.jsonl"
    meddle(when, lambda: what(path))
    outcome = compare(CONFIG)
    assert "another program changed it during the run" in " ".join(compare.console.export_text().split())
    assert outcome.missing == 0
    found = samples.read(path)
    assert len(found) == len({(r["cell"], r["sample"]) for r in found}) == 8
    assert {r["score"] for r in found} == {0}
    assert [(row.policy, row.score, row.samples) for row in outcome.rows] == [
        ("dense", 0, 4), ("sparq", 0, 4)
    ]  # fmt: skip


def test_a_link_in_the_place_of_a_file_is_not_followed(compare, tmp_path):
    secret = tmp_path / "secret"
    secret.write_text("precious")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "samples.jsonl").symlink_to(secret)
    with pytest.raises(UserError, match=r"samples\.jsonl: cannot be written: it is a symbolic link"):
        compare(CONFIG)
    (folder / "samples.jsonl").unlink()
    for name in ("config.yaml", "environment.json", "cells.json", "protocol.json"):
        (folder / name).symlink_to(secret)
    compare(CONFIG)
    assert secret.read_text() == "precious"
    assert not any(path.is_symlink() for path in folder.iterdir())


def test_a_folder_may_be_a_link(compare, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "elsewhere")
    compare(CONFIG)
    assert len(samples.read(tmp_path / "elsewhere" / "samples.jsonl")) == 8


def test_a_pipe_in_the_place_of_a_file_is_refused_at_once(tmp_path):
    path = tmp_path / "samples.jsonl"
    os.mkfifo(path)
    with pytest.raises(UserError, match="cannot be written: it is not a regular file"):
        Store(path)
    with pytest.raises(UserError, match="cannot be read: it is not a regular file"):
        samples.read(path)
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="samples.jsonl: cannot be written: Is a directory"):
        Store(path)


def test_the_modes_of_all_files_follow_the_umask(compare):
    before = os.umask(0o027)
    try:
        folder = compare(CONFIG).folder
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o640}


def test_sigterm_says_that_the_samples_are_safe(write, meddle, tmp_path):
    meddle(3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    before = signal.getsignal(signal.SIGTERM)
    result = CliRunner().invoke(app, ["compare", str(write(CONFIG)), "--out", str(tmp_path / "out")])
    assert result.exit_code == 143
    assert "stopped; what was measured is in" in result.stderr
    assert "and the same command continues from there" in result.stderr
    assert len(samples.read(tmp_path / "out" / "samples.jsonl")) == 2
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_load_of_the_machine_is_kept(compare):
    folder = compare(CONFIG).folder
    load = json.loads((folder / "environment.json").read_text())["load"]
    assert len(load["start"]["load_average"]) == len(load["run"]["load_average"]) == 3
    assert load["run"]["seconds"] > 0
    assert all(0 <= load["run"][name] <= 1 for name in ("other_processes", "stolen"))


def test_the_machine_and_its_load_stay_those_of_the_run_that_measured(compare, monkeypatch):
    since, seen = journal.environment.Load.since, ["others had 50%", "others had 70%", None]
    monkeypatch.setattr(
        journal.environment.Load, "since", lambda self: since(self) | {"not_to_be_quoted": seen.pop(0)}
    )
    folder = compare(CONFIG).folder
    path = folder / "environment.json"
    measured = json.loads(path.read_text())
    text = (folder / "summary.md").read_text()
    assert "tokens/s are not to be quoted: others had 50%." in text
    path.write_text(json.dumps(measured | {"cpu": "another machine's"}))
    compare(CONFIG)  # measures nothing
    assert json.loads(path.read_text()) == measured | {"cpu": "another machine's"}
    assert (folder / "summary.md").read_text() == text
    compare(CONFIG.replace("samples: 4", "samples: 5"))
    found = json.loads(path.read_text())
    assert found["cpu"] == measured["cpu"]
    assert found["load"]["run"]["not_to_be_quoted"] == "others had 50%"
