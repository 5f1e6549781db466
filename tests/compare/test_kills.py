"""Runs that are killed at any moment and started again: nothing is lost, nothing is there twice."""

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
from rich.console import Console
from tests.reliability import record

from kvsieve.compare import run, samples

CONFIG = """\
    batch_size: 2
    tasks:
      - needle: {{context: 120, samples: {samples}}}
      - perplexity: {{context: 120, samples: {samples}, tokens: 8}}
    policies: [dense, h2o: {{compression: 1/4}}]
    """


def key(found):
    return found["cell"], found["sample"]


def killed(work, after):
    """Fork, do `work` there, kill it after this many seconds; whether it was through by then."""
    child = os.fork()
    if child == 0:  # the model is loaded here, which a new process would take seconds for
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    deadline = time.monotonic() + after
    while time.monotonic() < deadline:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            assert status == 0
            return False
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return True


@pytest.mark.parametrize(("kills", "samples_a_cell"), [(4, 8), pytest.param(200, 24, marks=pytest.mark.slow)])
def test_killed_runs_lose_nothing_and_double_nothing(load, model, tmp_path, kills, samples_a_cell):
    config, asked = load(CONFIG.format(samples=samples_a_cell)), 4 * samples_a_cell

    def work(folder):
        return run.compare(config, folder, Console(quiet=True), model)

    started = time.monotonic()
    expected = work(tmp_path / "whole").rows
    seconds = time.monotonic() - started
    scores = {key(r): r["score"] for r in samples.read(tmp_path / "whole" / "samples.jsonl")}
    assert len(scores) == asked
    generator = random.Random(kills)
    done = runs = during = 0
    while done < kills:
        folder = tmp_path / f"killed {runs}"
        path = folder / "samples.jsonl"
        runs += 1
        before = []
        while done < kills:
            # On average six kills to a run; some of them before the first sample, some in the summary.
            through = not killed(lambda folder=folder: work(folder), generator.random() * seconds / 3)
            found = samples.read(path)
            assert found[: len(before)] == before
            assert set(Counter(map(key, found)).values()) <= {1}
            before = found
            if through:
                break
            done += 1
            during += 0 < len(found) < asked
        rows = work(folder).rows  # whatever is missing is measured in this process
        found = samples.read(path)
        assert found[: len(before)] == before
        assert {key(r): r["score"] for r in found} == pytest.approx(scores)
        assert len(found) == asked
        assert [row.score for row in rows] == pytest.approx([row.score for row in expected])
    if kills > 100:
        assert during > kills / 4
        record("runs killed (SIGKILL at a random moment)", f"{done}, in {runs} folders")
        record("killed runs that had some of their samples", f"{during} of {done}")
        record("samples lost, and samples stored twice, in killed runs", "0, 0")


def test_a_killed_command_continues(write, load, model, tmp_path):
    """The same from the command line, once: cells have the same ids in another process."""
    path = tmp_path / "out" / "samples.jsonl"
    text = "tasks: [needle: {context: 120, samples: 300}]\npolicies: [dense]\n"
    command = [sys.executable, "-m", "kvsieve.cli", "compare", str(write(text)), "--out", str(path.parent)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 300
        while time.monotonic() < deadline and not (path.exists() and path.read_bytes().count(b"\n") >= 3):
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    survived = samples.read(path)
    assert 3 <= len(survived) < 300
    with path.open("a") as file:
        file.write('{"cell": "torn')
    more = load(text.replace("300", str(len(survived) + 2)))
    outcome = run.compare(more, path.parent, Console(quiet=True), model)
    found = samples.read(path)
    assert found[: len(survived)] == survived
    assert len(found) == len(survived) + 2
    assert [row.samples for row in outcome.rows] == [len(survived) + 2]
