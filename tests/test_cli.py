"""The command line as a user meets it."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from kvsieve import __version__, plugins
from kvsieve.cli import app
from kvsieve.compare import report, run
from kvsieve.compare.execute.cell import Measurement
from kvsieve.compare.results import read_csv


@pytest.fixture
def config(tmp_path, model_folder):
    path = tmp_path / "mine.yaml"
    path.write_text(
        f"model: {model_folder}\n"
        "tasks: [needle: {context: 120, samples: 2}]\n"
        "policies: [dense, h2o: {compression: 1/4}]\n"
    )
    return path


@pytest.fixture
def kvsieve(monkeypatch, tmp_path):
    """Runs a command in an empty folder; its result."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    return lambda *arguments, **options: CliRunner().invoke(app, list(map(str, arguments)), **options)


def test_help_is_quick_because_nothing_heavy_is_imported():
    code = (
        "import sys; sys.argv = ['kvsieve', '--help']\n"
        "from kvsieve.cli import main\n"
        "try: main()\n"
        "finally:\n"
        "    heavy = {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules)\n"
        "    assert not heavy, heavy\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "compare" in found.stdout


def test_compare_prints_the_table_and_where_the_report_is(kvsieve, config, tmp_path, monkeypatch):
    # The report is slow, and has its own tests.
    monkeypatch.setattr(report, "write_report", lambda folder: folder / "report.html")
    result = kvsieve("compare", config)
    assert result.exit_code == 0, result.output
    assert "needle: exact match, higher is better" not in result.stdout
    assert "h2o 1/4" in result.stdout
    assert "report: results/mine/report.html" in result.stdout
    assert "numbers: results/mine/summary.csv" in result.stdout
    assert max(map(len, result.stdout.splitlines())) <= 80
    folder = tmp_path / "results" / "mine"
    assert {"config.yaml", "environment.json", "samples.jsonl", "summary.csv", "summary.md"} <= {
        path.name for path in folder.iterdir()
    }
    before = (folder / "summary.csv").read_text()
    (folder / "summary.csv").unlink()
    again = kvsieve("report", folder, "--details")
    assert again.exit_code == 0
    assert "needle: exact match, higher is better" in again.stdout
    assert (folder / "summary.csv").read_text() == before


def test_without_a_report_the_table_is_still_there(kvsieve, config, monkeypatch):
    def missing(folder):
        raise run.UserError("report.html: cannot be written: disk full")

    monkeypatch.setattr(report, "write_report", missing)
    result = kvsieve("compare", config, "--set", "tasks.0.needle.samples=1", "--out", "here")
    assert result.exit_code == 0
    assert "no report: report.html: cannot be written" in result.stdout
    assert "numbers: here/summary.csv" in result.stdout


def test_a_failing_cell_gives_status_1(kvsieve, config, monkeypatch):
    measure = Measurement.batch

    def failing(measurement, *given):
        if measurement.cell.policy.name == "dense":
            return measure(measurement, *given)
        raise RuntimeError("no luck\nat all")

    monkeypatch.setattr(Measurement, "batch", failing)
    result = kvsieve("compare", config)
    assert result.exit_code == 1
    assert "1 cells failed; results/mine/errors.txt has the tracebacks" in result.stderr
    label = next(entry["policy_label"] for entry in cells_of("results/mine") if entry["error"])
    assert f"failed: {label} on needle 120: RuntimeError: no luck" in result.stdout
    assert re.search(rf"^ *{re.escape(label)} .* failed *$", result.stdout, re.MULTILINE)
    dense, failed = read_csv(Path("results/mine/summary.csv"))
    assert (failed.policy_label, failed.score, failed.error) == (label, None, "RuntimeError: no luck")
    assert (dense.error, failed.bytes_ratio, failed.samples) == ("", None, None)
    markdown = Path("results/mine/summary.md").read_text()
    assert re.search(rf"^\| {re.escape(label)} \| . \| failed \|$", markdown, re.MULTILINE)
    page = Path("results/mine/report.html").read_text()
    assert '<td class="" title="RuntimeError: no luck" data-text="failed ">failed' in page
    assert kvsieve("report", "results/mine", "--details").stdout.count("failed: ") == 1


def cells_of(folder):
    return json.loads((Path(folder) / "cells.json").read_text())


def test_where_every_cell_fails_the_table_says_so(kvsieve, config, monkeypatch):
    def failing(*_):
        raise RuntimeError("no luck")

    monkeypatch.setattr(Measurement, "batch", failing)
    result = kvsieve("compare", config)
    assert result.exit_code == 1
    assert "2 cells failed" in result.stderr
    assert result.stdout.count("failed: ") == 2
    assert "report: results/mine/report.html" in result.stdout


def test_an_interruption_says_how_to_go_on(kvsieve, config, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Measurement, "batch", interrupted)
    result = kvsieve("compare", config)
    assert result.exit_code == 130
    assert "stopped; what was measured is in results/mine, and the same command continues" in result.stderr


def test_generate_makes_room_for_probes(kvsieve):
    result = kvsieve("generate", "--policy", "kvzip", "--max-new-tokens", "2", "def main(argument):")
    assert result.exit_code == 0, result.output
    assert "kvzip ratio=0.3" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory"),
        (["validate", "wrong.yaml"], "wrong.yaml:1:8: modle: unknown key 'modle'"),
        (["report", "."], "is not the folder of a run"),
        (["generate", "--policy", "sparc", "x"], "unknown policy 'sparc'; did you mean 'sparq'?"),
        (["generate", "--policy", "sparq", "-p", "r=x", "x"], "sparq.r: must be an integer (got 'x')"),
        (["generate", "--policy", "sparq", "-p", "r", "x"], "-p r: write a parameter as NAME=VALUE"),
        (["generate", "--policy", "sparq", "-p", "r=[1, 2]", "x"], "only one can be run here"),
        (["generate", "--compression", "9", "x"], "above 0 and up to 1, such as 1/8"),
        (["generate", "--model", "./nowhere", "x"], "no such folder"),
        (["generate", "--policy", "sparq: {k: true}", "x"], "sparq.k: must be an integer (got True)"),
        (["generate", "--policy", "sparq", "-p", "k=!!int x", "x"], "tags such as !!int are not read"),
        (["generate", "--policy", "[sparq", "x"], "--policy is a name, or one with parameters"),
        (["generate", "--seed", "99999999999999999999", "x"], "--seed"),
    ],
)
def test_a_mistake_is_a_message_and_status_2(kvsieve, tmp_path, arguments, message):
    (tmp_path / "wrong.yaml").write_text("modle: x\n")
    result = kvsieve(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_help_and_version_are_where_people_look_for_them(kvsieve):
    assert kvsieve("--version").stdout == f"kvsieve {__version__}\n"
    assert kvsieve("-h").stdout == kvsieve("--help").stdout
    assert "Usage" in kvsieve("compare", "-h").stdout


def test_policies_and_tasks_as_json(kvsieve):
    found = {one["name"]: one for one in json.loads(kvsieve("policies", "--json").stdout)}
    assert found["sparq"]["distribution"] == "kvsieve"
    assert found["sparq"]["paper"] == "arXiv:2312.04985"
    assert {"name": "k", "type": "int", "required": False, "default": 128} in found["sparq"]["parameters"]
    inner = {"name": "inner", "type": "Policy", "required": True, "default": None}
    assert inner in found["dense_layers"]["parameters"]
    needle = next(one for one in json.loads(kvsieve("tasks", "--json").stdout) if one["name"] == "needle")
    assert needle["metric"] == "exact match"


def test_validate_knows_the_model_and_says_what_is_no_mistake(kvsieve, config, monkeypatch):
    monkeypatch.setattr(plugins, "problems", lambda: ["plugin 'x' of y 1.0: ImportError: gone"])
    result = kvsieve("validate", config, "--set", "policies.1=dense")
    assert result.exit_code == 0
    assert "note: --set policies.1=dense: policies.1: the same as policies.0; it is" in result.stderr
    assert "not loaded: plugin 'x' of y 1.0: ImportError: gone" in result.stderr
    assert "1 tasks x 1 policies" in result.stdout
    beyond = kvsieve("validate", config, "--set", "tasks.0.needle.context=512")
    assert beyond.exit_code == 2
    assert "context 512 needs at least 513 positions with its answer, and the model has 512" in beyond.stderr


@pytest.mark.parametrize("command", ["validate", "compare"])
def test_what_runs_code_needs_a_flag_on_the_command_line_too(kvsieve, config, command):
    result = kvsieve(command, config, "--set", "trust_remote_code=true")
    assert result.exit_code == 2
    assert "give --trust-remote-code on the command line, too" in result.stderr
    allowed = kvsieve("validate", config, "--set", "trust_remote_code=true", "--trust-remote-code")
    assert allowed.exit_code == 0, allowed.output


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("", "--out is empty"),
        ("mine.yaml", "--out mine.yaml is a file; a run needs a folder"),
        ("x" * 256, "--out has a name of more than 255 bytes"),
    ],
)
def test_a_folder_that_cannot_be_written_is_refused_at_once(kvsieve, config, out, message):
    result = kvsieve("compare", config, "--out", out)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_policy_is_a_name_or_a_spec_and_options_win(kvsieve, model_folder):
    common = ["generate", "--model", model_folder, "--max-new-tokens", "2"]
    spec = kvsieve(*common, "--policy", "sparq: {r: 4, k: 8, local: 2}", "-p", "k=6", "def main(")
    assert spec.exit_code == 0, spec.output
    assert "sparq r=4 k=6 local=2" in spec.stderr


