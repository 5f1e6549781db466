"""The outside packages in examples/ are found, listed, and compared: installed the light way, without pip."""

import csv
import os
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvsieve import plugins
from kvsieve.cli import app
from kvsieve.testing import LAWS, TASK_LAWS

EXAMPLES = Path(__file__).parent.parent / "examples"
NAMES = "my_policy", "my_task"

COMPARISON = """
model: reference
tasks:
  - lines: {context: 256, samples: 2}
policies:
  - dense
  - key_norm: {compression: 1/4}
"""


@pytest.fixture(autouse=True)
def forget():
    """The packages' modules are imported anew where they are installed."""
    yield
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The packages as installed: their modules, and metadata made from their pyproject.toml."""
    site = tmp_path_factory.mktemp("site")
    for name in NAMES:
        project = tomllib.loads((EXAMPLES / name / "pyproject.toml").read_text())["project"]
        (site / f"{name}.py").write_text((EXAMPLES / name / f"{name}.py").read_text())
        info = site / f"{name}-{project['version']}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n"
        )
        points = [f"{name} = {module}" for name, module in project["entry-points"]["kvsieve"].items()]
        (info / "entry_points.txt").write_text("\n".join(["[kvsieve]", *points]) + "\n")
    return site


@pytest.fixture
def kvsieve(site, monkeypatch):
    """Runs a command where the packages are installed; what it printed."""
    with monkeypatch.context() as patch:
        patch.syspath_prepend(str(site))
        patch.setenv("COLUMNS", "120")
        plugins.reload()

        def run(*arguments):
            result = CliRunner().invoke(app, list(map(str, arguments)), catch_exceptions=False)
            assert result.exit_code == 0, result.output
            return result.stdout

        yield run
    plugins.reload()


def test_it_is_listed_with_its_package(kvsieve):
    listed = kvsieve("policies")
    assert "key_norm" in listed
    assert "my-policy 0.1.0" in listed
    assert "arXiv:2406.11430" in listed


def test_it_stands_in_the_table_beside_dense(kvsieve, tmp_path):
    (tmp_path / "mine.yaml").write_text(COMPARISON)
    shown = kvsieve("compare", tmp_path / "mine.yaml", "--out", tmp_path / "run")
    assert "key_norm 1/4" in shown
    with (tmp_path / "run" / "summary.csv").open() as file:
        rows = {row["policy"]: row for row in csv.DictReader(file)}
    assert float(rows["key_norm"]["bytes_ratio"]) == pytest.approx(1 / 4, rel=0.2)
    assert float(rows["key_norm"]["kv_bytes"]) < float(rows["dense"]["kv_bytes"]) / 3


def test_they_obey_the_laws(site, monkeypatch):
    """By the functions that are their own tests."""
    monkeypatch.syspath_prepend(str(site))
    for name, test, laws in (("my_policy", "test_key_norm", LAWS), ("my_task", "test_lines", TASK_LAWS)):
        own = runpy.run_path(str(EXAMPLES / name / f"test_{name}.py"))[test]
        for law in laws:
            own(law)


@pytest.mark.slow
def test_their_own_tests_pass(site):
    tests = [EXAMPLES / name / f"test_{name}.py" for name in NAMES]
    command = [sys.executable, "-m", "pytest", "-q", "-c", os.devnull, *map(str, tests)]
    path = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert f"{len(LAWS) + len(TASK_LAWS)} passed" in done.stdout
