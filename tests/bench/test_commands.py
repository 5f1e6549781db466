"""The two commands, from the command line to the files."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig
from typer.testing import CliRunner

from kvsieve import ops, plugins
from kvsieve.bench import attention_speed, decode_speed, memory, plot, record, terminal
from kvsieve.bench.layer_step import ROOM
from kvsieve.cli import app
from kvsieve.compare import environment
from kvsieve.entries import COMPRESSION, budgets
from kvsieve.hf import placement

ATTENTION = [
    "bench",
    "attention",
    "--heads",
    "4x2x16",
    "--context",
    "64,128",
    "--seconds",
    "0",
    "--threads",
    "1",
]
DECODE = [
    "bench",
    "decode",
    "--shape",
    "tiny",
    "--layers",
    "1",
    "--context",
    "64",
    "--seconds",
    "0",
    "--steps",
    "1",
]
POLICIES = [
    "--policy",
    "sparq: {r: 4, k: 8, local: 2}",
    "--policy",
    "h2o: {compression: 1/8}",
    "--layout",
    "double",
]


def run(arguments, out):
    result = CliRunner().invoke(app, [*arguments, "--out", str(out)])
    assert result.exit_code == 0, result.output
    (path,) = out.glob("*.json")
    return json.loads(path.read_text()), result.output, path


def test_numbers_go_where_they_are_said_to_go(tmp_path, monkeypatch):
    """Into a folder of their own: nobody has asked for `benchmarks/results`."""
    monkeypatch.chdir(tmp_path)
    short = [*DECODE, "--policy", "dense", "--layout", "single", "--no-plot"]
    result = CliRunner().invoke(app, short)
    assert result.exit_code == 0, result.output
    (path,) = (tmp_path / "kvsieve-bench").glob("decode-*.json")
    assert f"numbers will be in kvsieve-bench/{path.name}" in result.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["kvsieve-bench"]


@pytest.fixture(scope="module")
def attention_run(tmp_path_factory):
    return run([*ATTENTION, *POLICIES, "--policy", "dense"], tmp_path_factory.mktemp("attention"))


@pytest.fixture(scope="module")
def decode_run(tmp_path_factory):
    return run([*DECODE, *POLICIES, "--no-plot"], tmp_path_factory.mktemp("decode"))


def test_attention_measures_every_cell(attention_run):
    record, output, _ = attention_run
    assert [(cell["batch"], cell["context"]) for cell in record["cells"]] == [(1, 64), (1, 128)]
    for cell in record["cells"]:
        assert [row["policy"] for row in cell["rows"]] == [
            "sparq r=4 k=8 local=2",
            "h2o compression=1/8",
            "dense",
        ]
        assert cell["best_dense"]["name"] in output
        assert cell["bandwidth"].keys() == {"copy", "read"}
        best = cell["best_dense"]["name"]
        timed = {name: found["median"] for name, found in cell["dense"].items() if "median" in found}
        assert timed[best] == min(timed.values())
        assert all("median" in found or "not_run" in found for found in cell["dense"].values())


def test_attention_numbers_hang_together(attention_run):
    record, _, _ = attention_run
    for cell in record["cells"]:
        sparq, h2o, dense = cell["rows"]
        assert dense["limit"] == 1
        assert 1 < sparq["limit"] < h2o["limit"] <= 8
        for row in cell["rows"]:
            moved = row["bytes"]["read"] + row["bytes"]["written"]
            assert row["bytes_per_second"] == pytest.approx(moved / row["seconds"]["median"])
            assert row["share_of_limit"] == pytest.approx(row["speedup"] / row["limit"])
            assert row["best_dense"] == cell["best_dense"]["name"]
            assert row["graph"] == "no GPU"
        plain = 2 * 2 * (cell["context"] + ROOM) * 16 * 4
        assert dense["bytes_held"] == plain
        pieces = -(-(cell["context"] + ROOM) // 128)  # channels are stored in whole pieces of 128 slots
        by_channel = 2 * 128 * pieces * 16 * 4
        assert sparq["bytes_held"] == plain + by_channel + 2 * 16 * 4  # keys twice, and the mean value


def test_the_record_names_machine_and_command(attention_run):
    record, _, path = attention_run
    assert path.name.startswith("attention-cpu-")
    machine = record["machine"]
    assert machine["threads"] == 1
    assert {"cpu", "cores", "git_commit", "load_average", "kvsieve"} <= machine.keys()
    assert {"torch", "transformers"} <= machine["versions"].keys()
    assert record["settings"]["cells"] == ["B=1 T=64 heads 4x2x16", "B=1 T=128 heads 4x2x16"]
    assert record["settings"]["dtype"] == "float32"


def test_the_command_of_a_record_names_no_folder_of_this_machine(tmp_path):
    given = ["bench", "decode", "--out", "a/folder/of/mine", "--policy", "sparq: {r: 4}", "--out=x"]
    assert record.command(given) == "kvsieve bench decode --policy 'sparq: {r: 4}'"
    (tmp_path / "mine").mkdir()
    for own in (["--model", str(tmp_path / "mine")], [f"--model={tmp_path}/mine"]):
        assert str(tmp_path) not in record.command(own)
        assert record.command(own).endswith("mine")
    assert record.command(["--model", "a/b"]) == "kvsieve --model a/b"
    before = record.name_of_model(str(tmp_path / "mine"))
    (tmp_path / "mine" / "model.safetensors").write_text("other weights")
    assert record.name_of_model(str(tmp_path / "mine")) != before


def test_the_plot_shows_measured_and_theoretical(attention_run):
    _, output, path = attention_run
    picture = path.with_suffix(".svg")
    assert f"plot: {picture}" in output.replace("\n", "")
    drawn = picture.read_text()
    assert drawn.startswith("<svg")
    assert "sparq r=4 k=8 local=2" in drawn
    assert "stroke-dasharray" in drawn


def test_growth_measures_both_directions_and_draws_times_beside_what_bytes_take(tmp_path):
    sizes = ["--heads", "4x2x16", "--context", "64,128", "--batch", "1,2", "--at", "128", "--seconds", "0"]
    record, _, path = run(["bench", "growth", *sizes, "--layout", "double,single"], tmp_path)
    cells = record["cells"]
    assert [(cell["batch"], cell["context"]) for cell in cells] == [(1, 64), (1, 128), (2, 128)]
    for cell in cells:
        rows = [(row["policy"].split()[0], row["layout"]) for row in cell["rows"]]
        assert rows == [
            ("sparq", "double"),
            ("sparq", "single"),
            ("h2o", "single"),
            ("local_window", "single"),
        ]
        numbers = 2 * cell["batch"] * 2 * (cell["context"] + 1) * 16  # all keys and values read, one written
        assert cell["best_dense"]["bytes"] == numbers * 4
    by_context, by_batch = plot.growth(cells)
    bandwidth = max(speed for cell in cells for speed in cell["bandwidth"].values())
    (_, short, _), (_, long, limit) = by_context.lines["best dense", "single"]
    assert [short, long] == [1e3 * cell["best_dense"]["seconds"]["median"] for cell in cells[:2]]
    assert limit == pytest.approx(1e3 * cells[1]["best_dense"]["bytes"] / bandwidth)
    assert [rows for rows, _, _ in by_batch.lines["h2o compression=1/8", "single"]] == [1, 2]
    drawn = path.with_suffix(".svg").read_text()
    assert "milliseconds a step" in drawn
    assert "batch, rows" in drawn
    assert "best dense" in drawn


def test_decode_compares_with_dense_and_with_transformers(decode_run):
    record, _, _ = decode_run
    (cell,) = record["cells"]
    dense, sparq, h2o = cell["rows"]
    assert (dense["policy"], dense["speedup"], dense["limit"]) == ("dense", 1, 1)
    assert cell["transformers"]["median"] > 0
    assert cell["interleaved"]
    for row in cell["rows"]:
        step = row["seconds"]["median"]
        assert row["tokens_per_second"] == pytest.approx(1 / step)
        assert row["attention_seconds"] + row["rest_seconds"] == pytest.approx(step)
        assert row["speedup_over_transformers"] > 0
    # One layer of `tiny`: two KV heads of 64 channels.
    assert dense["bytes_moved"] == 4 * 2 * 2 * 64 * (64 + 1)
    expected = (cell["weight_bytes"] + dense["bytes_moved"]) / (cell["weight_bytes"] + h2o["bytes_moved"])
    assert h2o["limit"] == pytest.approx(expected)
    assert sparq["limit"] > 1


def test_decode_counts_the_weights_that_a_step_reads(decode_run):
    hidden, inner, heads, kv_heads, vocabulary = 512, 1536, 8 * 64, 2 * 64, 1024
    layer = hidden * (2 * heads + 2 * kv_heads + 3 * inner + 2)
    assert decode_run[0]["cells"][0]["weight_bytes"] == 4 * (layer + hidden + hidden * vocabulary)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bench", "attention", "--policy", "sparc"], "did you mean 'sparq'"),
        (["bench", "attention", "--layout", "tripple"], "unknown layout 'tripple'"),
        (["bench", "attention", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["bench", "attention", "--device", "gpu"], "--device"),
        (["bench", "attention", "--dense", "fast"], "unknown dense attention 'fast'"),
        (["bench", "attention", "--dense", "flashinfer"], "the package flashinfer is not installed"),
        (["bench", "attention", "--ops", "cuda"], "unknown implementation of the ops 'cuda'"),
        (["bench", "attention", "--context", "1"], "--context must be at least 2 tokens"),
        (["bench", "attention", "--batch", "4096", "--context", "1024k"], "GB of memory"),
        (["bench", "growth", "--context", "2k,16384k", "--batch", "1"], "T=16777216 heads 32x8x128 needs"),
        (["bench", "growth", "--at", "8m"], "--at is one or more numbers"),
        (["bench", "decode", "--shape", "llama-3"], "did you mean 'llama-3-8b'"),
        (
            ["bench", "decode", "--shape", "llama-3-8b", "--batch", "1000", "--context", "128k"],
            "GB of memory",
        ),
    ],
)
def test_mistakes_are_answered_before_anything_is_measured(arguments, message, tmp_path):
    result = CliRunner().invoke(app, [*arguments, "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert message in result.output
    assert "Traceback" not in result.output
    assert not list(tmp_path.glob("*.json"))


def test_what_does_not_fit_is_left_out_of_the_default_sizes(monkeypatch, tmp_path):
    monkeypatch.setattr(placement, "free_memory", lambda device: 0)
    result = CliRunner().invoke(app, ["bench", "attention", "--out", str(tmp_path)])
    assert result.exit_code == 2
    assert result.output.count("left out: the cell B=1") == 4
    assert "no cell fits in memory" in result.output


@pytest.fixture(scope="module")
def own_model(tmp_path_factory):
    """A folder with a model of the user's: 2 layers, 128 positions, no tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "my-model"
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128,
    )  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


