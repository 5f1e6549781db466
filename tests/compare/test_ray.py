"""A comparison on Ray with two workers on this machine: the same table as here, whatever dies on the way."""

import csv
import os
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from rich.console import Console
from tests.reliability import record

from kvsieve import UserError, plugins
from kvsieve.compare import diagnostics, run, samples
from kvsieve.compare.execute import ray as on_ray

PLUGIN = '''
"""Policies that fail."""
import contextlib, dataclasses, os, signal
from pathlib import Path
from typing import ClassVar

import kvsieve


@dataclasses.dataclass(frozen=True)
class Deadly(kvsieve.Policy):
    """Dense; counts prompts in a file; behind the first, so many processes that decode are killed."""

    notes: str
    kills: int
    name: ClassVar[str] = "deadly"

    def for_layer(self, layer, layers):
        return self if layer == 0 else kvsieve.Policy()

    def on_prefill(self, kv):
        with open(self.notes, "a") as file:
            file.write("prompt\\n")

    def select(self, query, kv):
        if len(Path(self.notes).read_text().split()) > 1:
            for number in range(self.kills):
                with contextlib.suppress(FileExistsError):
                    os.close(os.open(f"{self.notes}.{number}", os.O_CREAT | os.O_EXCL))
                    os.kill(os.getpid(), signal.SIGKILL)
        return None


@dataclasses.dataclass(frozen=True)
class Broken(kvsieve.Policy):
    """Fails in its first step."""

    name: ClassVar[str] = "broken"

    def select(self, query, kv):
        raise RuntimeError("no luck")


@kvsieve.hookimpl
def register_policies(register):
    register(Deadly)
    register(Broken)
'''
TIMES = {"tokens_per_second", "tokens_per_second_min", "tokens_per_second_max"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    """A plugin that is installed for all processes, and two CPUs of this machine."""
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'kvsieve[ray]'")
    site = tmp_path_factory.mktemp("site")
    (site / "failing_policies.py").write_text(PLUGIN)
    information = site / "failing-1.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.1\nName: failing\nVersion: 1.0\n")
    (information / "entry_points.txt").write_text("[kvsieve]\nfailing = failing_policies\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_worker_niceness", "0")
        plugins.reload()
        ray.init(
            address="local",
            num_cpus=2,
            num_gpus=0,
            include_dashboard=False,
            log_to_driver=False,
            object_store_memory=100_000_000,
        )
        yield
        ray.shutdown()
    plugins.reload()


@pytest.fixture
def compare(load, tmp_path):
    """Runs a configuration, on Ray or here; what it printed is in `compare.console`."""

    def compare(text, out, executor=None):
        compare.console = Console(record=True, width=200, file=open(os.devnull, "w"))  # noqa: SIM115
        return run.compare(
            load(text, with_model="model:" not in text), tmp_path / out, compare.console, executor=executor
        )

    return compare


def table(folder):
    with (folder / "summary.csv").open() as file:
        return [{k: v for k, v in row.items() if k not in TIMES} for row in csv.DictReader(file)]


def test_a_cluster_measures_what_this_process_does_and_a_cell_fails_alone(cluster, compare):
    text = "device: cpu\ntasks: [needle: {context: 120, samples: 2}]\npolicies: [dense, broken]\n"
    outcome = compare(text, "ray", on_ray.OnRay(workers=1))
    assert list(outcome.failures.values()) == ["RuntimeError: no luck"]
    assert "in select" in (outcome.folder / "errors.txt").read_text()
    assert table(outcome.folder) == table(compare(text, "here").folder)


