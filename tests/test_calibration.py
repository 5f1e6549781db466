"""Calibrations: measured on a model's own keys, bound per layer and head, refused for another model."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import kvsieve
from kvsieve import KVCache, Policy, UserError, Wrapper, calibration, make_policy, transfer
from kvsieve.cli import app
from kvsieve.fingerprint import fingerprint, same
from kvsieve.testing import Inputs, LayerCache, rollout
from tests.models import random_prompts, tiny_llama

TEXTS = random_prompts(40, 40, 40, seed=5)


def keys_of(model):
    """By layer, the keys [K, tokens, D] of TEXTS, and the queries' absolute mean over groups."""
    keys = []
    for text in TEXTS:
        cache = KVCache(model)
        model(input_ids=torch.tensor([text]), past_key_values=cache)
        keys.append([layer.kv.keys[0] for layer in cache.policy_layers])
    return [torch.cat(layer, 1) for layer in zip(*keys, strict=True)]


def measured(method, **given):
    model = tiny_llama()
    if method == "loki":
        return calibration.measure_basis(model, TEXTS, **given)
    return calibration.measure_channels(model, TEXTS, "k", **given)


def test_channels_are_ranked_by_the_keys_of_every_head():
    tensors, seen = {}, []
    tensors = measured("double_sparsity", progress=seen.append)
    assert seen == [1, 2, 3]
    for layer, keys in enumerate(keys_of(tiny_llama())):
        found = tensors[f"layers.{layer}.channels"].long()
        assert torch.equal(found.sort(1).values, torch.arange(8).expand(2, 8))
        means = keys.abs().mean(1).gather(1, found)
        assert (means.diff(dim=1) <= 1e-6).all()


def test_queries_can_rank_channels_too():
    model = tiny_llama()
    by_q, by_k, by_qk = (calibration.measure_channels(model, TEXTS, by) for by in ("q", "k", "qk"))
    assert not torch.equal(by_q["layers.0.channels"], by_k["layers.0.channels"])
    assert not torch.equal(by_qk["layers.0.channels"], by_k["layers.0.channels"])


