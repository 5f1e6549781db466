"""Tensor parallel: two processes on the CPU decode what one does, each with half of the heads."""

import csv
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

import kvsieve
from kvsieve import UserError, calibration
from kvsieve.compare import config, run, samples
from kvsieve.hf import parallel
from tests.models import save_byte_llama
from tests.policies import TWO_LAYERS

from ..families.zoo import FAMILIES
from . import matrix

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
COMPARISON = """\
model: {model}
tensor_parallel: {split}
batch_size: 2
tasks: [needle: {{context: 120, samples: 3}}]
policies: [dense, sparq: {{compression: 1/4}}, h2o: {{compression: 1/4}}]
"""


each_cell = pytest.mark.parametrize(
    ("family", "policy"),
    [*matrix.ALWAYS, *(pytest.param(*cell, marks=pytest.mark.slow) for cell in matrix.REST)],
)


def torchrun(*command, **options):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [*TORCHRUN, *map(str, command)],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def save(family, folder):
    next(one for one in FAMILIES if one.name == family).build().save_pretrained(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for family in matrix.FAMILIES:
        save(family, folder / family)
    save("gemma", folder / "one KV head")
    # Processes know the model by its weights.
    made_for = kvsieve.load(str(folder / "llama (GQA)"), device="cpu")
    calibration.write(folder / matrix.CALIBRATION, load_file(TWO_LAYERS), made_for, "random")
    save_byte_llama(folder / "bytes", kv_heads=2)
    (folder / "comparison.yaml").write_text(COMPARISON.format(model=folder / "bytes", split="true"))
    return folder


@pytest.fixture(scope="module")
def split(folder, request):
    """Results of each of two processes: one start for the whole matrix."""
    pytest.importorskip("accelerate", reason="accelerate is not installed: pip install 'kvsieve[parallel]'")
    mine = (item for item in request.session.items if item.path == request.path)
    slowly = any(item.get_closest_marker("slow") for item in mine)
    which = ["all"] if slowly else []
    done = torchrun("-m", matrix.__name__, folder, *which, timeout=300, cwd=Path(__file__).parents[2])
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.fixture(scope="module")
def whole(folder):
    models = {family: kvsieve.load(str(folder / family), device="cpu") for family in matrix.FAMILIES}
    return functools.cache(
        lambda family, policy: matrix.measured(models[family], policy, folder / matrix.CALIBRATION)
    )


@each_cell
def test_two_processes_decode_what_one_does(split, whole, family, policy):
    alone = whole(family, policy)
    for rank in split:
        found = rank[family][policy]
        assert found["tokens"] == alone["tokens"]
        assert found["second turn"] == alone["second turn"]
        for row, expected in zip(found["scores"], alone["scores"], strict=True):
            assert row == pytest.approx(expected, abs=1e-4)
        assert found["kv_heads"] * 2 == alone["kv_heads"]
    first, second = (rank[family][policy] for rank in split)
    # Where heads keep different numbers, room to grow into goes by the longest head of the process.
    grows = 0.03 * alone["packed"] * alone["memory"]
    assert first["memory"] + second["memory"] == pytest.approx(alone["memory"], rel=0, abs=grows)
    for own, others, all_heads in zip(first["held"], second["held"], alone["held"], strict=True):
        assert [a + b for a, b in zip(own, others, strict=True)] == all_heads


@each_cell
def test_each_meter_counts_its_own_heads_and_their_sum_is_the_whole(split, whole, family, policy):
    alone = whole(family, policy)
    assert alone["here"] == alone["everywhere"]
    first, second = (rank[family][policy] for rank in split)
    assert first["everywhere"] == second["everywhere"] == alone["here"]
    for name in range(3):  # bytes; steps are common
        assert first["here"][name] + second["here"][name] == alone["here"][name]
        assert first["here"][name] > 0
    assert first["here"][3] == second["here"][3] == alone["here"][3]


def test_a_comparison_is_that_of_one_process(split, folder):
    again = folder / "alone.yaml"
    again.write_text(COMPARISON.format(model=folder / "bytes", split="false"))
    alone = run.compare(config.load(again), folder / "alone", Console(quiet=True))
    assert not alone.failures
    named = [
        "task",
        "policy",
        "score",
        "samples",
        "bytes_per_step",
        "bytes_ratio",
        "bytes_written_per_step",
        "kv_bytes",
    ]

    def table(name):
        with (folder / name / "summary.csv").open() as file:
            return [[row[column] for column in named] for row in csv.DictReader(file)]

    assert len(table("alone")) == 3
    assert table("split") == table("alone")
    assert len(samples.read(folder / "split" / "samples.jsonl")) == 9  # one of the two writes


def test_heads_that_cannot_be_shared_are_refused(split):
    assert "1 KV heads, which 2 processes cannot share evenly" in split[0]["refused"]


@pytest.mark.parametrize("release", ["5.17.0", "5.23.0"])
def test_a_vocabulary_that_cannot_be_shared_is_left_out_of_an_older_transformers_plan(monkeypatch, release):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("transformers.__version__", release)
    shape = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
    odd, even = (LlamaConfig(vocab_size=size, tie_word_embeddings=True, **shape) for size in (101, 102))
    plan = parallel.split_arguments(odd)["distributed_config"].tp_plan
    if release == "5.23.0":
        assert plan == "auto"
    else:
        layers = {re.sub(r"\.\d+\.", ".*.", name) for name, _ in LlamaForCausalLM(odd).named_modules()}
        assert plan["model.layers.*.self_attn.k_proj"] == "colwise"
        assert plan.keys() <= layers - {"lm_head", "model.embed_tokens"}
    assert parallel.split_arguments(even)["distributed_config"].tp_plan == "auto"


def test_not_under_torchrun(folder, monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="RANK, LOCAL_RANK, WORLD_SIZE is not set: start them with torchrun"):
        kvsieve.load(str(folder / "mistral"), tensor_parallel=True)
    with pytest.raises(UserError, match="leave out device and device_map"):
        kvsieve.load(str(folder / "mistral"), tensor_parallel=True, device="cpu")


def test_under_torchrun_without_tensor_parallel(folder, tmp_path, monkeypatch):
    for name, value in (("TORCHELASTIC_RUN_ID", "none"), ("RANK", "1"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    alone = tmp_path / "alone.yaml"
    alone.write_text(COMPARISON.format(model=folder / "bytes", split="false"))
    with pytest.raises(UserError, match="torchrun started 2 .*: put tensor_parallel: true into it"):
        run.compare(config.load(alone), tmp_path / "out", Console(quiet=True))
    assert not (tmp_path / "out").exists()


def test_accelerate_is_missing(folder, monkeypatch):
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "2")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *more: None)
    with pytest.raises(UserError, match=r"accelerate: pip install 'kvsieve\[parallel\]'"):
        kvsieve.load(str(folder / "mistral"), tensor_parallel=True)
