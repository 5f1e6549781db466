"""Options of the command line, and its answers to mistakes."""

import re

import pytest
import torch

from kvsieve import UserError
from kvsieve.bench.contenders import contenders, default_policies, random_calibration
from kvsieve.bench.shapes import SHAPES, Heads, heads_of, model_config, read_heads, read_sizes


def names(*policies, layouts=("double", "single")):
    return [contender.name for contender in contenders(policies, layouts, 64, 1024)]


def test_a_policy_with_a_layout_is_measured_in_each():
    assert names("sparq", "dense") == ["sparq [double]", "sparq [single]", "dense [single]"]


def test_a_layout_given_with_the_policy_is_the_only_one():
    assert names("sparq: {r: 8, layout: blocked}") == ["sparq r=8 [blocked]"]
    nested = "dense_layers: {layers: [0], inner: {sparq: {layout: single}}}"
    assert [contender.layout for contender in contenders([nested], ["double"], 64, 1024)] == ["single"]


def test_without_layouts_a_policy_has_what_its_device_makes_of_auto():
    for device, layout in (("cpu", "double"), ("cuda", "blocked")):
        (contender,) = contenders(["sparq"], [], 64, 1024, device=torch.device(device))
        assert (contender.layout, contender.policy.key_layout.kind) == (layout, "auto")


def test_lists_are_sweeps_as_in_a_config():
    assert names("h2o: {compression: [1/2, 1/8]}") == [
        "h2o compression=1/2 [single]",
        "h2o compression=1/8 [single]",
    ]


def test_a_compression_is_that_of_the_context():
    (contender,) = contenders(["h2o: {compression: 1/8}"], [], 64, 1024)
    assert contender.policy.keeps == 128


def test_the_defaults_fit_every_shape():
    for name in SHAPES:
        size = heads_of(model_config(name, 1, 64)).size
        assert contenders(default_policies(size), ["double"], size, 1024)


@pytest.mark.parametrize(
    ("policy", "layout", "message"),
    [
        ("sparc", "double", "unknown policy 'sparc'; did you mean 'sparq'?"),
        ("sparq: {r: 8, kk: 3}", "double", "unknown parameter of sparq 'kk'"),
        ("sparq: {r: 80}", "double", "only 64 channels"),
        ("sparq", "dubble", "unknown layout 'dubble'; did you mean 'double'? Legal: blocked, double, single"),
        ("[sparq", "double", "--policy is a name"),
        ("3", "double", "--policy is a name"),
    ],
)
def test_mistakes_name_what_is_legal(policy, layout, message):
    with pytest.raises(UserError, match=re.escape(message)):
        names(policy, layouts=[layout])


def test_a_layout_that_a_policy_cannot_have_is_refused(tmp_path):
    path = random_calibration(tmp_path, Heads(4, 2, 64))
    given = [f"double_sparsity: {{calibration: '{path}', bits: 0, r: 8}}"]
    with pytest.raises(UserError, match="double_sparsity cannot have its keys in the layout single"):
        contenders(given, ["single"], 64, 1024)
    (contender,) = contenders(given, ["single", "blocked"], 64, 1024)
    assert contender.layout == "blocked"


def test_sizes_and_heads():
    assert read_sizes("--context", "32k,4k,100") == [100, 4096, 32768]
    assert read_heads("32x8x128") == Heads(32, 8, 128)


@pytest.mark.parametrize("text", ["", "4x", "0", "-3", "1,,2", "4m"])
def test_bad_sizes(text):
    with pytest.raises(UserError, match="--context is one or more numbers"):
        read_sizes("--context", text)


@pytest.mark.parametrize("text", ["32x8", "32x0x128", "axbxc", "30x8x128"])
def test_bad_heads(text):
    with pytest.raises(UserError, match="--heads"):
        read_heads(text)


def test_shapes_are_the_models():
    config = model_config("llama-3-8b", None, 131072)
    assert heads_of(config) == Heads(32, 8, 128)
    assert (config.num_hidden_layers, config.max_position_embeddings) == (32, 131072)
    assert model_config("qwen3-8b", 2, 64).num_hidden_layers == 2


def test_bad_shapes():
    with pytest.raises(UserError, match="did you mean 'llama-3-8b'"):
        model_config("llama-3-8", None, 64)
    with pytest.raises(UserError, match="--layers must be from 1 to the 4 of tiny, not 9"):
        model_config("tiny", 9, 64)