def test_validate(kvsieve, config):
    result = kvsieve("validate", config, "--set", "tasks.0.needle.context=[64, 96]")
    assert result.exit_code == 0
    assert "right. 2 tasks x 2 policies = 4 cells, 8 samples" in result.stdout
    unknown = kvsieve("validate", config, "--set", "model=nobody/nothing")
    assert unknown.exit_code == 0
    assert "no mistake was found. 1 tasks" in unknown.stdout
    assert "not checked: model nobody/nothing: its config.json is not on this machine" in unknown.stderr
    wrong = kvsieve("validate", config, "--set", "tasks.0.needle.context=512", "--set", "polices=1")
    assert "unknown key 'polices'" in wrong.stderr
    assert "context 512 needs at least 513 positions" in wrong.stderr


def test_policies_and_tasks_are_listed_with_origin_parameters_and_paper(kvsieve, monkeypatch):
    monkeypatch.setattr(plugins, "problems", lambda: ["plugin 'x' of y 1.0: ImportError: gone"])
    result = kvsieve("policies")
    assert result.exit_code == 0
    assert f"sparq  (kvsieve {__version__}, arXiv:2312.04985)" in result.stdout
    assert "    group_score: 'softmax' | 'logits' = 'softmax'" in result.stdout
    assert "    inner: Policy\n" in result.stdout
    assert "not loaded: plugin 'x' of y 1.0: ImportError: gone" in result.stderr
    assert "    text: str | None = None" in kvsieve("tasks").stdout


