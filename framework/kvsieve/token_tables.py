"""Tables of token ids and their masks, in every container a user has them, as plain lists."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, cast

import numpy as np
import torch

from .arguments import is_whole
from .errors import UserError

_INTEGERS = {
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
}  # fmt: skip


def table(values: Any, name: str) -> list[list[Any]]:
    """A 2-D tensor or array, or a list of rows, as lists."""
    if isinstance(values, torch.Tensor | np.ndarray):
        return whole_numbers(values, name, 2)
    if not isinstance(values, list | tuple) or any(isinstance(row, str) for row in values):
        raise UserError(f"{name}: one list of whole numbers per row is needed, not {shown(values)}")
    if not all(isinstance(row, Sequence | torch.Tensor | np.ndarray) for row in values):
        raise UserError(f"{name} is flat; give one list per row, [[1, 2, 3]], as tokenizer([text]) does")
    return [row_values(row, f"row {b} of {name}") for b, row in enumerate(values)]


def row_values(row: Any, name: str) -> list[Any]:
    """One row, given as a sequence or as a 1-D tensor or array, as a list."""
    return whole_numbers(row, name, 1) if isinstance(row, torch.Tensor | np.ndarray) else list(row)


def whole_numbers(values: torch.Tensor | np.ndarray, name: str, dimensions: int) -> list[Any]:
    """The integers of a tensor or array with this many dimensions; bools pass, as they may be a mask."""
    if isinstance(values, torch.Tensor):
        whole = values.dtype in _INTEGERS and values.layout is torch.strided and not values.is_meta
    else:
        whole = values.dtype.kind in "iub"
    if not whole:
        raise UserError(f"{name}: whole numbers are needed, not {shown(values)}")
    if values.ndim != dimensions:
        form = ["one number", "[tokens]", "[rows, tokens]"][dimensions]
        hint = "; a single row is ids[None]" if values.ndim < dimensions else ""
        raise UserError(f"{name}: the shape must be {form}, not {list(values.shape)}{hint}")
    return cast(list[Any], values.tolist())


def without_padding(rows: list[list[Any]], mask: list[list[Any]], what: str) -> list[list[Any]]:
    """Each row's real tokens: the mask must be 1 for them, 0 for padding, and they must be contiguous."""
    if [len(row) for row in rows] != [len(row) for row in mask]:
        raise UserError(f"the {what}s' input_ids and attention_mask must be of one shape, [rows, tokens]")
    kept = []
    for b, (row, real) in enumerate(zip(rows, mask, strict=True)):
        for place, flag in enumerate(real):
            if not isinstance(flag, Integral | np.bool_) or flag not in (0, 1):
                raise UserError(
                    f"{what} {b}: attention_mask is {shown(flag)} at column {place}; it must be 0 or 1"
                )
        flags = [bool(flag) for flag in real]
        if not any(flags):
            raise UserError(f"{what} {b} is empty: its attention_mask is 0 everywhere")
        first, end = flags.index(True), len(flags) - flags[::-1].index(True)
        if not all(flags[first:end]):
            hole = flags.index(False, first)
            raise UserError(
                f"{what} {b}: attention_mask is 0 at column {hole}, between real tokens; padding stands "
                "before or after them"
            )
        kept.append(row[first:end])
    return kept


def is_id(value: object) -> bool:
    return is_whole(value)


def shown(value: object) -> str:
    """A value for a message: short, and with its type."""
    if value is None:
        return "None"
    if isinstance(value, torch.Tensor | np.ndarray):
        return f"{type(value).__name__} {value.dtype} {list(value.shape)}"
    if isinstance(value, bool | int | float | str | bytes):
        try:
            text = ascii(value)
        except ValueError:  # an int with more digits than Python prints
            text = "a very large number"
        return f"{text if len(text) <= 40 else text[:40] + '...'} ({type(value).__name__})"
    return f"of type {type(value).__name__}"
