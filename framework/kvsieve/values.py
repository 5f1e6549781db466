"""A value of plain data (YAML, the command line, keyword arguments) as the type of the field that it is for.

Nothing is converted between kinds: `true`, `"16"` and `1.5` are no integers. An integer serves as a number, a
list as a tuple, a text as one of the words that a field allows.
"""

from __future__ import annotations

import enum
import functools
import json
import math
import numbers
import reprlib
import types
import typing
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import PurePath
from typing import Any, NamedTuple

import pydantic

Loc = tuple[str | int, ...]
NOTHING = object()
_MOST_MISTAKES_OF_A_VALUE = 20


class Mistake(NamedTuple):
    """Something wrong in plain data: where (keys and indexes from the top), what, and what was given."""

    loc: Loc
    message: str
    given: Any = NOTHING
    # Where it stands in a file, if that is better known than by loc.
    place: str | None = None

    def __str__(self) -> str:
        """`policies.0.sparq.k: must be an integer (got True)`."""
        where = ".".join(shortened(part) for part in self.loc)
        given = "" if self.given is NOTHING else f" (got {_SHORT.repr(self.given)})"
        return printable(f"{where + ': ' if where else ''}{self.message}{given}")


class _Refused(Exception):
    """A value is no plain data."""


def printable(text: str) -> str:
    """The text without what a terminal would obey."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def shortened(name: object, most: int = 80) -> str:
    text = str(name)
    return text if len(text) <= most else text[:most] + "..."


def read_value(kind: Any, given: Any, loc: Loc, mistakes: list[Mistake]) -> Any:
    """The value as `kind`; or NOTHING, with the reason in `mistakes`, at the item of a list that is wrong."""
    try:
        text = json.dumps(_plain(given))
    except _Refused as refused:
        mistakes.append(Mistake(loc, str(refused) or f"must be {describe(kind)}", given))
        return NOTHING
    try:
        # As JSON, strictly: a list may become a tuple, but "16" never a number.
        return _adapter(kind).validate_json(text, strict=True)
    except pydantic.ValidationError as error:
        found = {_item(kind, given, detail["loc"]) for detail in error.errors()[:_MOST_MISTAKES_OF_A_VALUE]}
        for items in sorted(found):
            message = f"must be {describe(_kind_of_item(kind, items))}{_hint(kind, given)}"
            mistakes.append(Mistake((*loc, *items), message, _pick(given, items)))
        return NOTHING


def is_list(kind: Any) -> bool:
    """Whether a value of this type is itself a list."""
    if typing.get_origin(kind) in (typing.Union, types.UnionType, typing.Annotated):
        return any(is_list(part) for part in typing.get_args(kind))
    origin = typing.get_origin(kind) or kind
    return isinstance(origin, type) and issubclass(origin, Sequence | Set) and not issubclass(origin, str)


def describe(kind: Any) -> str:  # noqa: PLR0911
    """Say in words what is legal: `an integer`, `'softmax' or 'logits'`, `a list of integers`."""
    origin, parts = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is typing.Annotated:
        return describe_limited(parts[0], parts[1:])
    if origin is typing.Literal:
        return _alternatives(map(repr, parts))
    if origin in (typing.Union, types.UnionType):
        return _alternatives(map(describe, parts))
    if not isinstance(origin, type):
        return str(kind)
    if issubclass(origin, enum.Enum):
        return _alternatives(repr(member.value) for member in origin)
    if issubclass(origin, PurePath):
        return "a path"
    if is_list(kind):
        return _describe_list(parts)
    if issubclass(origin, Mapping | pydantic.BaseModel):
        return "`key: value` pairs"
    return _ONE.get(origin, f"a {origin.__name__}")


def describe_limited(kind: Any, limits: Iterable[Any]) -> str:
    """Say in words what is legal within bounds: `an integer from 0 to 7`, `a number above 0`."""
    each = [part for limit in limits for part in getattr(limit, "metadata", [limit])]
    bounds = {
        name: getattr(limit, name)
        for limit in each
        for name in ("ge", "gt", "le", "lt", "min_length")
        if getattr(limit, name, None) is not None
    }
    if "min_length" in bounds:
        return f"{describe(kind)}, not empty"
    if {"ge", "le"} <= bounds.keys():
        return f"{describe(kind)} from {bounds['ge']} to {bounds['le']}"
    words = {"ge": "of at least", "gt": "above", "le": "of at most", "lt": "below"}
    return describe(kind) + "".join(f" {words[name]} {bound}" for name, bound in bounds.items())


def _describe_list(parts: tuple[Any, ...]) -> str:
    count = f"{len(parts)} " if parts and Ellipsis not in parts and len(parts) > 1 else ""
    items = {part for part in parts if part is not Ellipsis}
    return f"a list of {count}{_SEVERAL.get(items.pop(), 'values') if len(items) == 1 else 'values'}"


_ONE = {bool: "true or false", int: "an integer", float: "a number", str: "text", type(None): "null"}
_SEVERAL = {bool: "true or false", int: "integers", float: "numbers", str: "texts"}
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 80
_SHORT.maxlevel = 3


def _alternatives(words: Iterable[str]) -> str:
    *others, last = dict.fromkeys(words)
    return f"{', '.join(others)} or {last}" if others else last


def _hint(kind: Any, given: Any) -> str:
    """A number where text is due was meant as text: a file name, a commit."""
    is_number = isinstance(given, bool | int | float)
    return ": put it in quotes" if kind in (str, str | None) and is_number else ""


def _plain(value: Any) -> Any:  # noqa: PLR0911
    """Plain data, with numpy's numbers as Python's own."""
    if value is None or isinstance(value, bool | str):
        return value
    if isinstance(value, numbers.Integral):
        if not -(2**63) <= int(value) < 2**63:
            raise _Refused("an integer of more than 64 bits")
        return int(value)
    if isinstance(value, numbers.Real):
        if math.isnan(value):
            raise _Refused
        return float(value)
    if isinstance(value, enum.Enum):
        return _plain(value.value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping) and all(isinstance(key, str | int) for key in value):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [_plain(item) for item in value]
    raise _Refused


@functools.cache
def _adapter(kind: Any) -> pydantic.TypeAdapter[Any]:
    return pydantic.TypeAdapter(kind, config=pydantic.ConfigDict(arbitrary_types_allowed=True))


def _item(kind: Any, given: Any, loc: tuple[Any, ...]) -> Loc:
    """The indexes of the wrong item, from pydantic's place, in which the names of alternatives stand too."""
    items: Loc = ()
    for part in loc:
        # An item that is missing is a mistake of the list.
        if isinstance(part, int) and is_list(kind) and part < len(given):
            items, kind, given = (*items, part), _kind_of_item(kind, (part,)), list(given)[part]
    return items


def _kind_of_item(kind: Any, items: Loc) -> Any:
    for _ in items:
        if typing.get_origin(kind) in (typing.Union, types.UnionType, typing.Annotated):
            kind = next((part for part in typing.get_args(kind) if is_list(part)), Any)
        kind = (*typing.get_args(kind), Any)[0]
    return kind


def _pick(given: Any, items: Loc) -> Any:
    for index in items:
        given = list(given)[typing.cast(int, index)]
    return given
