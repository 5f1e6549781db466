"""An entry of plain data, a name or `{name: {parameter: value}}`, and the combinations of values it stands for."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
import typing
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any, NamedTuple

from . import plugins
from .errors import UserError, unknown
from .values import NOTHING, Loc, Mistake, is_list, read_value, shortened

if typing.TYPE_CHECKING:
    from .plugins import Registered

COMPRESSION = "compression"
MOST_COMBINATIONS = 1000
_FRACTION = re.compile(r"\d{1,9}(/\d{1,9})?|\d{0,9}\.\d{0,20}([eE]-?\d{1,2})?|\d{1,9}[eE]-?\d{1,2}")
# Reads the entry of a nested policy.
ReadNested = Callable[[Any, Loc], list[Any]]


class Field(NamedTuple):
    """A parameter of a policy or task class."""

    kind: Any
    required: bool
    is_policy: bool


@functools.cache
def fields(cls: Any) -> dict[str, Field]:
    """The parameters of a policy or task class by name."""
    from .policy import Policy

    hints, missing = typing.get_type_hints(cls, include_extras=True), dataclasses.MISSING
    return {
        field.name: Field(
            kind=hints[field.name],
            required=field.default is missing and field.default_factory is missing,
            is_policy=hints[field.name] is Policy,
        )
        for field in dataclasses.fields(cls)
        if field.init
    }


def can_compress(cls: Any) -> bool:
    """Whether this class is a policy that says what parameters a compression means."""
    from .policy import Policy

    if not issubclass(cls, Policy):
        return False
    ours: Any = Policy.for_compression
    return cls is Policy or getattr(cls.for_compression, "__func__", None) is not ours.__func__


def fraction(given: Any) -> Fraction:
    """`1/8`, `0.125` or `1` as a fraction of dense attention's bytes.

    Raises:
        UserError: not a fraction in (0, 1].
    """
    text = "" if isinstance(given, bool) else str(given).replace(" ", "")
    try:
        ratio = Fraction(text) if len(text) < 40 and _FRACTION.fullmatch(text) else Fraction(0)
    except (ValueError, ZeroDivisionError):
        ratio = Fraction(0)
    if not 0 < ratio <= 1:
        raise UserError("must be a fraction of dense attention's bytes, above 0 and up to 1, such as 1/8")
    return ratio


def named(
    what: str, entry: Any, loc: Loc, registered: Mapping[str, Registered], mistakes: list[Mistake]
) -> tuple[type, dict[str, Any], Loc] | None:
    """Class, parameters and their place of `name` or `{name: parameters}`."""
    if isinstance(entry, str):
        name, parameters = entry, None
    elif isinstance(entry, Mapping) and len(entry) == 1:
        ((name, parameters),) = entry.items()
        loc = (*loc, str(name))
    else:
        many = isinstance(entry, Mapping) and len(entry) > 1
        hint = " (indent its parameters below it)" if many else ""
        mistakes.append(Mistake(loc, f"a {what} is a name or one name with its parameters{hint}", entry))
        return None
    if name not in registered:
        failed = "".join(f"; not loaded: {problem}" for problem in plugins.problems())
        mistakes.append(Mistake(loc, unknown(what, shortened(name), registered) + failed))
        return None
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, Mapping):
        mistakes.append(Mistake(loc, f"the parameters of {name} are `key: value` pairs", parameters))
        return None
    return registered[name].cls, dict(parameters), loc


def combinations(
    cls: Any,
    parameters: Mapping[str, Any],
    loc: Loc,
    mistakes: list[Mistake],
    *,
    sweep: bool,
    read_nested: ReadNested | None = None,
) -> list[dict[str, Any]]:
    """Every combination of those values that are right; the rest goes to `mistakes`."""
    known = fields(cls)
    ways: dict[str, list[Any]] = {}
    for key, given in sorted(parameters.items(), key=lambda item: item[0] == COMPRESSION):  # varies fastest
        at = (*loc, str(key))
        reason = _why_unknown(cls, key)
        if reason is not None:
            mistakes.append(Mistake(at, reason))
            continue
        field = known.get(key)
        several = [(given, at)]
        if sweep and isinstance(given, list) and (field is None or not is_list(field.kind)):
            several = [(item, (*at, i)) for i, item in enumerate(given)]
            if not given:
                mistakes.append(Mistake(at, "an empty list sweeps over nothing", given))
        ways[key] = []
        for item, place in several:
            ways[key] += _read(field, item, place, mistakes, read_nested)
            if len(ways[key]) > MOST_COMBINATIONS:
                break
    for key, field in known.items():
        if field.required and key not in parameters:
            mistakes.append(Mistake((*loc, key), "must be given"))
    ways = {key: values for key, values in ways.items() if values}
    if math.prod(map(len, ways.values())) > MOST_COMBINATIONS:
        mistakes.append(Mistake(loc, f"its lists make more than {MOST_COMBINATIONS} combinations"))
        return []
    return [dict(zip(ways, values, strict=True)) for values in itertools.product(*ways.values())]


def _why_unknown(cls: Any, key: str) -> str | None:
    """Why this class has no such parameter; None if it has."""
    from .policy import Policy

    known, compresses = fields(cls), can_compress(cls)
    if key in known or (key == COMPRESSION and compresses):
        return None
    if key == COMPRESSION and issubclass(cls, Policy):
        legal = ", ".join(known) or "none"
        return f"{name_of(cls)} cannot be asked for a compression; its parameters: {legal}"
    legal_names = [*known, COMPRESSION] if compresses else known
    return unknown(f"parameter of {name_of(cls)}", shortened(key), legal_names)


def _read(
    field: Field | None, given: Any, loc: Loc, mistakes: list[Mistake], read_nested: ReadNested | None
) -> list[Any]:
    """What one value stands for: a nested policy may be several. Without a field it is the compression."""
    if field is None:
        try:
            return [fraction(given)]
        except UserError as error:
            mistakes.append(Mistake(loc, str(error), given))
            return []
    if field.is_policy and read_nested is not None:
        return read_nested(given, loc)
    value = read_value(field.kind, given, loc, mistakes)
    return [] if value is NOTHING else [value]


def name_of(cls: Any) -> str:
    return getattr(cls, "name", "") or cls.__name__
