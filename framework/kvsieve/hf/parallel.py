"""Tensor parallel: each process that torchrun started holds a share of every layer's heads.

transformers splits the weights (its tensor-parallel plans) and adds up what the shares contribute. A policy
sees the local KV heads and decides for them alone, because it decides per KV head anyway; every process sees
the same logits, and so chooses the same tokens.
"""

from __future__ import annotations

import importlib.util
import os
from typing import TYPE_CHECKING, Any, Literal

from ..errors import UserError

if TYPE_CHECKING:  # transformers' models take seconds to import, and listing policies comes through here
    from transformers import PreTrainedConfig, PreTrainedModel

_KEY_PROJECTIONS = ("k_proj", "qkv_proj", "query_key_value")


def is_split(model: PreTrainedModel) -> bool:
    """Whether this process holds a share of the model only."""
    return (getattr(model, "_tp_size", None) or 1) > 1


def check_launch(device: object, device_map: object) -> None:
    """Refuse tensor parallel where it cannot begin.

    Raises:
        UserError: not started by torchrun, without accelerate, or with a device that is given.
    """
    if device is not None or device_map is not None:
        raise UserError(
            "tensor_parallel gives every process a device of its own: leave out device and device_map"
        )
    if missing := [name for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE") if name not in os.environ]:
        raise UserError(
            f"tensor_parallel needs several processes, and {', '.join(missing)} is not set: start them with "
            "torchrun --nproc-per-node <GPUs> <script>, or torchrun --nproc-per-node <GPUs> -m kvsieve "
            "compare ..."
        )
    if importlib.util.find_spec("accelerate") is None:
        raise UserError("tensor_parallel needs the package accelerate: pip install 'kvsieve[parallel]'")


def check_split(config: PreTrainedConfig) -> None:
    """Refuse, before any weight is read, a model that cannot be split over the processes.

    Raises:
        UserError: transformers has no plan for it, or its KV heads cannot be shared out evenly.
    """
    text = config.get_text_config(decoder=True)
    plan = getattr(text, "base_model_tp_plan", None)
    if not plan:
        raise UserError(
            f"transformers has no tensor-parallel plan for {config.model_type}: load it on one device, or "
            "with device_map"
        )
    size = int(os.environ["WORLD_SIZE"])
    splits = any(
        name.rpartition(".")[2] in _KEY_PROJECTIONS and style == "colwise" for name, style in plan.items()
    )
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    if splits and heads % size:
        raise UserError(
            f"{config.model_type} has {heads} KV heads, which {size} processes cannot share evenly: start as "
            f"many processes as divide {heads}"
        )


def split_arguments(config: PreTrainedConfig) -> dict[str, Any]:
    """Arguments of `from_pretrained` that ask for transformers' own plan for the model.

    Before 5.21 transformers cannot split a vocabulary that the processes do not divide: there the plan leaves
    it out, and every process holds all of the embeddings and of the output layer.
    """
    import transformers
    from transformers import AutoModelForCausalLM
    from transformers.distributed.configuration_utils import DistributedConfig

    size = int(os.environ["WORLD_SIZE"])
    plan: dict[str, str] | Literal["auto"] = "auto"
    older = tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 21)
    if older and config.get_text_config(decoder=True) is config and config.vocab_size % size:
        untyped: Any = AutoModelForCausalLM
        prefix = untyped._model_mapping[type(config)].base_model_prefix
        shared = config.base_model_tp_plan or {}
        plan = {f"{prefix}.{name}": style for name, style in shared.items() if name != "embed_tokens"}
    return {"distributed_config": DistributedConfig(tp_size=size, tp_plan=plan)}
