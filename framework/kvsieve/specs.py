"""Policies and tasks from plain data: one strictness for YAML, the command line, bench and `make_policy`.

An entry is a name, or `{name: {parameter: value}}`. A parameter that is a policy is an entry itself.
A budget (`compression`, `memory` or `tokens`) stands beside the parameters of a policy that can be asked for
it, and gives those that are left out once head size and context are known. Where lists sweep, a list in place
of a value stands for its values.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import math
import re
import typing
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from typing import Any, TypeVar, cast

from . import plugins
from .entries import COMPRESSION, MEMORY, TOKENS, Budget, budgets, combinations, name_of, named
from .errors import UserError
from .values import Loc, Mistake

if typing.TYPE_CHECKING:
    from .compare.tasks import Task
    from .policy import Policy

Made = TypeVar("Made")
_ITEMSIZE = "itemsize"  # an argument of `for_compression` and the like, beside parameters


def make_policy(
    policy: str | Mapping[str, Any] | Policy,
    /,
    *,
    compression: str | float | Fraction | None = None,
    memory: str | float | Fraction | None = None,
    tokens: int | None = None,
    head_size: int | None = None,
    context: int | None = None,
    **parameters: Any,
) -> Policy:
    """A policy from its name and parameters, or from its spec `{name: parameters}`, as YAML gives it.

    >>> make_policy("sparq", r=16, k=64)
    SparQ(r=16, k=64, ...)
    >>> make_policy("dense_layers", layers=[0, 1], inner={"sparq": {"r": 16}})
    DenseLayers(layers=(0, 1), inner=SparQ(r=16, ...))
    >>> make_policy("sparq", compression="1/8", head_size=64, context=4096)
    SparQ(r=8, k=256, local=64, ...)

    Args:
        compression: the fraction of dense attention's bytes to read; parameters not given follow from it.
        memory: or the fraction of its cache's bytes to hold.
        tokens: or how many are read whole at a step.
        head_size: channels per head of the model; needed with one of these budgets, as `context` is.
        context: tokens that the budget refers to.
        parameters: the policy's own; one that is a policy may be given as its name or spec.

    Raises:
        UserError: with all that is wrong: an unknown name or parameter, a value of another kind or one that
            the policy refuses, two budgets, or one without head size and context. It names what is legal.
    """
    from .policy import Policy

    asked = {COMPRESSION: compression, MEMORY: memory, TOKENS: tokens}
    given = {kind: amount for kind, amount in asked.items() if amount is not None} | parameters
    if isinstance(policy, Policy) and not given:
        return policy
    spec = read_policy(with_parameters(policy, given))
    if not spec.needs_context:
        return spec.build(0, 0)
    if head_size is None or context is None:
        raise UserError(
            f"{spec.name}: which parameters a budget means depends on the model and the context: "
            "give head_size=... (channels per head) and context=... (tokens), or the parameters themselves"
        )
    for name, value in (("head_size", head_size), ("context", context)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise UserError(str(Mistake((name,), "must be an integer of at least 1", value)))
    return spec.build(head_size, context)


def build(
    cls: type[Policy], parameters: Mapping[str, Any], head_size: int = 0, context: int = 0, itemsize: int = 2
) -> Policy:
    """An instance of a policy class, registered or not, from plain parameters; see PolicySpec.build."""
    mistakes: list[Mistake] = []
    specs = _policy_specs(cls, dict(parameters), (name_of(cls),), mistakes, sweep=False)
    _refuse(mistakes)
    return specs[0].build(head_size, context, itemsize)


@dataclasses.dataclass(frozen=True)
class PolicySpec:
    """A policy that plain data asks for, checked; it is built once head size and context are known."""

    cls: type[Policy]
    # As given; a nested policy is a PolicySpec.
    parameters: dict[str, Any]
    budget: Budget | None = None
    loc: Loc = dataclasses.field(compare=False, default=())

    @property
    def name(self) -> str:
        return name_of(self.cls)

    @property
    def needs_context(self) -> bool:
        nested = [value for value in self.parameters.values() if isinstance(value, PolicySpec)]
        return self.budget is not None or any(spec.needs_context for spec in nested)

    def build(self, head_size: int, context: int, itemsize: int = 2) -> Policy:
        """The policy itself; a spec that needs no context takes anything for all three.

        `itemsize`: bytes of a number in the cache, for methods whose share depends on it.

        Raises:
            UserError: the parameters do not go together, or none give this budget here.
        """
        from .policy import Policy

        given = {
            name: value.build(head_size, context, itemsize) if isinstance(value, PolicySpec) else value
            for name, value in self.parameters.items()
        }
        if self.budget is None:
            return _make(functools.partial(self.cls, **given))
        kind, amount = self.budget
        make = getattr(self.cls, f"for_{kind}")
        asked = inspect.signature(make).parameters
        told = {name: value for name, value in (given | {_ITEMSIZE: itemsize}).items() if name in asked}
        nested = [name for name in told if isinstance(given.get(name), Policy)]
        shares = {name: self._share(name, head_size, context, itemsize) for name in nested}
        try:
            plain = int(amount) if kind == TOKENS else float(amount)
            policy = _make(functools.partial(make, plain, head_size, context, **told | shares))
            rest = {name: value for name, value in given.items() if name not in shares}
            made = _make(functools.partial(dataclasses.replace, policy, **rest))
            if kind != TOKENS and amount * context < 1:
                raise UserError(
                    f"{self.name} {'reads' if kind == COMPRESSION else 'holds'} a token at least: the "
                    f"smallest {kind} here is 1/{context}"
                )
            return made
        except UserError as error:
            # A share of a nested policy comes from a float, and has digits without end.
            shown = amount.limit_denominator(max(10_000, math.ceil(10 / amount)))
            where, reason = f"{kind} {shown} at context {context}: ", str(error)
            raise UserError(where + reason.removeprefix(where)) from None  # as a nested policy has said it

    def _share(self, name: str, head_size: int, context: int, itemsize: int) -> Callable[[float], Policy]:
        """A nested policy as a function of its part of this budget.

        Raises:
            UserError: it has a budget of its own.
        """
        assert self.budget is not None
        inner, kind = self.parameters[name], self.budget.kind

        def policy(share: float) -> Policy:
            if not isinstance(inner, PolicySpec):
                return cast("Policy", inner)  # an object: its parameters are given
            spec = dataclasses.replace(inner, budget=Budget(kind, Fraction(share)))
            return spec.build(head_size, context, itemsize)

        if isinstance(inner, PolicySpec) and inner.budget is not None:
            raise UserError(
                f"{self.name} and {self.name}.{name} have a budget each, {self.budget} and {inner.budget}: "
                "give one of them"
            )
        return policy

    def entry(self) -> Any:
        """The entry that gives this spec again."""
        from .policy import Policy

        def plain(value: Any) -> Any:
            if isinstance(value, PolicySpec):
                return value.entry()
            return value.spec() if isinstance(value, Policy) else value

        values = {name: plain(value) for name, value in self.parameters.items()}
        if self.budget is not None:
            kind, amount = self.budget
            values = {kind: int(amount) if kind == TOKENS else str(amount)} | values
        return {self.name: values} if values else self.name


def read_policy(entry: Any) -> PolicySpec:
    """The spec of an entry without sweeps.

    Raises:
        UserError: with all that is wrong.
    """
    mistakes: list[Mistake] = []
    specs = read_policies(entry, (), mistakes, sweep=False)
    _refuse(mistakes)
    return specs[0]


def read_policies(entry: Any, loc: Loc, mistakes: list[Mistake], *, sweep: bool = True) -> list[PolicySpec]:
    """The specs of an entry, one for each combination of its lists.

    What is wrong goes to `mistakes`; then there are none.
    """
    found = named("policy", entry, loc, plugins.policies(), mistakes)
    return [] if found is None else _policy_specs(*found, mistakes, sweep=sweep)


def read_tasks(entry: Any, loc: Loc, mistakes: list[Mistake]) -> list[tuple[Task, Loc]]:
    """The tasks of an entry, one for each combination of its lists, with their place; see read_policies."""
    found = named("task", entry, loc, plugins.tasks(), mistakes)
    if found is None:
        return []
    cls, parameters, loc = found
    before = len(mistakes)
    values = combinations(cls, parameters, loc, mistakes, sweep=True)
    makes = [functools.partial(cls, **each) for each in values]
    tasks = _made(makes, loc, before, mistakes)
    return [(task, loc) for task in tasks] if len(mistakes) == before else []


def with_parameters(policy: str | Mapping[str, Any] | Policy, parameters: Mapping[str, Any]) -> Any:
    """The entry of a name or spec with more parameters; those given here win."""
    from .policy import Policy

    if isinstance(policy, Policy):
        policy = policy.spec()
    if isinstance(policy, str):
        return {policy: dict(parameters)}
    if not isinstance(policy, Mapping) or len(policy) != 1:
        return policy
    ((name, given),) = policy.items()
    return {name: {**given, **parameters} if isinstance(given, Mapping) else given or dict(parameters)}


def _policy_specs(
    cls: type[Policy], parameters: dict[str, Any], loc: Loc, mistakes: list[Mistake], *, sweep: bool
) -> list[PolicySpec]:
    from .policy import Policy

    def nested(given: Any, at: Loc) -> list[Any]:
        return [given] if isinstance(given, Policy) else read_policies(given, at, mistakes, sweep=sweep)

    before = len(mistakes)
    specs = [
        PolicySpec(cls, values, _budget(cls, values), loc)
        for values in combinations(cls, parameters, loc, mistakes, sweep=sweep, read_nested=nested)
    ]
    now = [functools.partial(spec.build, 0, 0) for spec in specs if not spec.needs_context]
    _made(now, loc, before, mistakes)
    return specs if len(mistakes) == before else []


def _budget(cls: type[Policy], values: dict[str, Any]) -> Budget | None:
    """Taken out of the values of an entry."""
    for kind in budgets(cls):
        if kind in values:
            budget: Budget = values.pop(kind)
            return budget
    return None


def _made(makes: Iterable[Callable[[], Made]], loc: Loc, before: int, mistakes: list[Mistake]) -> list[Made]:
    """Make each or record why not; skip errors about fields that were reported already, from `before` on."""
    wrong = {str(mistake.loc[len(loc)]) for mistake in mistakes[before:] if len(mistake.loc) > len(loc)}
    made: list[Made] = []
    reasons: dict[str, None] = {}
    for make in makes:
        try:
            made.append(_make(make))
        except UserError as error:
            if not wrong & set(re.findall(r"\w+", str(error))):
                reasons[str(error)] = None
    mistakes += [Mistake(loc, reason) for reason in reasons]
    return made


def _make(make: Callable[[], Made]) -> Made:
    """Call a class of a plugin; whatever it raises becomes a UserError."""
    try:
        return make()
    except UserError:
        raise
    except (ValueError, TypeError, NotImplementedError) as error:
        raise UserError(str(error)) from None
    except Exception as error:
        raise UserError(f"{type(error).__name__}: {error}") from error


def _refuse(mistakes: Iterable[Mistake]) -> None:
    # A policy names itself in what it raises: once is enough.
    lines = dict.fromkeys(re.sub(r"^(\w+): (?=\1\.)", "", str(mistake)) for mistake in mistakes)
    if lines:
        raise UserError("\n".join(lines))
