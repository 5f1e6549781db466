"""The entries under `tasks` and `policies`: a name or `name: {parameters}`, where a list is a sweep.

An entry becomes one or more choices: one for every combination of its lists.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import re
import typing
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeVar

import pydantic
import yaml

from .. import plugins, specs
from ..errors import UserError, unknown
from ..plugins import Registered
from .source import Loc, Mistake
from .tasks import Task

if typing.TYPE_CHECKING:
    from ..policy import Policy

COMPRESSION = "compression"
Made = TypeVar("Made")


@dataclasses.dataclass(frozen=True)
class PolicyChoice:
    """A policy before the model and the context are known, from which a compression takes its parameters."""

    name: str
    parameters: dict[str, Any]  # as given; a nested policy is a PolicyChoice
    compression: Fraction | None
    loc: Loc = dataclasses.field(compare=False, default=())

    @property
    def needs_context(self) -> bool:
        nested = [value for value in self.parameters.values() if isinstance(value, PolicyChoice)]
        return self.compression is not None or any(choice.needs_context for choice in nested)

    def build(self, head_size: int, context: int) -> Policy:
        """The policy itself.

        Raises:
            UserError: the parameters do not go together, or none give this compression here.
        """
        given = {
            name: value.build(head_size, context) if isinstance(value, PolicyChoice) else value
            for name, value in self.parameters.items()
        }
        if self.compression is None:
            return specs.make_policy(self.name, **given)
        try:
            policy = plugins.policy_class(self.name).for_compression(
                float(self.compression), head_size, context
            )
            return dataclasses.replace(policy, **given)
        except (ValueError, NotImplementedError) as error:
            raise UserError(f"compression {self.compression} at context {context}: {error}") from None

    def entry(self) -> Any:
        """What stands in a config for it."""
        values = {k: v.entry() if isinstance(v, PolicyChoice) else v for k, v in self.parameters.items()}
        if self.compression is not None:
            values = {COMPRESSION: str(self.compression)} | values
        return {self.name: values} if values else self.name


def read_policies(entry: Any, loc: Loc, mistakes: list[Mistake]) -> list[PolicyChoice]:
    """The choices of one entry under `policies`, or of a nested policy; what is wrong goes to `mistakes`."""
    named = _named("policy", entry, loc, plugins.policies(), mistakes)
    if named is None:
        return []
    name, cls, parameters, loc = named
    before = len(mistakes)
    ratios: list[Fraction | None] = [None]
    if COMPRESSION in parameters:
        ratios = [*_fractions(cls, parameters.pop(COMPRESSION), (*loc, COMPRESSION), mistakes)]
    combinations = _sweep(name, cls, parameters, loc, mistakes)
    choices = [PolicyChoice(name, values, ratio, loc) for values in combinations for ratio in ratios]
    wrong = {mistake.loc[len(loc)] for mistake in mistakes[before:] if len(mistake.loc) > len(loc)}
    for choice in choices:
        if not choice.needs_context:
            _try(functools.partial(choice.build, 0, 0), loc, wrong, mistakes)
    return choices if len(mistakes) == before else []


def choice_from_options(name: str, compression: str | None, options: Sequence[str]) -> PolicyChoice:
    """A policy as the command line names it: `--policy sparq --compression 1/8 -p r=16`.

    Raises:
        UserError: with all that is wrong, naming what is legal.
    """
    parameters = {} if compression is None else {COMPRESSION: compression}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals:
            raise UserError(f"-p {option}: write a parameter as NAME=VALUE")
        parameters[key] = yaml.safe_load(text)
    mistakes: list[Mistake] = []
    choices = read_policies({name: parameters}, (), mistakes)
    if mistakes:
        raise UserError(
            "\n".join(dict.fromkeys(f"{'.'.join(map(str, m.loc))}: {m.message}" for m in mistakes))
        )
    if len(choices) != 1:
        raise UserError(f"-p: a list sweeps over {len(choices)} policies, and only one can be run here")
    return choices[0]


def read_tasks(entry: Any, loc: Loc, mistakes: list[Mistake]) -> list[tuple[Task, Loc]]:
    """The tasks of one entry under `tasks`, each with its place; what is wrong goes to `mistakes`."""
    named = _named("task", entry, loc, plugins.tasks(), mistakes)
    if named is None:
        return []
    name, cls, parameters, loc = named
    before = len(mistakes)
    combinations = _sweep(name, cls, parameters, loc, mistakes)
    wrong = {mistake.loc[len(loc)] for mistake in mistakes[before:] if len(mistake.loc) > len(loc)}
    made = [_try(functools.partial(cls, **values), loc, wrong, mistakes) for values in combinations]
    return [(task, loc) for task in made if task is not None] if len(mistakes) == before else []


def accepts_list(kind: Any) -> bool:
    """Whether a field of this type is itself a list, so that a list is its value and not a sweep."""
    origin = typing.get_origin(kind) or kind
    if isinstance(origin, type):
        return issubclass(origin, Sequence | set | frozenset) and not issubclass(origin, str)
    return any(accepts_list(part) for part in typing.get_args(kind))


def _named(
    what: str, entry: Any, loc: Loc, registered: Mapping[str, Registered], mistakes: list[Mistake]
) -> tuple[str, type, dict[str, Any], Loc] | None:
    """Name, class, parameters and their place of `name` or `{name: parameters}`."""
    if isinstance(entry, str):
        name, parameters = entry, None
    elif isinstance(entry, dict) and len(entry) == 1:
        ((name, parameters),) = entry.items()
        loc = (*loc, str(name))
    else:
        many = isinstance(entry, dict) and len(entry) > 1
        hint = " (indent its parameters below it)" if many else ""
        mistakes.append(Mistake(loc, f"a {what} is a name or one name with its parameters{hint}", entry))
        return None
    if name not in registered:
        failed = "".join(f"; not loaded: {problem}" for problem in plugins.problems())
        mistakes.append(Mistake(loc, unknown(what, name, registered) + failed))
        return None
    if parameters is None:
        parameters = {}
    if not isinstance(parameters, dict):
        mistakes.append(Mistake(loc, f"the parameters of {name} are `key: value` pairs", parameters))
        return None
    return name, registered[name].cls, dict(parameters), loc


def _sweep(
    name: str, cls: type, parameters: dict[str, Any], loc: Loc, mistakes: list[Mistake]
) -> list[dict[str, Any]]:
    """Every combination of those values of the parameters that are of their field's type."""
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    nested = specs.policy_fields(cls)
    ways: dict[str, list[Any]] = {}
    for key, given in parameters.items():
        at = (*loc, str(key))
        if key not in fields:
            legal = [*fields, COMPRESSION] if can_compress(cls) else [*fields]
            mistakes.append(Mistake(at, unknown(f"parameter of {name}", key, legal)))
        elif key in nested:
            several = given if isinstance(given, list) else [given]
            places = [(*at, i) if isinstance(given, list) else at for i in range(len(several))]
            ways[key] = [
                c
                for item, place in zip(several, places, strict=True)
                for c in read_policies(item, place, mistakes)
            ]
        elif isinstance(given, list) and not accepts_list(hints[key]):
            if not given:
                mistakes.append(Mistake(at, "an empty list sweeps over nothing", given))
            ways[key] = [
                v for i, item in enumerate(given) for v in _checked(hints[key], item, (*at, i), mistakes)
            ]
        else:
            ways[key] = _checked(hints[key], given, at, mistakes)
    for field in fields.values():
        absent = field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
        if absent and field.name not in parameters:
            mistakes.append(Mistake((*loc, field.name), "must be given"))
    ways = {key: values for key, values in ways.items() if values}
    return [dict(zip(ways, values, strict=True)) for values in itertools.product(*ways.values())]


