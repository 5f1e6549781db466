"""The id of a cell depends on everything that a result depends on, and differences are named."""

import importlib
import os
import sys

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvsieve
from kvsieve.compare import cells, code, identity, samples, weights
from kvsieve.compare.tasks import KeyValue, Needle

CONFIG = """\
    tasks: [needle: {context: 120, samples: 3}]
    policies: [dense, sparq: {compression: 1/4}]
    """


@pytest.fixture
def small():
    """Two layers whose output layer is the embedding table, in a type of two bytes."""
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=57, tie_word_embeddings=True, **shape)).bfloat16()


def flipped(tensor, byte, bit):
    """Flip one bit of a tensor, in place."""
    data = tensor.detach().view(-1).view(torch.uint8)
    data[byte] = int(data[byte]) ^ (1 << bit)


def test_every_bit_of_every_weight_changes_the_digest(small):
    before = weights.weights_digest(small)
    generator = torch.Generator().manual_seed(1)
    for tensor in small.state_dict().values():
        size = tensor.numel() * tensor.element_size()
        for byte in {0, size - 1, *torch.randint(size, (20,), generator=generator).tolist()}:
            bit = int(torch.randint(8, (1,), generator=generator))
            flipped(tensor, byte, bit)
            assert weights.weights_digest(small) != before, (tuple(tensor.shape), byte, bit)
            flipped(tensor, byte, bit)
    assert weights.weights_digest(small) == before


def test_changes_that_a_sum_would_not_see_change_the_digest(small):
    weight = small.model.layers[0].self_attn.v_proj.weight.detach()
    changes = [
        (weight, weight.roll(4, 1)),  # whole words of eight bytes change places
        (weight[3], -weight[3]),  # an even number of signs
        (weight[:, 3::4], -weight[:, 3::4]),  # the highest bit of every word
        (weight[5:], torch.zeros_like(weight[5:])),
        (small.model.rotary_emb.inv_freq, torch.tensor(2.0)),  # a buffer that no checkpoint holds
    ]
    digests = [weights.weights_digest(small)]
    for place, new in changes:
        place.copy_(new)
        digests.append(weights.weights_digest(small))
    assert len(set(digests)) == 6


def test_the_digest_does_not_depend_on_where_the_weights_lie(small):
    digest = weights.weights_digest(small)
    assert weights.weights_digest(LlamaForCausalLM(small.config).bfloat16()) != digest
    other = LlamaForCausalLM(small.config).bfloat16()
    other.load_state_dict(small.state_dict())
    assert weights.weights_digest(other) == digest
    assert weights.weights_digest(other.float()) != digest


def test_a_tensor_that_is_longer_than_a_chunk_is_read_to_its_end(monkeypatch, small):
    monkeypatch.setattr(weights, "_CHUNK", 16)
    before = weights.weights_digest(small)
    table = small.model.embed_tokens.weight
    for byte in (0, 127, 128, table.numel() * 2 - 1):
        flipped(table, byte, 0)
        assert weights.weights_digest(small) != before
        flipped(table, byte, 0)


def test_the_code_of_kvsieve_is_all_that_a_decode_step_runs_through():
    found = set(code.framework_files())
    assert {
        "kvsieve.loop", "kvsieve.scoring", "kvsieve.sampling", "kvsieve.prompts", "kvsieve.attention",
        "kvsieve.policy", "kvsieve.transfer", "kvsieve.graph", "kvsieve.hf.interface", "kvsieve.cache.layer",
        "kvsieve.ops", "kvsieve.ops.reference.select", "kvsieve.ops.cpu", "kvsieve.ops.numba.scores",
        "kvsieve.ops.triton.attend", "kvsieve.recording", "kvsieve.calibration",
        "kvsieve.compare.execute.unit", "kvsieve.compare.execute.cell", "kvsieve.compare.tasks.base",
    } <= found  # fmt: skip
    assert not {"kvsieve.cli", "kvsieve.compare.run", "kvsieve.compare.summary", "kvsieve.plugins"} & found


def test_the_code_of_a_task_is_its_file_and_its_helpers():
    needle, key_value = (set(code.class_files(cls)) for cls in (Needle, KeyValue))
    assert needle - key_value == {"kvsieve.compare.tasks.needle"}
    assert {"kvsieve.compare.tasks.text", "kvsieve.corpus"} <= needle & key_value


def test_an_edited_helper_of_a_policy_is_another_policy(tmp_path, monkeypatch):
    package = tmp_path / "helped_policies"
    package.mkdir()
    monkeypatch.syspath_prepend(tmp_path)
    (package / "__init__.py").write_text("from .unrelated import NOTHING\n")
    (package / "unrelated.py").write_text("NOTHING = 0\n")
    (package / "deep.py").write_text("SCALE = 1\n")
    (package / "helper.py").write_text("def help():\n    from . import deep\n    return deep.SCALE\n")
    (package / "policy.py").write_text(
        "import kvsieve\nfrom .helper import help\nclass P(kvsieve.Policy):\n    name = 'p'\n"
    )
    policy = importlib.import_module("helped_policies.policy").P
    names = [f"helped_policies.{name}" for name in ("deep", "helper", "policy")]
    before = code.class_files(policy)
    assert list(before) == names
    for name in names:
        path = tmp_path / f"{name.replace('.', '/')}.py"
        text = path.read_text()
        path.write_text(text + "# edited\n")
        changed = code.class_files(policy)
        assert {other for other in names if changed[other] != before[other]} == {name}
        path.write_text(text)
    (package / "unrelated.py").write_text("NOTHING = 1\n")
    assert code.class_files(policy) == before
    for name in [name for name in sys.modules if name.startswith("helped_policies")]:
        monkeypatch.delitem(sys.modules, name)


