"""Models: load one by name or path, or make one ready that is already there; refuse what cannot work, with the reason."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig, PreTrainedModel

from . import attention
from .cache import ATTENTION
from .errors import UserError

REFERENCE = "reference"
_REFERENCE_FOLDER = Path(__file__).parent / "reference_model" / "model"

Model = TypeVar("Model", bound=PreTrainedModel)


def load(
    id_or_path: str,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """Load a causal language model, ready for `KVCache` and `decode`; its tokenizer is `model.tokenizer`.

    Args:
        id_or_path: "reference" (the small trained model in this package), a Hugging Face id, or a local folder.
        dtype: None is float32 on a CPU and the checkpoint's own type elsewhere.
        device: None is the first GPU if there is one, else the CPU.
        revision: branch, tag or commit on the hub.
        trust_remote_code: run model code that comes with the checkpoint. Off unless you ask.

    Raises:
        UserError: not found, not reachable, not safetensors, or a kind of model that cannot be served.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = str(_REFERENCE_FOLDER) if id_or_path == REFERENCE else id_or_path
    hub: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        config = AutoConfig.from_pretrained(path, **hub)
        check_config(config)
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=_dtype(dtype, device), use_safetensors=True, attn_implementation="eager", **hub
        )
        tokenizer = AutoTokenizer.from_pretrained(path, **hub)
    except UserError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise UserError(_why_not_loaded(id_or_path, error)) from error
    prepare(model.to(device))
    model.tokenizer = tokenizer
    return model


def prepare(model: Model) -> Model:
    """Make an existing Hugging Face model ready, in place: evaluation mode, attention through kvsieve. Returns it.

    Without a KVCache the model computes what it did before.

    Raises:
        UserError: its attention cannot be reached or cannot be served by a policy.
    """
    check_config(model.config)
    name = type(model).__name__
    if not type(model)._can_set_attn_implementation():
        raise UserError(_no_interface(name))
    attention.register()
    model.set_attn_implementation(ATTENTION)
    if model.config._attn_implementation != ATTENTION:
        raise UserError(_no_interface(name))
    return model.eval()


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
            f"{kind} uses multi-head latent attention (MLA): its cache holds compressed latents, not the keys and values "
            "that policies choose from. Use transformers' own cache for it"
        )
    model_class = AutoModelForCausalLM._model_mapping.get(type(config), None)
    if model_class is not None and not model_class._can_set_attn_implementation():
        raise UserError(_no_interface(model_class.__name__))


def _no_interface(name: str) -> str:
    return (
        f"{name} computes its attention inside the model, not through transformers' attention interface, so no policy can "
        "reach it. Models with the interface: llama, mistral, qwen, gemma, phi, gpt_neox, olmo and most others"
    )


def _dtype(dtype: str | torch.dtype | None, device: torch.device) -> str | torch.dtype:
    if dtype is None:
        return torch.float32 if device.type == "cpu" else "auto"
    if isinstance(dtype, str) and dtype != "auto":
        found = getattr(torch, dtype, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise UserError(f"dtype {dtype!r} is not a floating-point type. Legal: float32, bfloat16, float16, auto")
        return found
    return dtype


def _why_not_loaded(id_or_path: str, error: Exception) -> str:
    path = Path(id_or_path)
    if path.is_dir():
        if not (path / "config.json").exists():
            return f"model {id_or_path!r}: the folder has no config.json"
        kind = json.loads((path / "config.json").read_text()).get("model_type")
        return f"model {id_or_path!r} (model_type {kind!r}) could not be loaded: {error}"
    if id_or_path.startswith((".", "/", "~")) or path.suffix or id_or_path.count("/") > 1:
        return f"model {id_or_path!r}: no such folder"
    return (
        f"model {id_or_path!r} is not {REFERENCE!r}, not a folder here, and could not be had from the Hugging Face hub "
        f"or its local copy: {str(error).splitlines()[0]}"
    )
