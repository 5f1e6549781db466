"""Load a model by name or folder, or prepare one that is there; refuse what cannot work, with the reason."""

from __future__ import annotations

import types
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from ..cache.kv_cache import ATTENTION
from ..errors import UserError
from ..reference_model import FOLDER as REFERENCE_FOLDER
from ..reference_model import NAME as REFERENCE
from . import checkpoints, generate, interface, parallel, placement

Model = TypeVar("Model", bound=PreTrainedModel)


def load(
    id_or_path: str | Path,
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
        UserError: before any weight is read, a device or type that cannot be used, or a model that is not
            found, not reachable, without safetensors or of a kind that cannot be served; then, broken or
            missing weights.
    """
    if tensor_parallel:
        parallel.check_launch(device, device_map)
    if device_map is not None:
        placement.check_device_map(device_map, device)
    if not isinstance(trust_remote_code, bool):
        raise UserError(f"trust_remote_code must be True or False, not {trust_remote_code!r}")
    target = placement.device(device)
    in_type = placement.dtype(dtype, target)
    folder, path = _located(id_or_path, revision)
    hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(path, **hub)
        check_config(config)
        if tensor_parallel:
            parallel.check_split(config)
        placed = parallel.split_arguments(config) if tensor_parallel else {"device_map": device_map}
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            path,
            output_loading_info=True,
            dtype=in_type,
            use_safetensors=True,
            attn_implementation="eager",
            **placed,
            **hub,
        )
        model, info = loaded
        checkpoints.check_complete(id_or_path, info["missing_keys"])
        has_tokenizer = folder is None or checkpoints.has_tokenizer(folder)
        tokenizer = AutoTokenizer.from_pretrained(path, **hub) if has_tokenizer else None
        if device_map is None and not tensor_parallel:
            model = model.to(target)
    except UserError:
        raise
    except Exception as error:  # a checkpoint is a stranger's files, and any of them may be wrong
        raise UserError(checkpoints.why_not_loaded(id_or_path, error)) from error
    prepare(model)
    model.tokenizer = tokenizer
    return cast(PreTrainedModel, model)


def config_of(id_or_path: str | Path) -> PreTrainedConfig:
    """The configuration of a model that `load` can serve, without its weights.

    Raises:
        UserError: as `load` before any weight is read.
    """
    _, path = _located(id_or_path, None)
    try:
        config = AutoConfig.from_pretrained(path)
    except Exception as error:
        raise UserError(checkpoints.why_not_loaded(id_or_path, error)) from error
    check_config(config)
    return cast(PreTrainedConfig, config)


def _located(id_or_path: str | Path, revision: str | None) -> tuple[Path | None, str]:
    """The folder of a model, None if it is on the hub; and what transformers is to load."""
    folder = REFERENCE_FOLDER if id_or_path == REFERENCE else checkpoints.locate(id_or_path, revision)
    return folder, str(id_or_path if folder is None else folder)


def prepare(model: Model) -> Model:
    """Make an existing Hugging Face model ready in place: evaluation mode, attention through kvsieve.

    Without a KVCache the model computes what it did before. `model.generate` is transformers' own, and looks
    after what a KVCache must know (`kvsieve.hf.generate`).

    Raises:
        UserError: its attention cannot be reached or cannot be served by a policy, or its weights have no
            numbers (the device "meta").
    """
    check_config(model.config)
    untyped: Any = model
    name = type(model).__name__
    if not type(model)._can_set_attn_implementation():
        raise UserError(_no_interface(name))
    _check_devices(model)
    if model.device.type == "meta" and not getattr(model, "hf_device_map", None):
        raise UserError(f"{name} is on the device 'meta', without numbers: load its weights first")
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
        UserError: encoder-decoder, no attention interface, multi-head latent attention, or layers whose heads
            differ in size or number.
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
    own = {"head_dim", "num_key_value_heads"} & set(getattr(text, "per_layer_attributes", None) or ())
    if own:
        name = min(own)  # head_dim, if it is among them
        values = sorted({getattr(layer, name) for layer in text.per_layer_config})
        raise UserError(
            f"{kind} gives each layer a {name} of its own ({', '.join(map(str, values))}): the parameters, "
            "budgets and calibrations of a policy are for one. Use it with transformers' own cache, or take "
            "a model whose layers are alike, such as Gemma 3 (docs/models.md)"
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


def _check_devices(model: PreTrainedModel) -> None:
    """Layers that borrow keys find the cache through them, which a move to another device would undo."""
    places = set(getattr(model, "hf_device_map", {}).values())
    if len(places) > 1 and getattr(model.config.get_text_config(decoder=True), "num_kv_shared_layers", None):
        raise UserError(
            f"{type(model).__name__} shares keys and values between layers, and its layers are on several "
            f"devices ({', '.join(sorted(map(str, places)))}): load it on one"
        )