OWN = ["bench", "decode", "--seconds", "0", "--steps", "1", "--no-plot", "--context", "64", "--model"]


def test_decode_measures_the_users_own_model_and_every_method(monkeypatch, own_model, tmp_path):
    def every(head_size, calibration, layers):
        loki = f"loki: {{calibration: '{calibration}', compression: 1/2}}"
        return [
            "dense",
            loki,
            "quest: {compression: 1/64}",
            "kvzip: {compression: 1/2}",
            "citrus",
            "sparq: {r: 4, k: 8, local: 2}",
        ]

    build = decode_speed.OurSteps

    def steps(model, policy, *given, **how):
        if policy.name == "sparq":
            raise torch.OutOfMemoryError("no room\nfor it")
        return build(model, policy, *given, **how)

    monkeypatch.setattr(decode_speed, "every_policy", every)
    monkeypatch.setattr(decode_speed, "OurSteps", steps)
    record, output, path = run([*OWN, str(own_model), "--policy", "all", "--layout", "double"], tmp_path)
    (cell,) = record["cells"]
    assert {row["policy"].split()[0] for row in cell["rows"]} == {"dense", "loki", "citrus"}
    for row in cell["rows"]:
        assert row["prefill_seconds"] > 0
        assert row["bytes_peak"] is None or row["bytes_peak"] >= 0
    assert cell["transformers"]["median"] > 0
    assert cell["not_run"].keys() == {"sparq r=4 k=8 local=2 [double]", "kvzip compression=1/2 [single]"}
    assert "sparq r=4 k=8 local=2 [double] was not measured: OutOfMemoryError: no room" in output
    assert "left out at T=64: compression 1/64 at context 64: quest reads" in output
    assert record["settings"]["model"].startswith("my-model ")
    assert str(own_model.parent) not in path.read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--context", "128"], "--context with its steps needs 133 positions, and"),
        (["--shape", "tiny"], "leave out --shape and --layers"),
        (["--policy", "sparq: {r: 9}"], "only 8 channels"),
    ],
)
def test_what_the_users_own_model_cannot_do_is_refused_before_it_is_loaded(
    monkeypatch, own_model, tmp_path, arguments, message
):
    monkeypatch.setattr(decode_speed.Models, "loaded", None)
    command = [*OWN[:-3], "--model", str(own_model), *arguments, "--out", str(tmp_path)]
    command += [] if "--context" in arguments else ["--context", "64"]
    result = CliRunner().invoke(app, command)
    assert (result.exit_code, list(tmp_path.glob("*.json"))) == (2, [])
    assert message in " ".join(result.output.split())


