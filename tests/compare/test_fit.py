"""A comparison is checked against a model's config.json before a weight is read."""

import json

import pytest

from kvsieve import UserError
from kvsieve.compare import fit


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