def test_schema_is_json(kvsieve):
    assert "sparq" in json.loads(kvsieve("schema").stdout)["$defs"]["policy"]["anyOf"][1]["properties"]


def test_generate_streams_what_the_model_says(kvsieve, model_folder):
    common = [
        "generate",
        "--model",
        model_folder,
        "--policy",
        "sparq",
        "--compression",
        "1/4",
        "-p",
        "local=2",
    ]
    common += ["--max-new-tokens", "9"]
    greedy = kvsieve(*common, "def main(")
    assert greedy.exit_code == 0, greedy.output
    assert "sparq r=4 " in greedy.stderr
    assert "local=2" in greedy.stderr
    assert "10 + 9 tokens" in greedy.stderr
    assert greedy.stdout == kvsieve(*common, "-", input="def main(").stdout
    drawn = [kvsieve(*common, "--temperature", "1", "--seed", seed, "def main(").stdout for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_generate_refuses_standard_input_that_is_not_utf8(kvsieve, model_folder):
    result = kvsieve("generate", "--model", model_folder, "-", input="café".encode("latin-1"))
    assert result.exit_code == 2
    assert "standard input is not UTF-8 text: byte 3 is 0xe9" in result.stderr


def test_generate_refuses_an_empty_prompt(kvsieve, model_folder):
    result = kvsieve("generate", "--model", model_folder, "")
    assert result.exit_code == 2
    assert "empty" in result.stderr
