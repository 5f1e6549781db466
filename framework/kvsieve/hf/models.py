"""Models: load one by name or path, or make ready one that is there; refuse what cannot work, with the reason."""

from __future__ import annotations

import importlib.util
import json
import ssl
import types
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from ..cache.kv_cache import ATTENTION
from ..errors import UserError
from ..reference_model import FOLDER as REFERENCE_FOLDER
from ..reference_model import NAME as REFERENCE
from . import generate, interface, parallel

_SECONDS_TO_REACH_THE_HUB = 10

Model = TypeVar("Model", bound=PreTrainedModel)


def load(
    id_or_path: str,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    device_map: str | dict[str, Any] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    tensor_parallel: bool = False,
) -> PreTrainedModel:
    """Load a causal language model, ready for `KVCache` and `decode`.

    Its tokenizer is `model.tokenizer`; None if a local folder has none. Only safetensors are read.
    transformers shows the progress of a download.

    Args:
        id_or_path: "reference" (the small trained model in this package), a Hugging Face id, or a folder.
        dtype: None is float32 on a CPU and the checkpoint's own type elsewhere.
        device: None is the first GPU if there is one, else the CPU.
        device_map: instead of `device`: "auto", "balanced" or a dictionary spread the layers over several
            GPUs, as transformers does; needs the package accelerate.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run model code that comes with the checkpoint. Off unless you ask.
        tensor_parallel: share every layer's heads among the processes that torchrun started, one per GPU,
            or on CPUs without one; needs the package accelerate (`kvsieve[parallel]`). Every process must do
            the same.

    Raises:
        UserError: not found, not reachable, not safetensors, or a kind of model that cannot be served.
    """
    if tensor_parallel:
        parallel.check_launch(device, device_map)
    if device_map is not None:
        _check_device_map(device)
    target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = str(REFERENCE_FOLDER) if id_or_path == REFERENCE else str(Path(id_or_path).expanduser())
    hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if Path(path).is_dir():
        _check_folder(id_or_path, Path(path))
    else:
        _check_hub(id_or_path, revision)
    try:
        config = AutoConfig.from_pretrained(path, **hub)
        check_config(config)
        if tensor_parallel:
            parallel.check_split(config)
        placed = parallel.split_arguments(config) if tensor_parallel else {"device_map": device_map}
        model: Any = AutoModelForCausalLM.from_pretrained(
            path,
            dtype=_dtype(dtype, target),
            use_safetensors=True,
            attn_implementation="eager",
            **placed,
            **hub,
        )
        tokenizer = AutoTokenizer.from_pretrained(path, **hub) if _has_tokenizer(Path(path)) else None
    except UserError:
        raise
    except (OSError, ValueError, KeyError, ImportError, SafetensorError) as error:
        raise UserError(_why_not_loaded(id_or_path, error)) from error
    prepare(model.to(target) if device_map is None and not tensor_parallel else model)
    model.tokenizer = tokenizer
    return cast(PreTrainedModel, model)


def prepare(model: Model) -> Model:
    """Make an existing Hugging Face model ready in place: evaluation mode, attention through kvsieve.

    Without a KVCache the model computes what it did before. `model.generate` is transformers' own, and looks
    after what a KVCache must know (`kvsieve.hf.generate`).

    Raises:
        UserError: its attention cannot be reached or cannot be served by a policy.
    """
    check_config(model.config)
    untyped: Any = model
    name = type(model).__name__
    if not type(model)._can_set_attn_implementation():
        raise UserError(_no_interface(name))
    _check_devices(model)
    interface.register()
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:
        raise UserError(_no_interface(name))
    if hasattr(type(model), "generate"):
        untyped.generate = types.MethodType(generate.generate, model)
    untyped.eval()
    return model


