"""Prompts in every form a user has them, as token ids; refused before any work if they cannot be decoded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from transformers import PreTrainedModel

from .errors import UserError
from .token_tables import is_id, row_values, shown, table, whole_numbers, without_padding

# One text or several; token ids, one sequence per row; a 2-D integer tensor; a tokenizer's BatchEncoding.
Prompts = str | Sequence[str] | Sequence[Sequence[int]] | torch.Tensor | Mapping[str, Any]

_ROWS = "one text, a list of texts, or one list of token ids per row: [[1, 2, 3]]"
_IDS, _MASK = "input_ids", "attention_mask"
# A tokenizer may return these too; none of them changes which tokens a text is made of.
_HARMLESS = {
    "token_type_ids",
    "special_tokens_mask",
    "offset_mapping",
    "length",
    "num_truncated_tokens",
    "overflowing_tokens",
    "overflow_to_sample_mapping",
}


def token_lists(model: PreTrainedModel, prompts: Prompts, what: str = "prompt") -> list[list[int]]:
    """Prompts in any accepted form as one list of token ids per row, without padding.

    Args:
        prompts: one text or several; token ids, one sequence per row; a tensor `[B, P]` without padding; or
            what a tokenizer returns, whose `attention_mask` says which tokens are padding.
        what: what messages call a row. A "continuation" is tokenised without the tokens that begin a text.

    Raises:
        UserError: no row, or an empty one; text for a model without a tokenizer, or that is not Unicode;
            anything but token ids, or an id outside the vocabulary; padding that no mask names. It names the
            row.
    """
    rows = _rows(model, prompts, what)
    if not rows:
        raise UserError(f"no {what} was given")
    vocabulary = cast(int, model.get_input_embeddings().num_embeddings)
    return [_token_ids(model, row, f"{what} {b}", what, vocabulary) for b, row in enumerate(rows)]


def _rows(model: PreTrainedModel, prompts: Any, what: str) -> Sequence[Any]:
    """The rows, each still in any form."""
    if isinstance(prompts, str):
        return [prompts]
    if isinstance(prompts, Mapping):
        return _rows_of_mapping(model, prompts, what)
    if isinstance(prompts, torch.Tensor | np.ndarray):
        rows = table(prompts, f"the {what}s")
        _refuse_padding(model, rows, what)
        return rows
    if isinstance(prompts, bytes | bytearray):
        raise UserError(f"the {what} is {type(prompts).__name__}, not text: decode it, as in prompt.decode()")
    if not isinstance(prompts, Sequence):
        raise UserError(f"the {what}s are {shown(prompts)}; give {_ROWS}")
    if len(prompts) > 0 and (is_id(prompts[0]) or isinstance(prompts[0], bool | float)):
        raise UserError(
            f"the {what}s are a flat list that begins with {shown(prompts[0])}; give one list of token ids "
            "per row: [[1, 2, 3]], not [1, 2, 3]"
        )
    return prompts


def _rows_of_mapping(model: PreTrainedModel, mapping: Mapping[Any, Any], what: str) -> list[list[Any]]:
    """The rows of what a tokenizer returned, padding removed."""
    names = list(mapping)
    if _IDS not in names:
        found = ", ".join(shown(name) for name in names[:8]) or "nothing"
        raise UserError(f"the {what}s are a {type(mapping).__name__} with {found}; it needs {_IDS!r}")
    if unknown := [name for name in names if name not in {_IDS, _MASK} | _HARMLESS]:
        raise UserError(
            f"the {what}s come with {', '.join(map(shown, unknown[:8]))}, which kvsieve does not use: leave "
            "it out, or call model.generate(..., past_key_values=cache)"
        )
    rows = table(mapping[_IDS], _IDS)
    mask = mapping[_MASK] if _MASK in names else None
    if mask is None:
        _refuse_padding(model, rows, what)
    else:
        rows = without_padding(rows, table(mask, _MASK), what)
    if what != "prompt":
        _refuse_beginnings(model, rows, what)
    return rows


def _refuse_padding(model: PreTrainedModel, rows: list[list[Any]], what: str) -> None:
    """Raise UserError for rows without a mask that begin or end with a pad token which cannot be meant."""
    ends = {*end_tokens(model, None), *_special_ids(model, "eos_token_id")}
    pads = _special_ids(model, "pad_token_id") - ends
    for b, row in enumerate(rows):
        for side, token in (("begins", row[:1]), ("ends", row[-1:])):
            if token and is_id(token[0]) and int(token[0]) in pads:
                raise UserError(
                    f"{what} {b} {side} with the pad token {int(token[0])}, and no mask says what is "
                    f"padding: give {{{_IDS!r}: ids, {_MASK!r}: mask}}, as a tokenizer returns it, or lists "
                    "of token ids without padding"
                )


def _refuse_beginnings(model: PreTrainedModel, rows: list[list[Any]], what: str) -> None:
    """Raise UserError if a tokenizer put the token that begins a text before what continues one."""
    begins = _special_ids(model, "bos_token_id")
    for b, row in enumerate(rows):
        if row and is_id(row[0]) and int(row[0]) in begins:
            raise UserError(
                f"{what} {b} begins with {int(row[0])}, the token that begins a text: use "
                "tokenizer(texts, add_special_tokens=False), or give the texts"
            )


def _token_ids(model: PreTrainedModel, row: Any, name: str, what: str, vocabulary: int) -> list[int]:
    """One row, text or token ids, as ids of the vocabulary."""
    if isinstance(row, str):
        values = _tokenised(model, row, name, what)
    elif isinstance(row, bytes | bytearray):
        raise UserError(f"{name} is {type(row).__name__}, not text: decode it, as in prompt.decode()")
    elif isinstance(row, Sequence | torch.Tensor | np.ndarray):
        values = row_values(row, name)
    else:
        raise UserError(f"{name} is {shown(row)}; give {_ROWS}")
    ids = []
    for place, value in enumerate(values):
        token: Any = value
        if isinstance(value, torch.Tensor) and value.ndim == 0:
            token = whole_numbers(value, f"{name}, token {place}", 0)
        if not is_id(token):
            raise UserError(f"{name}, token {place} is {shown(value)}; token ids are whole numbers")
        if not 0 <= token < vocabulary:
            legal = f"0 to {vocabulary - 1}"
            raise UserError(
                f"{name} has a token id outside the vocabulary ({legal}): {shown(token)} at token {place}"
            )
        ids.append(int(token))
    if not ids:
        raise UserError(f"{name} is empty: a model needs at least one token to start from")
    return ids


def _tokenised(model: PreTrainedModel, text: str, name: str, what: str) -> list[Any]:
    tokenizer: Any = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise UserError(
            f"{name} is text, but the model has no tokenizer: give token ids, or set model.tokenizer"
        )
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{name} is not Unicode text: character {error.start} is the lone surrogate "
            f"{text[error.start]!a}; read the text with its own encoding"
        ) from None
    # A tokenizer may begin every text with a token of its own, but not what continues one.
    return cast(list[Any], tokenizer(text, add_special_tokens=what == "prompt")[_IDS]) if text else []


def _special_ids(model: PreTrainedModel, name: str) -> set[int]:
    """The ids that the model's configurations or its tokenizer have under this name."""
    config = model.config.get_text_config(decoder=True)
    holders = (config, getattr(model, "generation_config", None), getattr(model, "tokenizer", None))
    found = [getattr(holder, name, None) for holder in holders]
    return {int(token) for token in found if token is not None and is_id(token)}


