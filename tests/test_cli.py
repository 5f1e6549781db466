"""The command line as a user meets it."""

import json
import subprocess
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from kvsieve import plugins
from kvsieve.cli import app
from kvsieve.compare import report, run
from kvsieve.compare.execute import local
from kvsieve.reference_model.tokenizer import byte_tokenizer


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    shape = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "max_position_embeddings": 512,
    }
    LlamaForCausalLM(LlamaConfig(vocab_size=259, num_attention_heads=2, **shape)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


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
        "finally: assert not {'torch', 'transformers', 'numpy', 'pydantic'} & set(sys.modules), sorted(sys.modules)\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stderr
    assert "compare" in found.stdout


def test_compare_prints_the_table_and_where_the_report_is(kvsieve, config, tmp_path, monkeypatch):
    monkeypatch.setattr(
        report, "write_report", lambda folder: folder / "report.html"
    )  # slow, and has its own tests
    result = kvsieve("compare", config)
    assert result.exit_code == 0, result.output
    assert "needle: exact match, higher is better" in result.stdout
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
    assert kvsieve("report", folder).exit_code == 0
    assert (folder / "summary.csv").read_text() == before


def test_without_the_report_extra_the_table_is_still_there(kvsieve, config, monkeypatch):
    def missing(folder):
        raise run.UserError("a report needs altair; pip install 'kvsieve[report]'")

    monkeypatch.setattr(report, "write_report", missing)
    result = kvsieve("compare", config, "--set", "tasks.0.needle.samples=1", "--out", "here")
    assert result.exit_code == 0
    assert "no report: a report needs altair" in result.stdout
    assert "numbers: here/summary.csv" in result.stdout


def test_a_failing_cell_gives_status_1(kvsieve, config, monkeypatch):
    def failing(self, indexes, samples):
        raise RuntimeError("no luck")

    monkeypatch.setattr(local.Measurement, "batch", failing)
    result = kvsieve("compare", config)
    assert result.exit_code == 1
    assert "2 cells failed; results/mine/errors.txt has the tracebacks" in result.stderr


def test_an_interruption_says_how_to_go_on(kvsieve, config, monkeypatch):
    def interrupted(self, indexes, samples):
        raise KeyboardInterrupt

    monkeypatch.setattr(local.Measurement, "batch", interrupted)
    result = kvsieve("compare", config)
    assert result.exit_code == 130
    assert "stopped; what was measured is in results/mine, and the same command continues" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["compare", "nowhere.yaml"], "nowhere.yaml: cannot be read: No such file or directory"),
        (["validate", "wrong.yaml"], "wrong.yaml:1:8: modle: unknown key 'modle'"),
        (["report", "."], "is not the folder of a run"),
        (["generate", "--policy", "sparc", "x"], "unknown policy 'sparc'; did you mean 'sparq'?"),
        (["generate", "--policy", "sparq", "-p", "r=x", "x"], "sparq.r: Input should be a valid integer"),
        (["generate", "--policy", "sparq", "-p", "r", "x"], "-p r: write a parameter as NAME=VALUE"),
        (["generate", "--policy", "sparq", "-p", "r=[1, 2]", "x"], "only one can be run here"),
        (["generate", "--compression", "9", "x"], "above 0 and up to 1, such as 1/8"),
        (["generate", "--model", "./nowhere", "x"], "no such folder"),
    ],
)
def test_a_mistake_is_a_message_and_status_2(kvsieve, tmp_path, arguments, message):
    (tmp_path / "wrong.yaml").write_text("modle: x\n")
    result = kvsieve(*arguments)
    assert result.exit_code == 2
    assert message in result.stderr
    assert "Traceback" not in result.output


def test_validate(kvsieve, config):
    result = kvsieve("validate", config, "--set", "tasks.0.needle.context=[64, 96]")
    assert result.exit_code == 0
    assert "right. 2 tasks x 2 policies = 4 cells, 8 samples" in result.stdout


def test_policies_and_tasks_are_listed_with_origin_parameters_and_paper(kvsieve, monkeypatch):
    monkeypatch.setattr(plugins, "problems", lambda: ["plugin 'x' of y 1.0: ImportError: gone"])
    result = kvsieve("policies")
    assert result.exit_code == 0
    assert "sparq  (kvsieve 0.1.0, arXiv:2312.04985)" in result.stdout
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


def test_generate_refuses_an_empty_prompt(kvsieve, model_folder):
    result = kvsieve("generate", "--model", model_folder, "")
    assert result.exit_code == 2
    assert "empty" in result.stderr
