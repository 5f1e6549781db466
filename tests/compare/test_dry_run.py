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
from kvsieve.compare.execute.speed import Stopwatch

TEXT = """\
    batch_size: 2
    tasks: [needle: {context: [160, 80], samples: 6}]
    policies: [dense, h2o: {tokens: 20}]
    """


STEP = 1 / 50  # seconds of a row's decode step


@pytest.fixture(autouse=True)
def speed(monkeypatch):
    """So many tokens per second: always the same."""
    monkeypatch.setattr(Stopwatch, "measure", lambda *_: [20.0, 1 / STEP, 90.0])


def estimated(config, folder, model):
    """A second passes whenever the clock is looked at."""
    return dry_run.estimate(config, folder, Local(model), itertools.count().__next__)


def test_cells_follow_from_one_batch_of_the_shortest_task_and_a_few_samples_of_each(load, model, tmp_path):
    found = estimated(load(TEXT), tmp_path / "out", model)
    assert [(one.cell.task.context, one.cell.policy_name, one.missing) for one in found] == [
        (160, "dense", 6), (160, "h2o", 6), (80, "dense", 6), (80, "h2o", 6),
    ]  # fmt: skip
    long, kept_of_long, short, kept = found
    # A batch of two took a second, a sample half of it, as did the few samples of either task.
    assert [one.measured for one in found] == [False, False, True, True]
    assert [one.seconds for one in found] == pytest.approx([3] * 4)
    token = 2 * 1 * 2 * 16 * 4
    assert short.kv_bytes == 2 * token * (80 + 7)
    assert long.kv_bytes == 2 * token * (160 + 7)
    assert kept.kv_bytes == kept_of_long.kv_bytes == 2 * (token + 2 * 4) * 20  # its mass, too
    assert not (tmp_path / "out").exists()


def test_reading_and_steps_are_scaled_apart():
    rate, few_like = dry_run._Rate(1.0, 0.01, 40, 0), dry_run._Rate(0.5, 0.02, 10, 0)
    few = dry_run._Rate(1.7, 0.04, 20, 0)
    # 0.6 s of reading, where 0.3 became 0.9; steps of 10 ms, where 20 became 40; 20 of them.
    assert dry_run._as_the_few(rate, few_like, few) == pytest.approx(0.6 * 3 + 20 * 0.02)
    unknown = few._replace(step=0.0)  # a task that tells no speed
    assert dry_run._as_the_few(rate, few_like, unknown) == pytest.approx(1.7 / 0.5)


def test_a_task_that_takes_longer_under_one_policy_is_scaled_so_under_the_others(
    load, model, tmp_path, monkeypatch
):
    def batch(self, *arguments, measured=Measurement.batch):
        if self.cell.task.context == 160:
            clock[0] += 3
        return measured(self, *arguments)

    def now():
        clock[0] += 1
        return clock[0]

    clock = [0]
    monkeypatch.setattr(Measurement, "batch", batch)
    long, kept_of_long, short, kept = dry_run.estimate(load(TEXT), tmp_path / "out", Local(model), now)
    assert short.seconds == kept.seconds == 3
    reading, steps = 0.5 - 6 * STEP, 6 * STEP
    factor = (2.0 - steps) / reading
    assert long.seconds == kept_of_long.seconds == pytest.approx(6 * (reading * factor + steps))


def test_where_the_few_samples_fail_times_follow_the_tokens(load, model, tmp_path, monkeypatch):
    def batch(self, *arguments, measured=Measurement.batch):
        if self.cell.task.context == 160:
            raise UserError("no luck")
        return measured(self, *arguments)

    monkeypatch.setattr(Measurement, "batch", batch)
    long, _, short, _ = estimated(load(TEXT), tmp_path / "out", model)
    # Two policies share a prompt; an answer has 7 tokens.
    assert long.seconds == pytest.approx(short.seconds * (160 / 2 + 8 * 7) / (80 / 2 + 8 * 7))


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
    assert "scaled" in result.stdout
    assert "needle 160: " in result.stdout  # the time of a task
    assert "Nothing was written." in result.stdout
    assert sorted(tmp_path.iterdir()) == [*before, path]
    shared = write("    tensor_parallel: true\n" + TEXT)
    result = CliRunner().invoke(app, ["compare", str(shared), "--dry-run"])
    assert "a dry run is for one process: leave out tensor_parallel" in result.stderr
