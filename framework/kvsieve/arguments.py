"""Arguments of the public functions that are whole numbers, checked before any work."""

from __future__ import annotations

from numbers import Integral
from typing import Any, TypeGuard

from .errors import UserError


def is_whole(value: Any) -> TypeGuard[int]:
    """Whether a value is a whole number, of Python or of numpy; True and False are none."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def whole(name: str, value: object, least: int, of: str = "") -> int:
    """Return a whole number of at least `least` (of so many `of`) as Python has them.

    Raises:
        UserError: it is none.
    """
    if not is_whole(value) or value < least:
        raise UserError(f"{name} must be a whole number{of and ' of '}{of}, at least {least}, not {value!r}")
    return int(value)