def test_what_a_plugins_task_imports_from_kvsieve_is_code_of_the_task(tmp_path, monkeypatch):
    (tmp_path / "helped_task.py").write_text(
        "import kvsieve\nfrom kvsieve.compare.tasks import text\nfrom kvsieve.transfer import Meter\n"
        "class T(kvsieve.Task):\n    name = 't'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    task = importlib.import_module("helped_task").T
    monkeypatch.delitem(sys.modules, "helped_task")
    found = set(code.class_files(task))
    assert {"helped_task", "kvsieve.compare.tasks.text", "kvsieve.corpus"} <= found
    assert not found & set(code.framework_files())  # in the digest of which a cell's id is made, too


def test_a_policy_inherits_the_code_of_its_base():
    base = type(kvsieve.make_policy("sparq"))
    typed = type("Typed", (base,), {"__module__": "nowhere_to_be_found"})
    assert code.class_files(typed) == code.class_files(base) | {"Typed": ""}


def test_a_difference_is_named(load, model, compare):
    first = compare(CONFIG)
    outcome = compare(CONFIG + "seed: 1\n")
    printed = " ".join(compare.console.export_text().split())
    assert (
        "6 samples of 2 cells, such as needle 120, dense, were measured with another seed (0 -> 1)" in printed
    )
    assert outcome.folder == first.folder
    assert "are not used" in printed
    known = identity.read(outcome.folder)
    assert {record["cell"] for record in samples.read(outcome.folder / "samples.jsonl")} == set(known)
    assert len(known) == 4
    for cell in cells.expand(load(CONFIG), model):
        assert known[cell.id]["policy"] == cell.policy.spec()
    compare(CONFIG + "seed: 1\n")
    assert "not used" not in compare.console.export_text()  # nothing is missing: not worth a line


def test_several_differences_are_named_one_by_one():
    old = {"torch": "2.12", "task": {"needle": {"context": 1}}, "seed": 0, "gone": 1}
    new = {"torch": "2.13", "task": {"needle": {"context": 2}}, "seed": 0}
    assert identity.differences(old, new) == [
        "torch (2.12 -> 2.13)", "task: needle: context (1 -> 2)", "gone (1 -> none)"
    ]  # fmt: skip


def test_another_size_of_batch_uses_the_same_samples(compare):
    first = compare(CONFIG)
    kept = samples.read(first.folder / "samples.jsonl")
    assert {record["rows"] for record in kept} == {1}
    compare(CONFIG.replace("samples: 3", "samples: 5") + "batch_size: 2\n")
    found = samples.read(first.folder / "samples.jsonl")
    assert found[:6] == kept
    assert [record["rows"] for record in found[6:]] == [2] * 4


def test_the_arithmetic_of_a_step_is_part_of_an_id(load, model, monkeypatch):
    config = load(CONFIG)
    with kvsieve.ops.use("reference"):
        plain = identity.shared_fields(config, model)
    with kvsieve.ops.use("numba"):
        compiled = identity.shared_fields(config, model)
        monkeypatch.setattr(identity, "_version", lambda package: f"other {package}")
        newer = identity.shared_fields(config, model)
    assert [line.partition(" (")[0] for line in identity.differences(plain, compiled)] == ["ops", "numba"]
    assert newer["numba"] == "other numba"
    assert len({identity.identify(fields) for fields in (plain, compiled, newer)}) == 3


def test_a_model_that_moved_keeps_its_results(load, model):
    config = load(CONFIG)
    here = identity.shared_fields(config, model)
    moved = here | {"model": "/elsewhere/reference", "revision": "0123abc"}
    assert identity.identify(here) == identity.identify(moved)
    assert identity.differences(here, moved) == []
    assert identity.identify(here | {"weights digest": "another"}) != identity.identify(here)


def test_another_tokenizer_is_another_protocol(load, model, monkeypatch):
    before = identity.shared_fields(load(CONFIG), model)
    again = identity.shared_fields(load(CONFIG), model)
    assert identity.differences(before, again) == []
    monkeypatch.setattr(model.config, "rope_theta", 5.0, raising=False)
    monkeypatch.setattr(type(model.tokenizer), "special_tokens_map", {"bos_token": "x"})
    changed = identity.differences(before, identity.shared_fields(load(CONFIG), model))
    assert [line.partition(" (")[0] for line in changed] == ["model configuration", "tokenizer"]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_another_calibration_under_the_same_name_is_another_policy(tmp_path):
    path = tmp_path / "calibration.safetensors"
    policy = kvsieve.make_policy("loki", calibration=str(path), r=4, k=8)
    wrapped = kvsieve.make_policy("twilight", inner=policy)
    found = []
    for content in (b"one", b"two"):
        path.write_bytes(content)
        found.append(
            [identity.fields(Needle(), some, {})["files of the policy"] for some in (policy, wrapped)]
        )
    assert [list(files) for files in found[0]] == [["calibration"], ["inner.calibration"]]
    assert all(one != two for one, two in zip(*found, strict=True))
    assert identity.fields(Needle(), kvsieve.make_policy("sparq"), {})["files of the policy"] == {}
    path.unlink()
    os.mkfifo(path)  # reading it would wait for ever
    assert identity.fields(Needle(), policy, {})["files of the policy"] == {"calibration": None}
