"""Prompts in every form a user has them, as token ids; refused before any work if they cannot be decoded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from .errors import UserError

Prompts = str | Sequence[str] | Sequence[Sequence[int]] | torch.Tensor


def token_lists(model: PreTrainedModel, prompts: Prompts, what: str = "prompt") -> list[list[int]]:
    """Prompts in any accepted form as one list of token ids per row.

    Raises:
        UserError: none, or an empty one; text for a model without a tokenizer; an id outside the vocabulary.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    given: list[Any] = prompts.tolist() if isinstance(prompts, torch.Tensor) else list(prompts)
    tokenizer: Any = getattr(model, "tokenizer", None)
    rows = []
    for b, prompt in enumerate(given):
        if isinstance(prompt, str) and tokenizer is None:
            raise UserError(
                f"{what} {b} is text, but the model has no tokenizer: give token ids, or set model.tokenizer"
            )
        ids = prompt
        if isinstance(
            prompt, str
        ):  # a tokenizer may begin every text with a token of its own; not what comes after one
            ids = tokenizer(prompt, add_special_tokens=what == "prompt")["input_ids"] if prompt else []
        rows.append([int(token) for token in ids])
        if not rows[-1]:
            raise UserError(f"{what} {b} is empty: a model needs at least one token to start from")
        size = cast(int, model.get_input_embeddings().num_embeddings)
        if not 0 <= min(rows[-1]) <= max(rows[-1]) < size:
            raise UserError(f"{what} {b} has a token id outside the vocabulary (0 to {size - 1})")
    if not rows:
        raise UserError(f"no {what} was given")
    return rows


def check_lengths(model: PreTrainedModel, rows: list[list[int]], new_tokens: int) -> None:
    """Raise UserError if a prompt and its new tokens need more positions than the model has."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(map(len, rows))
    if limit is not None and longest + new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and {new_tokens} new ones need {longest + new_tokens} positions; "
            f"{type(model).__name__} has {limit} (max_position_embeddings)"
        )


def end_tokens(model: PreTrainedModel, eos_token_id: int | Sequence[int] | None) -> list[int]:
    if eos_token_id is None:
        generation = getattr(model, "generation_config", None)
        eos_token_id = getattr(generation, "eos_token_id", None)
        if eos_token_id is None:
            eos_token_id = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None)
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)


def pad_token(model: PreTrainedModel, ends: list[int]) -> int:
    pad = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None)
    return pad if pad is not None else (ends[0] if ends else 0)
