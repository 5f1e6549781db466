"""An entry of plain data (a name or `{name: {parameter: value}}`) and the combinations that it stands for."""

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

COMPRESSION, MEMORY, TOKENS = "compression", "memory", "tokens"
# What may stand in place of parameters; each policy says which of them it can be asked for.
BUDGETS = (COMPRESSION, MEMORY, TOKENS)
MOST_COMBINATIONS = 1000
_FRACTION = re.compile(r"\d{1,9}(/\d{1,9})?|\d{0,9}\.\d{0,20}([eE]-?\d{1,2})?|\d{1,9}[eE]-?\d{1,2}")
# Reads the entry of a nested policy.
ReadNested = Callable[[Any, Loc], list[Any]]


class Budget(NamedTuple):
    """Asked for in place of parameters, which follow from it."""

    kind: str  # one of BUDGETS
    amount: Fraction  # of dense attention's bytes read, or of its cache's bytes; or a number of tokens

    def __str__(self) -> str:
        """`1/8`, `memory 1/4`, `tokens 512`."""
        return str(self.amount) if self.kind == COMPRESSION else f"{self.kind} {self.amount}"

    @classmethod
    def parse(cls, text: str) -> Budget:
        """The budget that is written so.

        Raises:
            ValueError: it is none.
        """
        kind, space, amount = text.rpartition(" ")
        return cls(kind if space else COMPRESSION, Fraction(amount))


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


def budgets(cls: Any) -> list[str]:
    """The budgets that this class can be asked for: it is a policy that says what parameters they mean."""
    from .policy import Policy

    if not issubclass(cls, Policy):
        return []
    if cls is Policy:
        return [COMPRESSION, MEMORY]
    answers = [kind for kind in BUDGETS if _own(cls, f"for_{kind}", Policy)]
    return [kind for kind in answers if kind not in fields(cls)]


def _own(cls: type, method: str, base: type) -> bool:
    """Whether a class has a method of its own in place of the base's."""
    ours, base_s = getattr(cls, method), getattr(base, method)
    return getattr(ours, "__func__", ours) is not getattr(base_s, "__func__", base_s)


def _amount(kind: str, given: Any) -> Fraction:
    """The amount of a budget: tokens, or a fraction such as `1/8`, `0.125` or `1`.

    Raises:
        UserError: not an integer from 1 on, or not a fraction in (0, 1].
    """
    if kind == TOKENS:
        if isinstance(given, bool) or not isinstance(given, int) or given < 1:
            raise UserError("must be a number of tokens, an integer of at least 1, such as 512")
        return Fraction(given)
    text = "" if isinstance(given, bool) else str(given).replace(" ", "")
    try:
        ratio = Fraction(text) if len(text) < 40 and _FRACTION.fullmatch(text) else Fraction(0)
    except (ValueError, ZeroDivisionError):
        ratio = Fraction(0)
    if not 0 < ratio <= 1:
        whole = "memory" if kind == MEMORY else "bytes"
        raise UserError(f"must be a fraction of dense attention's {whole}, above 0 and up to 1, such as 1/8")
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
    known, asked = fields(cls), [kind for kind in budgets(cls) if kind in parameters]
    for kind in asked[1:]:
        mistakes.append(Mistake((*loc, kind), f"stands beside {asked[0]}: one budget at a time"))
    ways: dict[str, list[Any]] = {}
    for key, given in sorted(parameters.items(), key=lambda item: item[0] in asked):  # varies fastest
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
            ways[key] += _read(key, field, item, place, mistakes, read_nested)
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

    known, answers = fields(cls), budgets(cls)
    if key in known or key in answers:
        return None
    if key not in BUDGETS or not issubclass(cls, Policy):
        return unknown(f"parameter of {name_of(cls)}", shortened(key), [*known, *answers])
    what = "a compression" if key == COMPRESSION else key
    why = ": it keeps every token" if key == MEMORY and _keeps_all(cls) else ""
    legal = f"its budgets: {', '.join(answers)}; " if answers else ""
    return (
        f"{name_of(cls)} cannot be asked for {what}{why}; {legal}its parameters: {', '.join(known) or 'none'}"
    )


def _keeps_all(cls: type) -> bool:
    """Whether a policy class, no wrapper of another, has none of the methods by which tokens are dropped."""
    from .policy import Policy
    from .wrapper import Wrapper

    dropping = ("keeps", "keeps_per_head", "cut", "cut_together", "plan")
    return not issubclass(cls, Wrapper) and not any(_own(cls, method, Policy) for method in dropping)


def _read(
    key: str,
    field: Field | None,
    given: Any,
    loc: Loc,
    mistakes: list[Mistake],
    read_nested: ReadNested | None,
) -> list[Any]:
    """Read one value: a nested policy may be several. Without a field it is a budget, `key` its kind."""
    if field is None:
        try:
            return [Budget(key, _amount(key, given))]
        except UserError as error:
            mistakes.append(Mistake(loc, str(error), given))
            return []
    if field.is_policy and read_nested is not None:
        return read_nested(given, loc)
    value = read_value(field.kind, given, loc, mistakes)
    return [] if value is NOTHING else [value]


def name_of(cls: Any) -> str:
    return getattr(cls, "name", "") or cls.__name__
