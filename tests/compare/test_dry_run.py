"""Time and memory of a comparison, estimated from one batch."""

import itertools

import pytest
from rich.console import Console
from typer.testing import CliRunner

from kvsieve import UserError
from kvsieve.cli import app
from kvsieve.compare import dry_run, run
from kvsieve.compare.execute.cell import Measurement
from kvsieve.compare.execute.local import Local

TEXT = """\
    batch_size: 2
    tasks: [needle: {context: [160, 80], samples: 6}]
    policies: [dense, h2o: {tokens: 20}]
    """


def estimated(config, folder, model):
    """A second passes whenever the clock is looked at."""
    return dry_run.estimate(config, folder, Local(model), itertools.count().__next__)


def test_cells_follow_from_one_batch_of_the_shortest_task(load, model, tmp_path):
    found = estimated(load(TEXT), tmp_path / "out", model)
    assert [(one.cell.task.context, one.cell.policy_name, one.missing) for one in found] == [
        (160, "dense", 6), (160, "h2o", 6), (80, "dense", 6), (80, "h2o", 6),
    ]  # fmt: skip
    long, kept_of_long, short, kept = found
    # A batch of two took a second: one sample half. Two policies share a prompt; an answer has 7 tokens.
    assert short.seconds == kept.seconds == 3
    assert long.seconds == pytest.approx(3 * (160 / 2 + 8 * 7) / (80 / 2 + 8 * 7))
    token = 2 * 1 * 2 * 16 * 4
    assert short.kv_bytes == 2 * token * (80 + 7)
    assert long.kv_bytes == 2 * token * (160 + 7)
    assert kept.kv_bytes == kept_of_long.kv_bytes == 2 * (token + 2 * 4) * 20  # its mass, too
    assert not (tmp_path / "out").exists()


def test_it_is_as_much_as_a_run_then_holds_and_what_is_there_is_not_counted(load, model, tmp_path):
    folder = tmp_path / "out"
    rows = run.compare(
        load(TEXT.replace("samples: 6", "samples: 1")), folder, Console(quiet=True), model
    ).rows
    found = estimated(load(TEXT.replace("samples: 6", "samples: 3")), folder, model)
    assert [one.missing for one in found] == [2] * 4
    assert [one.kv_bytes / 2 for one in found] == [row.kv_bytes for row in rows]


def test_a_policy_that_fails_is_named(load, model, tmp_path, monkeypatch):
    def batch(self, *arguments, measured=Measurement.batch):
        if self.cell.policy_name == "h2o":
            raise UserError("no luck")
        return measured(self, *arguments)

    monkeypatch.setattr(Measurement, "batch", batch)
    found = estimated(load(TEXT), tmp_path / "out", model)
    assert [one.error for one in found] == ["", "no luck"] * 2
    assert found[1].seconds is None
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    dry_run.show(found, console)
    assert "needle 160, h2o tokens 20: no luck" in console.export_text()


def test_the_command_prints_the_cells_and_writes_nothing(write, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    path = write(TEXT)
    result = CliRunner().invoke(app, ["compare", str(path), "--dry-run"])
    assert result.exit_code == 0, result.stderr
    assert "needle 80, h2o tokens 20" in result.stdout
    assert "Nothing was written." in result.stdout
    assert sorted(tmp_path.iterdir()) == [*before, path]
    shared = write("    tensor_parallel: true\n" + TEXT)
    result = CliRunner().invoke(app, ["compare", str(shared), "--dry-run"])
    assert "a dry run is for one process: leave out tensor_parallel" in result.stderr
