"""load(): what it reads, from where, and why it refuses; nothing here needs a network."""

import importlib.util
import json
import time

import pytest
import torch
from huggingface_hub import constants

import kvsieve
from kvsieve import UserError
from kvsieve.reference_model.tokenizer import byte_tokenizer
from tests.families.zoo import FAMILIES
from tests.models import tiny_llama


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(path)
    return path


def copy_of(folder, tmp_path, *names):
    for name in names:
        (tmp_path / name).write_bytes((folder / name).read_bytes())
    return tmp_path


def test_a_saved_folder_is_loaded_ready_to_decode(folder):
    model = kvsieve.load(str(folder), device="cpu")
    assert model.dtype == torch.float32
    assert not model.training
    tokens = [list(kvsieve.decode(m, [[5, 6, 7]], max_new_tokens=4)) for m in (model, tiny_llama())]
    assert tokens[0] == tokens[1]


def test_the_tokenizer_comes_with_it_or_is_missed_when_needed(folder, tmp_path):
    bare = kvsieve.load(str(folder), device="cpu")
    assert bare.tokenizer is None
    with pytest.raises(UserError, match="has no tokenizer"):
        next(kvsieve.decode(bare, "text", max_new_tokens=1))
    whole = copy_of(folder, tmp_path, "config.json", "model.safetensors")
    byte_tokenizer().save_pretrained(whole)
    assert kvsieve.load(str(whole), device="cpu").tokenizer("AB")["input_ids"][-2:] == [65, 66]


def test_dtype_is_the_one_asked_for(folder):
    assert kvsieve.load(str(folder), device="cpu", dtype="bfloat16").dtype == torch.bfloat16
    assert kvsieve.load(str(folder), device="cpu", dtype=torch.float16).dtype == torch.float16
    for wrong in ("float33", "int8", "randn"):
        with pytest.raises(
            UserError, match=f"dtype '{wrong}' is not a floating-point type. Legal: float32, bfloat16"
        ):
            kvsieve.load(str(folder), device="cpu", dtype=wrong)


# ---------------------------------------------------------------- folders that cannot be loaded
def test_pickled_weights_are_refused_and_not_read(folder, tmp_path):
    copy_of(folder, tmp_path, "config.json")
    (tmp_path / "pytorch_model.bin").write_bytes(b"not even a pickle")
    with pytest.raises(
        UserError, match=r"no weights as safetensors, only pytorch_model.bin: a pickle can run any code"
    ):
        kvsieve.load(str(tmp_path))


def test_a_folder_without_weights_or_configuration_says_so(folder, tmp_path):
    with pytest.raises(UserError, match=r"the folder has no config.json"):
        kvsieve.load(str(tmp_path))
    copy_of(folder, tmp_path, "config.json")
    with pytest.raises(UserError, match=r"the folder has no weights as safetensors$"):
        kvsieve.load(str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"its config.json is not JSON"):
        kvsieve.load(str(tmp_path))


def test_broken_weights_are_reported_without_a_traceback(folder, tmp_path):
    copy_of(folder, tmp_path, "config.json")
    (tmp_path / "model.safetensors").write_bytes(b"\x10\x00")
    with pytest.raises(UserError, match="could not be loaded"):
        kvsieve.load(str(tmp_path))


def test_code_that_comes_with_a_model_is_not_run_unless_asked_for(folder, tmp_path):
    copy_of(folder, tmp_path, "model.safetensors")
    auto_map = {"AutoConfig": "configuration.Strange", "AutoModelForCausalLM": "modeling.Strange"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "strange", "auto_map": auto_map}))
    (tmp_path / "configuration.py").write_text(f"open({str(tmp_path / 'it_ran')!r}, 'w')")
    with pytest.raises(UserError, match=r"code of its own.*trust_remote_code=True"):
        kvsieve.load(str(tmp_path))
    assert not (tmp_path / "it_ran").exists()


# ---------------------------------------------------------------- the hub
def test_a_model_that_is_nowhere_is_refused_at_once_when_offline(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    start = time.perf_counter()
    with pytest.raises(
        UserError, match=r"'someone/a-model' is not 'reference', not a folder here.*HF_HUB_OFFLINE is set"
    ):
        kvsieve.load("someone/a-model")
    assert time.perf_counter() - start < 5


def test_a_hub_that_does_not_answer_is_found_out_before_any_retry(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nobody listens there
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"not reached: .*Connection refused"):
        kvsieve.load("someone/a-model")
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "~/nothing", "a/b/c", "..bad..name"])
def test_names_that_are_neither_folders_nor_models(name):
    with pytest.raises(UserError, match="no such folder"):
        kvsieve.load(name)


# ---------------------------------------------------------------- several devices
def test_a_device_map_needs_accelerate_and_no_device(folder, monkeypatch):
    with pytest.raises(UserError, match="device 'cpu' and a device_map were given"):
        kvsieve.load(str(folder), device="cpu", device_map="auto")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *_: None)
    with pytest.raises(UserError, match="needs the package accelerate: pip install accelerate"):
        kvsieve.load(str(folder), device_map="auto")


def test_a_device_map_is_followed(folder):
    pytest.importorskip("accelerate")
    model = kvsieve.load(str(folder), device_map={"": "cpu"}, dtype="float32")
    tokens = [list(kvsieve.decode(m, [[5, 6, 7]], max_new_tokens=4)) for m in (model, tiny_llama())]
    assert tokens[0] == tokens[1]


def test_borrowed_slots_do_not_cross_devices():
    model = next(family for family in FAMILIES if family.name == "gemma3n").build()
    model.hf_device_map = {"model.layers.0": 0, "model.layers.3": 1}
    with pytest.raises(UserError, match=r"shares keys and values between layers.*several devices \(0, 1\)"):
        kvsieve.prepare(model)