def check_lengths(model: PreTrainedModel, rows: list[list[int]], new_tokens: int, before: int = 0) -> None:
    """Raise UserError if a prompt, `before` tokens that it continues and its new tokens, of which the last is
    never fed, need more positions than the model has.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = before + max(map(len, rows))
    needed = longest + max(0, new_tokens - 1)
    if limit is not None and needed > limit:
        raise UserError(
            f"a prompt of {longest} tokens and {new_tokens} new ones need {needed} positions; "
            f"{type(model).__name__} has {limit} (max_position_embeddings)"
        )


def end_tokens(model: PreTrainedModel, eos_token_id: int | Sequence[int] | None) -> list[int]:
    """The tokens that end a row: those given, else the model's own.

    Raises:
        UserError: given, and not token ids.
    """
    if eos_token_id is None:
        generation = getattr(model, "generation_config", None)
        eos_token_id = getattr(generation, "eos_token_id", None)
        if eos_token_id is None:
            eos_token_id = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None)
    if eos_token_id is None:
        return []
    ends: list[Any] = list(eos_token_id) if isinstance(eos_token_id, list | tuple | set) else [eos_token_id]
    if wrong := [token for token in ends if not is_id(token)]:
        raise UserError(f"eos_token_id must be a token id or a list of them, not {shown(wrong[0])}")
    return [int(token) for token in ends]


def pad_token(model: PreTrainedModel, ends: list[int]) -> int:
    """The token that a row repeats once it has ended: the model's own, else an end token, else 0."""
    pad = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None)
    # Some checkpoints say -1, which no embedding has.
    return pad if pad is not None and pad >= 0 else (ends[0] if ends else 0)