@pytest.mark.slow
def test_a_killed_worker_and_a_failing_cell_change_nothing_in_the_table(
    cluster, compare, model_folder, tmp_path, monkeypatch
):
    notes = tmp_path / "notes"
    monkeypatch.chdir(tmp_path)  # the cluster was started elsewhere
    (tmp_path / "model").symlink_to(model_folder)
    text = f"""\
        model: ./model
        device: cpu
        tasks: [needle: {{context: 120, samples: 3}}]
        policies: [dense, broken, deadly: {{notes: "{notes}", kills: 1}}]
        """
    began = compare(text.replace("samples: 3", "samples: 1"), "ray")  # here: the cluster goes on from there
    kept = samples.read(began.folder / "samples.jsonl")
    assert len(kept) == 2
    outcome = compare(text, "ray", on_ray.OnRay(workers=2))
    assert list(outcome.failures.values()) == ["RuntimeError: no luck"]
    assert "in select" in (outcome.folder / "errors.txt").read_text()
    printed = compare.console.export_text()
    assert "2 samples are already in" in printed
    assert "4/7 samples" in printed
    assert "its worker died, goes on where it stopped: needle 120, deadly" in printed
    found = samples.read(outcome.folder / "samples.jsonl")
    assert found[:2] == kept
    assert set(Counter((r["cell"], r["sample"]) for r in found).values()) == {1}
    assert len(found) == 6
    # 1 here, 1 killed, then again that one and the last: only the batch in flight was lost
    assert len(Path(notes).read_text().split()) == 4
    here = compare(text, "here")
    assert table(outcome.folder) == table(here.folder)
    assert [row["samples"] for row in table(here.folder)] == ["3", "3"]


@pytest.mark.slow
def test_a_cell_whose_worker_always_dies_is_given_up(cluster, compare, tmp_path):
    outcome = compare(
        f"""\
        device: cpu
        tasks: [needle: {{context: 120, samples: 3}}]
        policies: [deadly: {{notes: "{tmp_path}/notes", kills: 99}}, dense]
        """,
        "ray",
        on_ray.OnRay(workers=1),
    )
    (reason,) = outcome.failures.values()
    assert reason.startswith("its worker died 3 times in a row: ")
    assert [(row["policy"], row["samples"]) for row in table(outcome.folder)] == [
        ("deadly", "1"),
        ("dense", "3"),
    ]


@pytest.mark.slow
def test_diagnostics_of_a_worker_are_those_of_this_process(cluster, compare):
    text = """\
        device: cpu
        diagnose: {steps: 2, samples: 2}
        tasks: [needle: {context: 120, samples: 2}]
        policies: [dense, h2o: {compression: 1/4}]
        """
    folders = compare(text, "here").folder, compare(text, "ray", on_ray.OnRay()).folder
    here, there = ([*diagnostics.read(folder).values()] for folder in folders)
    assert here == there
    assert [len(records) for records in here] == [2, 2]


LISTENS = """
import psutil
from kvsieve.compare.execute.ray import OnRay

ray = OnRay().ray
assert ray.get(ray.remote(lambda: 1).remote()) == 1
for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
    for connection in process.net_connections("inet"):
        if connection.status == psutil.CONN_LISTEN:
            print(connection.laddr.ip)
"""


@pytest.mark.slow
def test_a_cluster_that_is_started_here_listens_on_the_loopback_only():
    pytest.importorskip("ray", reason="ray is not installed: pip install 'kvsieve[ray]'")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    command = [sys.executable, "-c", LISTENS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    addresses = done.stdout.split()
    assert len(addresses) > 3
    assert {address.removeprefix("::ffff:") for address in addresses} <= {"127.0.0.1", "::1"}
    record("ports of a Ray cluster that a comparison starts, open to the network", f"0 of {len(addresses)}")


def test_tensor_parallel_is_no_matter_of_ray(cluster, load):
    config = load("tensor_parallel: true\ntasks: [needle]\npolicies: [dense]\n")
    with pytest.raises(UserError, match="tensor_parallel runs under torchrun, not on Ray"):
        on_ray.OnRay().prepare(config, "now")


def test_without_ray_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(UserError, match=r"pip install 'kvsieve\[ray\]'"):
        on_ray.OnRay()


def test_an_address_where_nothing_answers(monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'kvsieve[ray]'")
    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    with socket.socket() as taken:  # bound, and not listening
        taken.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(UserError, match=f"no Ray cluster answers at {address}: .*refused"):
            on_ray.OnRay(address)
        monkeypatch.setenv("RAY_ADDRESS", address)
        with pytest.raises(UserError, match=f"no Ray cluster answers at {address}: .*refused"):
            on_ray.OnRay()


def test_a_cluster_that_does_not_let_us_in(monkeypatch):
    ray = pytest.importorskip("ray", reason="ray is not installed: pip install 'kvsieve[ray]'")

    def refused(**options):
        raise ConnectionError("Failed to connect")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)
    monkeypatch.setattr(ray, "init", refused)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        with pytest.raises(UserError, match=f"{address}': Failed to connect; .*RAY_AUTH_MODE=token"):
            on_ray.OnRay(address)