def test_a_basis_is_orthonormal_and_its_variances_fall():
    tensors = measured("loki")
    for layer, keys in enumerate(keys_of(tiny_llama())):
        basis = tensors[f"layers.{layer}.basis"]
        torch.testing.assert_close(
            basis @ basis.transpose(1, 2), torch.eye(8).expand(2, 8, 8), atol=1e-5, rtol=0
        )
        projected = (keys - keys.mean(1, keepdim=True)) @ basis.transpose(1, 2)
        covariance = projected.transpose(1, 2) @ projected / projected.shape[1]
        variance = covariance.diagonal(dim1=1, dim2=2)
        assert (variance.diff(dim=1) <= 1e-5).all()
        torch.testing.assert_close(covariance, torch.diag_embed(variance), atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", ["double_sparsity", "loki"])
def test_a_model_decodes_by_its_calibration_and_others_are_refused(method, tmp_path):
    model, path = tiny_llama(), tmp_path / "c.safetensors"
    calibration.write(path, measured(method), model, "text")
    policy = make_policy(method, calibration=str(path), r=4, k=8)
    with transfer.measure() as meter:
        tokens = list(kvsieve.decode(model, random_prompts(40, 17), policy, max_new_tokens=8))
    assert len(tokens) == 8
    assert meter.read < meter.dense_read
    loose = make_policy(method, calibration=str(path), r=4, k=100)
    dense = list(kvsieve.decode(model, random_prompts(30, 17), max_new_tokens=8))
    same = list(kvsieve.decode(model, random_prompts(30, 17), loose, max_new_tokens=8))
    assert all(torch.equal(a, b) for a, b in zip(dense, same, strict=True))
    KVCache(model, make_policy("dense_layers", layers=[0], inner=policy.spec()))
    for other in (tiny_llama(seed=1), tiny_llama(kv_heads=4)):
        with pytest.raises(UserError, match="was made for LlamaForCausalLM, whose configuration or weights"):
            KVCache(other, policy)
        with pytest.raises(UserError, match="was made for"):
            KVCache(other, make_policy("refresh", inner=policy.spec()))


def test_rounded_weights_are_the_same_model():
    digest = fingerprint(tiny_llama())
    model = tiny_llama.__wrapped__().to(torch.bfloat16)
    found = calibration.Calibration("c", {}, {"digest": digest})
    found.check(model, "basis", 4)
    found.check(model.to(torch.float16), "basis", 4)
    with pytest.raises(UserError, match="was made for another model"):
        found.check(tiny_llama.__wrapped__(seed=2).to(torch.bfloat16), "basis", 4)


def test_every_weight_is_part_of_a_fingerprint():
    known = fingerprint(tiny_llama())
    for name, _ in tiny_llama().named_parameters():
        model = tiny_llama.__wrapped__()
        weight = model.get_parameter(name)
        with torch.no_grad():  # as much as a few steps of training
            weight += 0.1 * weight.norm() / weight.numel() ** 0.5 * torch.randn_like(weight).sign()
        assert not same(known, fingerprint(model)), name
        with torch.no_grad():
            weight.copy_(tiny_llama().get_parameter(name))
        assert same(known, fingerprint(model)), "measured anew where weights were changed in place"
    assert not same(known, "none of kvsieve's")
    assert not same(known, fingerprint(tiny_llama(kv_heads=4)))


def test_a_process_with_a_part_of_the_weights_knows_the_model_by_the_others(monkeypatch):
    known, part = fingerprint(tiny_llama()), tiny_llama.__wrapped__()
    attention = part.model.layers[0].self_attn
    attention.q_proj.weight = torch.nn.Parameter(attention.q_proj.weight[:8].clone())
    assert not same(known, fingerprint(part))
    other = tiny_llama.__wrapped__(seed=1)
    for model in (part, other):
        monkeypatch.setattr(model, "_tp_size", 2, raising=False)
    assert same(known, fingerprint(tiny_llama()))
    model = tiny_llama.__wrapped__()
    model._tp_size = 2
    model.model.layers[0].self_attn.q_proj.weight = attention.q_proj.weight
    assert same(known, fingerprint(model))
    assert not same(known, fingerprint(other))


@pytest.mark.parametrize("method", ["double_sparsity", "loki"])
def test_the_calibrations_that_ship_are_for_the_weights_that_ship(method):
    model = kvsieve.load("reference")
    policy = make_policy(method, calibration="reference", r=8, k=16)
    (path,) = policy.files().values()
    again = "the weights changed: python -m kvsieve.reference_model.calibrations"
    assert same(calibration.read(path).metadata["digest"], fingerprint(model)), again
    assert len(list(kvsieve.decode(model, ["one two three " * 9], policy, max_new_tokens=4))) == 4
    with pytest.raises(UserError, match="was made for .*, whose configuration or weights are not this"):
        KVCache(tiny_llama(), policy)


def test_a_file_without_a_digest_serves_any_model_of_its_shape(tmp_path):
    path = tmp_path / "c.safetensors"
    save_file(measured("loki"), path)
    for seed in (0, 1):
        policy = make_policy("loki", calibration=str(path), r=4, k=8)
        assert list(kvsieve.decode(tiny_llama(seed=seed), random_prompts(20), policy, max_new_tokens=3))


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("loki", {"layers.0.basis": torch.zeros(2, 8, 8)}, "for heads of 8 channels, not 16"),
        ("loki", {"layers.0.basis": torch.zeros(1, 16, 16)}, "for 1 KV heads, and this model has 2"),
        ("loki", {"layers.0.basis": torch.zeros(2, 3, 16)}, "holds 3 basis a head, and r is 4"),
        ("loki", {"layers.7.basis": torch.zeros(2, 16, 16)}, "has no layers.0.basis"),
        (
            "loki",
            {"layers.0.channels": torch.zeros(2, 16)},
            "holds channels, and not basis: it is for another",
        ),
        ("double_sparsity", {"layers.0.channels": torch.full((2, 16), 16).short()}, "channels from 16 to 16"),
        ("double_sparsity", {"layers.0.channels": torch.zeros(2, 3).short()}, "holds 3 channels a head"),
    ],
)
def test_a_file_of_another_shape_is_refused(name, tensors, message, tmp_path):
    path = tmp_path / "c.safetensors"
    save_file(tensors, path)
    with pytest.raises(UserError, match=message):
        rollout(make_policy(name, calibration=str(path), r=4, k=8), *Inputs.random())


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(2, 8, 8)], "has no layers.1.basis"),
        ([(2, 8, 8), (1, 8, 8)], "for 1 KV heads, and this model has 2"),
        ([(2, 16, 16), (2, 16, 16)], "for heads of 16 channels, not 8"),
        ([(2, 3, 8), (2, 3, 8)], "holds 3 basis a head, and r is 4"),
        ([(2, 8, 8)] * 3, "for 3 layers of 2 KV heads, and this model has 2 of 2"),
        ([(4, 8, 8)] * 2, "for 2 layers of 4 KV heads, and this model has 2 of 2"),
    ],
)
@pytest.mark.parametrize("inner", [False, True], ids=["alone", "within twilight"])
def test_a_file_of_another_models_shape_is_refused_when_the_cache_is_made(shapes, message, inner, tmp_path):
    path = tmp_path / "c.safetensors"
    save_file({f"layers.{i}.basis": torch.zeros(shape) for i, shape in enumerate(shapes)}, path)
    policy = make_policy("loki", calibration=str(path), r=4, k=8)
    with pytest.raises(UserError, match=message):
        KVCache(tiny_llama(), make_policy("twilight", inner=policy) if inner else policy)


