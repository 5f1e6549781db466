"""load(): what it reads, from where, and why it refuses; nothing here needs a network."""

import copy
import http.server
import importlib.util
import json
import os
import pickle
import threading
import time

import pytest
import torch
from huggingface_hub import constants
from transformers import LlamaForCausalLM

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
class Trap:
    """A pickle that leaves a file behind when it is read."""

    def __init__(self, place):
        self.place = place

    def __reduce__(self):
        return open, (str(self.place), "w")


def test_beside_safetensors_no_pickle_is_read(folder, tmp_path):
    whole = copy_of(folder, tmp_path, "config.json", "model.safetensors", "generation_config.json")
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pth", "tokenizer.pkl"):
        (whole / name).write_bytes(pickle.dumps(Trap(tmp_path / "it_ran")))
    model = kvsieve.load(str(whole), device="cpu")
    assert torch.equal(model.lm_head.weight, tiny_llama().lm_head.weight)
    assert not (tmp_path / "it_ran").exists()
    pickle.loads((whole / "model.pt").read_bytes()).close()  # the trap works
    assert (tmp_path / "it_ran").exists()


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
    for wrong in ("{", "\xff", "[" * 100_000):
        (tmp_path / "config.json").write_bytes(wrong.encode("latin-1"))
        with pytest.raises(UserError, match=r"its config.json is not JSON"):
            kvsieve.load(str(tmp_path))
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(UserError, match=r"its config.json is not a JSON object"):
        kvsieve.load(str(tmp_path))
    (tmp_path / "config.json").unlink()
    os.mkfifo(tmp_path / "config.json")  # reading it would wait for ever
    with pytest.raises(UserError, match=r"the folder has no config.json"):
        kvsieve.load(str(tmp_path))


@pytest.mark.parametrize(
    "wrong",
    [
        {"hidden_size": "x"}, {"hidden_size": 0}, {"num_attention_heads": 0}, {"num_hidden_layers": -1},
        {"num_hidden_layers": 3}, {"hidden_size": 64}, {"model_type": 3}, {"model_type": "nothing"},
        {"dtype": "float8_e4m3fn"}, {"dtype": "nonsense"}, {"rope_parameters": 3}, {"hidden_act": "nothing"},
        {"quantization_config": {"quant_method": "nothing"}}, {"vocab_size": -5},
    ],
    ids=str,
)  # fmt: skip
def test_a_configuration_with_wrong_fields_is_a_user_error_or_loads(folder, tmp_path, wrong):
    copy_of(folder, tmp_path, "model.safetensors")
    right = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(right | wrong))
    try:
        kvsieve.load(str(tmp_path), device="cpu", dtype="auto")
    except UserError as error:
        assert str(tmp_path) in str(error)


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


def test_weights_that_no_file_has_are_not_made_up(folder, tmp_path):
    copy_of(folder, tmp_path, "model.safetensors")
    right = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(right | {"num_hidden_layers": 3}))
    with pytest.raises(
        UserError, match=r"its files lack 9 of the weights .* such as model.layers.2.input_layernorm"
    ):
        kvsieve.load(str(tmp_path), device="cpu")


# ---------------------------------------------------------------- the hub
def point_the_hub_to(monkeypatch, address):
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(monkeypatch):
    """A hub on this machine; it says of every model what its attribute `answer` says."""

    class Answers(http.server.BaseHTTPRequestHandler):
        def do_HEAD(self):
            server.asked.append(self.path)
            status, reason = server.answer
            self.send_response(status)
            self.send_header("X-Error-Code", reason)
            self.end_headers()

        def log_message(self, *_):
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Answers)
    server.asked, server.answer = [], (404, "RepoNotFound")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    point_the_hub_to(monkeypatch, f"http://127.0.0.1:{server.server_port}")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize(
    ("status", "reason"),
    [(404, "RepoNotFound"), (404, "RevisionNotFound"), (404, "EntryNotFound"), (403, "GatedRepo")],
)
def test_a_model_that_the_hub_does_not_give_is_refused_after_one_question(hub, status, reason):
    hub.answer = status, reason
    with pytest.raises(
        UserError, match=r"'someone/a-model, revision v2': http://127.0.0.1:\d+ has no such model"
    ):
        kvsieve.load("someone/a-model", revision="v2")
    assert hub.asked == ["/someone/a-model/resolve/v2/config.json"]


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
    point_the_hub_to(monkeypatch, "http://127.0.0.1:9")  # nobody listens there
    start = time.perf_counter()
    with pytest.raises(UserError, match=r"not reached: .*Connection refused"):
        kvsieve.load("someone/a-model")
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("name", ["./nothing", "/no/such/folder", "~/nothing", "a/b/c", "..bad..name"])
def test_names_that_are_neither_folders_nor_models(name):
    with pytest.raises(UserError, match="no such folder"):
        kvsieve.load(name)


# ---------------------------------------------------------------- names that cannot be looked up
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "model is empty; give 'reference', the id of a model on the hub, or a folder"),
        ("  ", "model is empty"),
        (None, "model must be 'reference', .* not of type NoneType"),
        (b"reference", "not of type bytes"),
        (3, "not of type int"),
        ("a" * 5000, r"model 'a{97}\.\.\.': no such folder: File name too long"),
        ("a/" * 5000, r"model '(a/)*a\.\.\.': no such folder: File name too long"),
        ("a" * 200, r"no such folder, and no name for the hub: .*"),
        ("a\0b", r"model 'a\\x00b': character 1 is '\\x00'"),
        ("a\nb", r"model 'a\\nb': character 1 is '\\n'"),
        ("a\udcffb", r"character 1 is '\\udcff'"),
        ("~nobody_has_this_name/model", "no such folder: Could not determine home directory"),
    ],
)
def test_odd_names_are_refused_in_one_line(name, message):
    with pytest.raises(UserError, match=message) as refused:
        kvsieve.load(name)
    assert len(str(refused.value)) < 600
    assert str(refused.value).isprintable()