def test_a_cache_that_only_a_prompt_fills_is_refused_without_one(own_model, tmp_path):
    config = json.loads((own_model / "config.json").read_text())
    linear = {"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(config | linear))
    (tmp_path / "model.safetensors").write_bytes((own_model / "model.safetensors").read_bytes())
    result = CliRunner().invoke(app, [*OWN, str(tmp_path), "--no-prefill", "--out", str(tmp_path / "out")])
    assert result.exit_code == 2
    assert "layers with a cache of their own, which only --prefill fills" in " ".join(result.output.split())


def test_layers_with_a_window_are_filled_with_random_tokens_too(own_model, tmp_path):
    config = json.loads((own_model / "config.json").read_text())
    windows = {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 8}
    (tmp_path / "config.json").write_text(json.dumps(config | windows))
    (tmp_path / "model.safetensors").write_bytes((own_model / "model.safetensors").read_bytes())
    policies = ["--policy", "dense", "--policy", "inside_windows: {inner: {sparq: {r: 2, k: 4, local: 2}}}"]
    record, _, _ = run([*OWN, str(tmp_path), "--no-prefill", *policies], tmp_path / "out")
    (cell,) = record["cells"]
    dense, sparse = cell["rows"][:2]
    assert 0 < sparse["bytes_moved"] < dense["bytes_moved"]


def test_caches_that_do_not_fit_together_are_timed_apart(monkeypatch, tmp_path):
    monkeypatch.setattr(decode_speed, "_weights", lambda config: 0)
    monkeypatch.setattr(memory, "check", lambda need, device, what: None)
    monkeypatch.setattr(placement, "free_memory", lambda device: 0)
    record, _, _ = run([*DECODE, *POLICIES, "--no-plot"], tmp_path)
    (cell,) = record["cells"]
    assert not cell["interleaved"]
    assert len(cell["rows"]) == 3


def test_a_dense_attention_that_fails_is_noted_not_fatal(monkeypatch, tmp_path):
    def broken(names, tokens, fits):
        def build(tokens):
            raise RuntimeError("no kernel for this\nand a long story")

        yield "sdpa broken", build

    monkeypatch.setattr(attention_speed.baselines, "builders", broken)
    record, _, _ = run(
        [*ATTENTION[:4], "--context", "64", "--seconds", "0", "--policy", "dense", "--no-plot"], tmp_path
    )
    (cell,) = record["cells"]
    assert cell["dense"]["sdpa broken"] == {"not_run": "RuntimeError: no kernel for this"}
    assert cell["best_dense"]["name"] == "kvsieve"


def test_by_default_every_policy_that_fits_is_measured(tmp_path):
    sizes = ["--context", "256", "--layout", "double", "--no-plot", "--seconds", "0"]
    record, output, path = run([*ATTENTION[:4], *sizes], tmp_path)
    (cell,) = record["cells"]
    names = {row["policy"].split()[0] for row in cell["rows"]}
    assert {"dense", "sparq", "quest", "double_sparsity", "loki", "refresh", "h2o", "streaming_llm"} <= names
    for name, entry in plugins.policies().items():
        told = any(name in line for line in output.splitlines() if "left out at T=256:" in line)
        told |= any(other.startswith(name) for other in cell["not_run"])
        apart = name == "dense_layers" or COMPRESSION not in budgets(entry.cls)
        told |= any(name in line for line in output.splitlines() if "parameters of their own" in line)
        assert name in names or told
        assert not (apart and name in names)
    assert "policy kvzip reads prompts by a plan" in output
    assert "twilight.inner, at" in output  # Quest's bounds and 4-bit keys are more than an eighth of 256
    assert str(tmp_path) not in path.read_text()
    assert "random calibration" in path.read_text()


def test_a_policy_that_fails_costs_no_other_and_rows_are_written_as_they_come(monkeypatch, tmp_path):
    measure = attention_speed._row

    def exhausted(plan, contender, *others):
        held = json.loads(next(tmp_path.glob("*.json")).read_text())["cells"][0]["rows"]
        rows.append(len(held))
        if contender.policy.name == "sparq":
            raise torch.OutOfMemoryError("no room\nfor it")
        return measure(plan, contender, *others)

    rows = []
    monkeypatch.setattr(attention_speed, "_row", exhausted)
    given = [*ATTENTION[:4], "--context", "64", "--seconds", "0", *POLICIES, "--policy", "dense", "--no-plot"]
    record, output, _ = run(given, tmp_path)
    assert rows == [0, 0, 1]
    assert "was not measured: OutOfMemoryError: no room" in output
    assert [row["policy"].split()[0] for row in record["cells"][0]["rows"]] == ["h2o", "dense"]


def test_a_compiler_that_is_missing_is_said_once(monkeypatch, tmp_path):
    monkeypatch.setattr(ops, "_FASTEST_ON_CPU", "cpu")
    monkeypatch.setattr(record, "_PACKAGES", ("torch",))
    given = [*ATTENTION[:4], "--context", "16,32", "--seconds", "0", "--policy", "dense", "--no-plot"]
    found, output, _ = run(given, tmp_path)
    assert output.count("without numba torch's ops are measured; pip install 'kvsieve[cpu]'") == 1
    assert found["machine"]["ops"] == "cpu"
    on_gpu = {"ops": "triton", "versions": {}}
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/clang" if name == "clang" else None)
    assert record.missing_compiler(on_gpu) is None
    monkeypatch.setattr(shutil, "which", lambda name: None)
    assert "there is no C compiler" in record.missing_compiler(on_gpu)
    monkeypatch.setenv("CC", "tcc")
    assert record.missing_compiler(on_gpu) is None


def test_what_others_took_of_the_machine_is_marked_beside_the_numbers(monkeypatch, tmp_path):
    why = "other processes had 2% of the cores' time, other guests of the host 31%"
    times = iter([(0.0, 0.0), (0.0, 0.31)])  # of the dense attentions, then of the row

    def since(self):
        other, stolen = next(times)
        return {"other_processes": other, "stolen": stolen, "not_to_be_quoted": why if stolen else None}

    monkeypatch.setattr(environment.Load, "since", since)
    given = [*ATTENTION[:4], "--context", "64", "--seconds", "0", "--policy", "dense", "--no-plot"]
    record, output, _ = run(given, tmp_path)
    assert record["not_to_be_quoted"] == record["cells"][0]["rows"][0]["load"]["not_to_be_quoted"] == why
    assert record["cells"][0]["load"]["not_to_be_quoted"] is None
    assert "dense *" in output
    assert f"* not to be quoted: {why}" in " ".join(output.split())


def test_a_legend_under_the_table_says_what_the_columns_are(attention_run, decode_run):
    for benchmark, (_, output, _) in (("attention", attention_run), ("decode", decode_run)):
        said = " ".join(output.split())
        for heading, column in terminal._COLUMNS[benchmark].items():
            assert f"{heading}: {column.meaning}" in said


def test_a_killed_run_goes_on_in_its_file_and_measures_nothing_twice(monkeypatch, tmp_path):
    measured, rows = [], attention_speed._row

    def row(plan, contender, *others):
        if len(measured) == 3:
            measured.append("killed")
            raise KeyboardInterrupt
        measured.append((others[0].keys.shape[2], contender.policy.name))
        return rows(plan, contender, *others)

    monkeypatch.setattr(attention_speed, "_row", row)
    command = [*ATTENTION, *POLICIES, "--no-plot"]
    killed = CliRunner().invoke(app, [*command, "--out", str(tmp_path)])
    assert killed.exit_code != 0
    (path,) = tmp_path.glob("*.json")
    before = json.loads(path.read_text())
    assert not before["complete"]
    path.with_name("attention-cpu-0.json").write_text("[not a record")
    path.with_name("attention-cpu-1.json").write_text(json.dumps(before | {"settings": {}}))
    other = before | {"machine": before["machine"] | {"git_commit": "another"}}
    path.with_name("attention-cpu-2.json").write_text(json.dumps(other))
    again = CliRunner().invoke(app, [*command, "--out", str(tmp_path)])
    assert f"continuing {path}, which holds 2 cells" in again.output
    assert measured == [(64, "sparq"), (64, "h2o"), (128, "sparq"), "killed", (128, "h2o")]
    after = json.loads(path.read_text())
    assert after["complete"]
    assert after["cells"][0] == before["cells"][0]
    assert after["cells"][1]["rows"][0] == before["cells"][1]["rows"][0]
    assert [row["policy"] for row in after["cells"][1]["rows"]] == [
        "sparq r=4 k=8 local=2",
        "h2o compression=1/8",
    ]
    assert len(list(tmp_path.glob("*.json"))) == 4


def test_a_killed_decode_keeps_its_complete_cells(monkeypatch, tmp_path):
    measured, measure = [], decode_speed._measure

    def cell(plan, sizes, models, say):
        measured.append(sizes.context)
        if len(measured) == 2:
            raise KeyboardInterrupt
        return measure(plan, sizes, models, say)

    monkeypatch.setattr(decode_speed, "_measure", cell)
    command = [*DECODE[:6], "--context", "16,32", *DECODE[8:], "--policy", "dense", "--no-plot"]
    assert CliRunner().invoke(app, [*command, "--out", str(tmp_path)]).exit_code != 0
    record, _, _ = run(command, tmp_path)
    assert measured == [16, 32, 32]
    assert [found["context"] for found in record["cells"]] == [16, 32]
    assert record["complete"]


def test_a_cell_that_fails_costs_no_other(monkeypatch, tmp_path):
    measure = attention_speed._measure

    def exhausted(plan, cell, *others):
        if cell.context == 64:
            raise torch.OutOfMemoryError("no room\nfor it")
        assert len(list(tmp_path.glob("*.json"))) == 1  # the first cell is on the disk already
        return measure(plan, cell, *others)

    monkeypatch.setattr(attention_speed, "_measure", exhausted)
    result = CliRunner().invoke(app, [*ATTENTION, *POLICIES, "--no-plot", "--out", str(tmp_path)])
    assert result.exit_code == 1
    assert "B=1 T=64 failed: OutOfMemoryError: no room" in result.stderr
    (path,) = tmp_path.glob("*.json")
    failed, measured = json.loads(path.read_text())["cells"]
    assert (failed["context"], failed["rows"]) == (64, [])
    assert [row["policy"].split()[0] for row in measured["rows"]] == ["sparq", "h2o"]


def test_a_policy_whose_steps_are_not_alike_is_not_captured():
    plan = SimpleNamespace(device=torch.device("cuda"), graphs=True)
    capture = attention_speed._Capture(plan, run := object(), prepare=None, capturable=False)
    assert capture.run is run
    assert capture.note == "the policy declares that it cannot be captured"