def _checked(kind: Any, value: Any, loc: Loc, mistakes: list[Mistake]) -> list[Any]:
    """The value as its field's type, or nothing if it is not of it.

    Checked as JSON and strictly: a list may become a tuple, but "16" never a number.
    """
    adapter = pydantic.TypeAdapter(kind, config=pydantic.ConfigDict(arbitrary_types_allowed=True))
    try:
        return [adapter.validate_json(json.dumps(value, default=str), strict=True)]
    except pydantic.ValidationError as error:
        for detail in error.errors():
            items = tuple(
                part for part in detail["loc"] if isinstance(part, int)
            )  # in a union there are names, too
            mistakes.append(Mistake((*loc, *items), detail["msg"], detail["input"] if items else value))
        return []


def can_compress(cls: Any) -> bool:
    """Whether this class is a policy that says what parameters a compression means."""
    from ..policy import Policy

    if not issubclass(cls, Policy):
        return False
    own = cls.__mro__[: cls.__mro__.index(Policy)]
    return cls is Policy or any("for_compression" in vars(base) for base in own)


def _fractions(cls: type, given: Any, loc: Loc, mistakes: list[Mistake]) -> list[Fraction]:
    if not can_compress(cls):
        legal = ", ".join(field.name for field in dataclasses.fields(cls)) or "none"
        mistakes.append(
            Mistake(loc, f"this policy cannot be asked for a compression; its parameters: {legal}", given)
        )
        return []
    several = given if isinstance(given, list) else [given]
    ratios = []
    for i, item in enumerate(several):
        try:
            ratios.append(fraction(item))
        except UserError as error:
            mistakes.append(Mistake((*loc, i) if isinstance(given, list) else loc, str(error), item))
    if not several:
        mistakes.append(Mistake(loc, "an empty list sweeps over nothing", given))
    return ratios


def fraction(given: Any) -> Fraction:
    """`1/8`, `0.125` or `1` as a fraction of dense attention's bytes.

    Raises:
        UserError: not a fraction in (0, 1].
    """
    try:
        ratio = Fraction(0 if isinstance(given, bool) else str(given).replace(" ", ""))
    except (ValueError, ZeroDivisionError):
        ratio = Fraction(0)
    if not 0 < ratio <= 1:
        raise UserError(
            "compression is a fraction of dense attention's bytes, above 0 and up to 1, such as 1/8"
        )
    return ratio


def _try(make: Callable[[], Made], loc: Loc, wrong: set[str | int], mistakes: list[Mistake]) -> Made | None:
    """Make it, or note why that cannot be; what names a field known to be wrong, and left out, is no news."""
    try:
        return make()
    except (ValueError, TypeError) as error:
        known = set(re.findall(r"\w+", str(error))) & {str(field) for field in wrong}
        if not known and Mistake(loc, str(error)) not in mistakes:
            mistakes.append(Mistake(loc, str(error)))
        return None