def test_what_is_no_calibration_is_refused(tmp_path):
    model, text = tiny_llama(), tmp_path / "text"
    text.write_text("no tensors here")
    for path, message in (
        ("", "is needed"),
        ("nowhere", "no calibration file nowhere"),
        (str(text), "is no calibration"),
    ):
        with pytest.raises(UserError, match=message):
            KVCache(model, make_policy("loki", calibration=path, r=4))
    for name, bits in (("loki", {}), ("double_sparsity", {"bits": 16})):
        with pytest.raises(UserError, match="r is 9, but this model's heads have 8"):
            KVCache(model, make_policy(name, calibration="some", r=9, **bits))


@dataclass(frozen=True)
class Bound(Policy):
    """Dense, with static data of its choice; notes what it was asked for."""

    answer: object = None
    asked: tuple[list, ...] = ([],)
    name: ClassVar[str] = "bound"

    def bind(self, layer, heads, head_size, device):
        self.asked[0].append((layer, heads, head_size))
        return {"x": torch.zeros(len(heads), 3)} if self.answer is None else self.answer

    def select(self, query, kv):
        assert kv.static["x"].shape == (2, 3)
        assert kv.static["x"].sum() == 0
        with pytest.raises(UserError, match="static data 'y'.*x"):
            kv.static["y"]


@dataclass(frozen=True)
class Around(Wrapper):
    inner: Policy
    name: ClassVar[str] = "around"


def test_static_data_is_asked_for_once_a_layer_and_counted_once_a_step():
    policy = Bound(asked=([],))
    layer, inputs = LayerCache(Around(policy), index=5), Inputs.random(steps=4)
    with transfer.measure() as meter:
        rollout(layer.policy, *inputs, layer=layer)
    assert policy.asked[0] == [(5, range(2), 16)]
    assert meter.by_kind["static"] == 4 * (2 * 3 * 4)  # whatever the rows
    layer.reset()
    rollout(layer.policy, *inputs, layer=layer)
    assert len(policy.asked[0]) == 1


def test_a_process_of_several_binds_its_own_heads(monkeypatch):
    policy = Bound(asked=([],))
    layer = LayerCache(policy)
    layer.model_heads = 6
    monkeypatch.setenv("RANK", "2")
    rollout(policy, *Inputs.random(), layer=layer)
    assert policy.asked[0] == [(0, range(4, 6), 16)]
    cache = KVCache(tiny_llama(), Policy())
    assert [layer.model_heads for layer in cache.policy_layers] == [2, 2]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1], "must return a mapping.*not list"),
        ({"x": 3}, r"'x' must be a tensor \[K, ...\] with K = 2, not int"),
        ({"x": torch.zeros(3, 2)}, r"K = 2, not \[3, 2\]"),
        ({"x": torch.zeros(2, device="meta")}, "'x' is on meta, expected cpu"),
    ],
)
def test_static_data_that_does_not_fit_is_refused(answer, message):
    with pytest.raises(UserError, match=f"policy bound, layer 0: bind.*{message}"):
        rollout(Bound(answer), *Inputs.random())


@pytest.mark.parametrize("method", ["double_sparsity", "loki", "duo_attention"])
def test_calibrate_from_the_command_line(method, tmp_path):
    out, text = tmp_path / "c.safetensors", tmp_path / "text.txt"
    text.write_text("one two three " * 400)
    given = ["calibrate", method, "--out", str(out), "--text", str(text), "--samples", "2", "--length", "64"]
    result = CliRunner().invoke(app, given)
    assert result.exit_code == 0, result.output
    assert "2 of 2 pieces of 64 tokens read" in result.output
    assert len(load_file(out)) == 4  # layers of the reference model
    metadata = calibration.read(str(out)).metadata
    assert set(metadata) == {"model", "digest", "text"}
    assert metadata["model"] == "reference"
    assert metadata["text"] == kvsieve.corpus.digest(text.read_text())


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (["--length", "100000"], "too few for 16 pieces"),
        (["--text", "nowhere.txt"], "--text nowhere.txt is no file"),
        (["--out", "nowhere/c.safetensors"], "there is no folder nowhere"),
    ],
)
def test_calibrate_refuses_before_any_work(given, message, tmp_path):
    base = ["calibrate", "loki", "--out", str(tmp_path / "c.safetensors")]
    text = tmp_path / "short.txt"
    text.write_text("short")
    if "--text" not in given:
        base += ["--text", str(text)]
    result = CliRunner().invoke(app, base + given)
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())
    assert not (tmp_path / "c.safetensors").exists()
