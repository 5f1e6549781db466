"""A comparison is checked against a model's config.json before a weight is read."""

import json

import pytest
import torch
from safetensors.torch import save

from kvsieve import UserError
from kvsieve.compare import config, fit


def test_a_context_and_a_policy_that_the_model_cannot_have_are_found_without_it(load):
    found = load("""\
        tasks:
          - needle: {context: [500, 512]}
          - perplexity: {context: 400, tokens: 128}
          - lm_eval: {task: x, context: 9999}
        policies:
          - sparq: {r: 17}
          - sparq: {compression: 1/8, local: 60}
          - dense_layers: {layers: [0], inner: {sparq: {r: 32}}}
        """)
    with pytest.raises(UserError) as caught:
        fit.check(found)
    lines = [line.partition("test.yaml:")[2] for line in str(caught.value).splitlines()]
    assert [line for line in lines if "tasks" in line] == [
        "3:5: tasks.0.needle: context 512 needs at least 513 positions with its answer, "
        "and the model has 512: "
        "the longest context here is at most 511",
        "4:5: tasks.1.perplexity: context 400 needs at least 528 positions with its answer, "
        "and the model has 512: "
        "the longest context here is at most 384",
    ]
    assert "7:5: policies.0.sparq: sparq.r is 17, but this model's heads have only 16 channels" in lines
    assert any(
        "policies.1.sparq: compression 1/8 at context 400: sparq.local must be from 0 to k" in line
        for line in lines
    )
    assert any(line.startswith("9:5: policies.2.dense_layers: sparq.r is 32") for line in lines)


def test_mistakes_in_the_file_hide_none_that_the_model_shows(write, tmp_path):
    (tmp_path / "loki.safetensors").write_bytes(save({"layers.0.channels": torch.zeros(2, 16).short()}))
    path = write(f"""\
        modle: reference
        tasks:
          - needle: {{context: 512}}
          - nedle
        policies:
          - sparq: {{compression: 1/1000}}
          - sparq: {{K: 8}}
          - loki: {{r: 8}}
          - loki: {{r: 8, calibration: {tmp_path}/loki.safetensors}}
          - double_sparsity: {{r: 8, calibration: {tmp_path}/none}}
          - duo_attention: {{full_heads: {tmp_path}/loki.safetensors}}
        """)
    with pytest.raises(UserError) as caught:
        config.load(path, also=fit.mistakes)
    lines = [line.partition("test.yaml:")[2] for line in str(caught.value).splitlines()]
    for expected in (
        "2:8: modle: unknown key 'modle'; did you mean 'model'?",
        "4:5: tasks.0.needle: context 512 needs at least 513 positions",
        "5:5: tasks.1: unknown task 'nedle'",
        "7:5: policies.0.sparq: compression 1/1000 at context 512: sparq reads",
        "8:16: policies.1.sparq.K: unknown parameter of sparq 'K'; did you mean 'k'?",
        "9:5: policies.2.loki: loki.calibration is needed: the path of a file that kvsieve calibrate loki",
        "10:5: policies.3.loki: calibration ",
        "11:5: policies.4.double_sparsity: there is no calibration file ",
        "12:5: policies.5.duo_attention: calibration ",
    ):
        assert any(line.startswith(expected) for line in lines), (expected, lines)
    assert "loki.safetensors holds channels, and not basis: it is for another method" in str(caught.value)
    assert len(lines) == 9


def test_a_model_that_cannot_be_is_a_mistake(write, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn/config.json").write_text("{")
    text = "tasks: [needle]\npolicies: [dense]\n"
    for model, why in (
        (tmp_path / "empty", "the folder has no config.json"),
        (tmp_path / "torn", "its config.json is not JSON"),
        ("a/b/c", "no such folder"),
        ("not a name!", "no such folder, and no name for the hub"),
    ):
        with pytest.raises(UserError, match=rf"model: {why}"):
            fit.check(config.load(write(text), [f"model={model}"]))


def test_what_only_the_loaded_model_shows_is_said(write, model_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    path = tmp_path / "loki.safetensors"
    path.write_bytes(save({"layers.0.basis": torch.eye(16).expand(2, 16, 16).contiguous()}))
    text = f"tasks: [needle]\npolicies: [dense, loki: {{calibration: {path}}}]\n"
    assert fit.unchecked(config.load(write(text))) == [
        f"loki.calibration: that {path} was made for {model_folder}, by its weights"
    ]
    (line,) = fit.unchecked(config.load(write(text), ["model=nobody/nothing"]))
    assert line.startswith("model nobody/nothing: its config.json is not on this machine, so neither that")
    gone = config.load(write(text.replace("loki.s", "gone.s")), ["model=nobody/nothing"])
    with pytest.raises(UserError, match=r"policies.1.loki.calibration: .*gone.safetensors: cannot be read"):
        fit.check(gone)
    shipped = "tasks: [needle]\npolicies: [loki: {calibration: reference}]\n"
    assert fit.unchecked(config.load(write(shipped), ["model=reference"])) == []


@pytest.mark.parametrize(
    ("written", "facts"),
    [
        ({"max_position_embeddings": 64, "hidden_size": 32, "num_attention_heads": 4}, (64, 8)),
        ({"n_positions": 64, "n_embd": 32, "n_head": 4}, (64, 8)),
        ({"text_config": {"max_position_embeddings": 64, "head_dim": 16}, "hidden_size": 7}, (64, 16)),
        ({"max_position_embeddings": "many", "head_dim": -1}, (None, None)),
        ([], None),
    ],
)
def test_facts_about_a_model_come_from_its_config(tmp_path, written, facts):
    (tmp_path / "config.json").write_text(json.dumps(written))
    assert fit.read_facts(str(tmp_path)) == facts


def test_facts_that_are_not_at_hand_are_none(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "config.json").write_text("[" * 100_000)
    for model in (str(tmp_path), str(tmp_path / "empty"), "nobody/nothing", "~nobody-here/x", "not a name!"):
        assert fit.read_facts(model) is None


def test_the_reference_model_is_at_hand():
    assert fit.read_facts("reference") == (4096, 64)