@pytest.mark.parametrize("revision", ["", 3, "a\nb", b"main"])
def test_odd_revisions_are_refused(revision):
    with pytest.raises(UserError, match="revision"):
        kvsieve.load("someone/a-model", revision=revision)


def test_the_name_of_a_folder_may_be_a_path_or_lead_through_a_link(folder, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(folder)
    for name in (folder, link, str(link)):
        assert kvsieve.load(name, device="cpu").dtype == torch.float32


def test_a_link_that_leads_to_itself_is_no_folder(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match="no such folder"):
        kvsieve.load(str(tmp_path / "loop"))


# ---------------------------------------------------------------- devices and types
def garbage(folder, tmp_path):
    """A folder whose configuration is right, and whose weights nobody may look at."""
    copy_of(folder, tmp_path, "config.json")
    (tmp_path / "model.safetensors").write_bytes(b"never read")
    return str(tmp_path)


@pytest.mark.parametrize(
    ("device", "message"),
    [
        ("meta", "device 'meta' holds shapes but no numbers.* Legal: cpu"),
        (torch.device("meta"), "device 'meta' holds shapes"),
        ("nonsense", "device 'nonsense' is none that PyTorch knows here. Legal: cpu"),
        ("", "device '' is none"),
        ("cuda:-1", "device 'cuda:-1' is none"),
        ("x" * 5000, r"device 'x+\.\.\. is none"),
        (1.5, "device 1.5 is none"),
        (True, "device True is none"),
        (b"cpu", "device b'cpu' is none"),
        ("vulkan", "device 'vulkan': PyTorch finds no vulkan on this machine. Legal: cpu"),
        ("cpu:3", "device 'cpu:3': this machine has 1 of the kind"),
    ],
)
def test_a_device_that_cannot_be_used_is_refused_before_any_weight_is_read(folder, tmp_path, device, message):
    with pytest.raises(UserError, match=message):
        kvsieve.load(garbage(folder, tmp_path), device=device)


@pytest.mark.parametrize(
    ("device", "module"), [("cuda", torch.cuda), ("cuda:0", torch.cuda), ("mps", torch.mps)]
)
def test_a_device_that_this_machine_lacks_is_refused(folder, tmp_path, monkeypatch, device, module):
    monkeypatch.setattr(module, "is_available", lambda: False)
    kind = device.partition(":")[0]
    with pytest.raises(UserError, match=f"device '{device}': PyTorch finds no {kind} on this machine"):
        kvsieve.load(garbage(folder, tmp_path), device=device)


def test_an_index_beyond_the_devices_of_this_machine_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="device 'cuda:7': this machine has 2 of the kind"):
        kvsieve.load(garbage(folder, tmp_path), device="cuda:7")


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", torch.float8_e5m2])
def test_a_type_for_storage_alone_is_refused(folder, tmp_path, dtype):
    message = (
        r"is for storage: PyTorch does not compute in it. Legal: float32, bfloat16, float16, float64, auto"
    )
    with pytest.raises(UserError, match=f"{dtype}'? {message}"):
        kvsieve.load(garbage(folder, tmp_path), dtype=dtype)


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.bool, "", "x" * 5000, 3, True, b"float32", "complex64", "nn"]
)
def test_anything_else_is_no_type(folder, tmp_path, dtype):
    with pytest.raises(UserError, match=r"^dtype .{,70} is not a floating-point type. Legal: float32"):
        kvsieve.load(garbage(folder, tmp_path), device="cpu", dtype=dtype)


@pytest.mark.parametrize(
    ("device_map", "message"),
    [
        ("nonsense", "unknown device_map 'nonsense'"),
        ("meta", "unknown device_map 'meta'"),
        ({"": "meta"}, "device 'meta' holds shapes"),
        ({"": None, "lm_head": "nonsense"}, "device 'nonsense' is none"),
        (3.5, "device_map must be a name or a dictionary, not 3.5"),
    ],
)
def test_a_device_map_that_names_no_device_is_refused(folder, tmp_path, device_map, message):
    pytest.importorskip("accelerate")
    with pytest.raises(UserError, match=message):
        kvsieve.load(garbage(folder, tmp_path), device_map=device_map)


def test_a_model_without_numbers_is_not_prepared():
    with torch.device("meta"):
        model = LlamaForCausalLM(tiny_llama().config)
    with pytest.raises(UserError, match="LlamaForCausalLM is on the device 'meta', without numbers"):
        kvsieve.prepare(model)


@pytest.mark.parametrize("trust", ["no", 1, None])
def test_trust_is_given_by_true_alone(folder, trust):
    with pytest.raises(UserError, match="trust_remote_code must be True or False"):
        kvsieve.load(str(folder), trust_remote_code=trust)


def test_float64_is_computed_by_torch_and_by_no_compiled_loop():
    model = copy.deepcopy(tiny_llama()).double()
    with kvsieve.ops.use("numba"), pytest.raises(UserError, match=r"float32, bfloat16, float16, .* float64"):
        kvsieve.decode(model, [[5, 6, 7]], max_new_tokens=4)
    with kvsieve.ops.use("reference"):
        tokens = list(kvsieve.decode(model, [[5, 6, 7]], max_new_tokens=4))
    assert tokens == list(kvsieve.decode(tiny_llama(), [[5, 6, 7]], max_new_tokens=4))


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
