"""Sizes to measure at: attention heads, and whole models of which only the configuration is needed."""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from transformers import LlamaConfig, PreTrainedConfig, Qwen3Config

from ..errors import UserError, unknown


class Heads(NamedTuple):
    """One layer's attention: H query heads, K KV heads, D channels each."""

    query: int
    kv: int
    size: int

    @property
    def group(self) -> int:
        return self.query // self.kv

    def __str__(self) -> str:
        return f"{self.query}x{self.kv}x{self.size}"


class ModelShape(NamedTuple):
    config: type[PreTrainedConfig]
    settings: dict[str, Any]


SHAPES = {
    "llama-2-7b": ModelShape(
        LlamaConfig,
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
        },
    ),
    "llama-3-8b": ModelShape(
        LlamaConfig,
        {
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
    ),
    "qwen3-8b": ModelShape(
        Qwen3Config,
        {
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
    ),
    "tiny": ModelShape(
        LlamaConfig,
        {
            "vocab_size": 1024,
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
        },
    ),
}


def model_config(name: str, layers: int | None, positions: int) -> PreTrainedConfig:
    """The configuration of a shape, cut to `layers` layers and stretched to `positions` positions.

    Raises:
        UserError: no such shape, or it has not so many layers.
    """
    if name not in SHAPES:
        raise UserError(unknown("shape", name, SHAPES))
    shape = SHAPES[name]
    full = shape.settings["num_hidden_layers"]
    if layers is not None and not 1 <= layers <= full:
        raise UserError(f"--layers must be from 1 to the {full} of {name}, not {layers}")
    # Given, not changed afterwards: the layer types of some families are made from the number of layers.
    settings = shape.settings | {"num_hidden_layers": layers or full, "max_position_embeddings": positions}
    settings |= {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    return shape.config(**settings)


def heads_of(config: PreTrainedConfig) -> Heads:
    text = config.get_text_config(decoder=True)
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    return Heads(text.num_attention_heads, kv, size)


def check_positions(config: PreTrainedConfig, name: str, needed: int) -> None:
    """Raise UserError if a model has fewer positions."""
    positions = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if positions is not None and needed > positions:
        raise UserError(f"--context with its steps needs {needed} positions, and {name} has {positions}")


def read_heads(text: str) -> Heads:
    """`32x8x128`, query heads x KV heads x head size.

    Raises:
        UserError: not of that form, or the query heads do not fall into equal groups.
    """
    parts = text.lower().split("x")
    if len(parts) != 3 or not all(part.isdigit() and int(part) > 0 for part in parts):
        raise UserError(f"--heads is query heads x KV heads x head size, such as 32x8x128, not {text!r}")
    heads = Heads(*map(int, parts))
    if heads.query % heads.kv:
        raise UserError(f"--heads {text}: {heads.query} query heads do not share {heads.kv} KV heads equally")
    return heads


def read_sizes(option: str, text: str) -> list[int]:
    """`1,16` or `4k,32k` (k is 1024) as numbers.

    Raises:
        UserError: something in it is not a positive whole number.
    """
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(k?)", part.strip().lower())
        if match is None or int(match[1]) == 0:
            raise UserError(
                f"{option} is one or more numbers from 1, such as 1,16 or 4k,32k (k is 1024), not {text!r}"
            )
        sizes.append(int(match[1]) * (1024 if match[2] else 1))
    return sorted(set(sizes))