def check_config(config: PreTrainedConfig) -> None:
    """Refuse, before any weight is read, a model that cannot be served.

    Raises:
        UserError: encoder-decoder, no attention interface, or multi-head latent attention.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(f"{kind} is an encoder-decoder model; kvsieve decodes causal language models")
    text = config.get_text_config(decoder=True)
    if getattr(text, "kv_lora_rank", None):
        raise UserError(
            f"{kind} uses multi-head latent attention (MLA): its cache holds compressed latents, not the "
            "keys and values that policies choose from. To run it dense, load it with transformers and use "
            "it as it is, with transformers' own cache"
        )
    model_class: Any = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if model_class is not None and not model_class._can_set_attn_implementation():
        raise UserError(_no_interface(model_class.__name__))


def _no_interface(name: str) -> str:
    return (
        f"{name} computes its attention inside the model, not through transformers' attention interface, so "
        "no policy can reach it: use it with transformers' own cache. Models with the interface: llama, "
        "mistral, qwen, gemma, phi, gpt_neox, olmo and most others (docs/models.md)"
    )


def _check_device_map(device: str | torch.device | None) -> None:
    if device is not None:
        raise UserError(f"device {str(device)!r} and a device_map were given: leave one out")
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("device_map needs the package accelerate: pip install accelerate")


def _check_devices(model: PreTrainedModel) -> None:
    """Layers that borrow keys find the cache through them, which a move to another device would undo."""
    places = set(getattr(model, "hf_device_map", {}).values())
    if len(places) > 1 and getattr(model.config.get_text_config(decoder=True), "num_kv_shared_layers", None):
        raise UserError(
            f"{type(model).__name__} shares keys and values between layers, and its layers are on several "
            f"devices ({', '.join(sorted(map(str, places)))}): load it on one"
        )


def _check_folder(name: str, folder: Path) -> None:
    """Refuse a local folder that could not be loaded, saying what it lacks."""
    if not (folder / "config.json").exists():
        raise UserError(f"model {name!r}: the folder has no config.json")
    try:
        json.loads((folder / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"model {name!r}: its config.json is not JSON: {error}") from error
    if not any(folder.glob("*.safetensors")):
        found = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in folder.glob(pattern))
        pickles = (
            f", only {', '.join(found)}: a pickle can run any code when it is read, so kvsieve does not. "
            "Convert it once where you trust it: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)"
        )
        raise UserError(f"model {name!r}: the folder has no weights as safetensors{pickles if found else ''}")


def _check_hub(name: str, revision: str | None) -> None:
    """Say at once, not after many retries, that a model is neither here nor can be had."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise UserError(f"model {name!r}: no such folder")
    from huggingface_hub import constants, try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        if isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            return
    except HFValidationError as error:
        raise UserError(f"model {name!r}: no such folder, and no name for the hub: {error}") from error
    reason = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else _unreachable(constants.ENDPOINT)
    if reason:
        raise UserError(
            f"model {name!r} is not {REFERENCE!r}, not a folder here, not in the local copy of the hub "
            f"({constants.HF_HUB_CACHE}), and {constants.ENDPOINT} was not asked or not reached: {reason}"
        )


def _unreachable(address: str) -> str | None:
    """Why an address does not answer; None if it does, were it with an error."""
    try:
        request = urllib.request.Request(address, method="HEAD")
        with urllib.request.urlopen(request, timeout=_SECONDS_TO_REACH_THE_HUB):
            return None
    except urllib.error.HTTPError:
        return None
    except OSError as error:
        reason = getattr(error, "reason", error)
        return (
            None if isinstance(reason, ssl.SSLError) else str(reason)
        )  # the hub's client may know the certificate


def _has_tokenizer(path: Path) -> bool:
    """Whether to ask for a tokenizer: always on the hub, and in a folder that has the files of one."""
    if not path.is_dir():
        return True
    return any(any(path.glob(pattern)) for pattern in ("*token*.json", "vocab*", "*.model", "*.tiktoken"))


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> str | torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise UserError(
                f"dtype {dtype!r} is not a floating-point type. Legal: float32, bfloat16, float16, auto"
            )
        return found
    return dtype


def _why_not_loaded(name: str, error: Exception) -> str:
    if "trust_remote_code" in str(error):
        return (
            f"model {name!r} comes with code of its own, which runs on your machine: read it, and if you "
            "trust it, ask for it with trust_remote_code=True"
        )
    if not Path(name).is_dir():
        return f"model {name!r} could not be had from the Hugging Face hub: {str(error).splitlines()[0]}"
    return f"model {name!r} could not be loaded: {error}"
