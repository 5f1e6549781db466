"""Policies and their parameters from plain data: YAML, the command line, `make_policy`."""

from __future__ import annotations

import dataclasses
import functools
import typing
from collections.abc import Mapping
from typing import Any

import pydantic

from .errors import UserError, unknown
from .plugins import policy_class

if typing.TYPE_CHECKING:
    from .policy import Policy


def make_policy(name: str, **parameters: Any) -> Policy:
    """The policy `name` with these parameters; a parameter that is a policy may be given as its spec.

    >>> make_policy("sparq", r=16, k=64)
    SparQ(r=16, k=64, ...)
    >>> make_policy("dense_layers", layers=[0, 1], inner={"sparq": {"r": 16}})
    DenseLayers(layers=(0, 1), inner=SparQ(r=16, ...))

    Raises:
        UserError: unknown name or parameter, or a bad value; the message names what is legal.
    """
    return build(policy_class(name), parameters)


def build(cls: type[Policy], parameters: Mapping[str, Any]) -> Policy:
    """An instance of a policy class, registered or not, from parameters as they stand in YAML; see make_policy."""
    name, model = cls.name or cls.__name__, parameters_model(typing.cast(Any, cls))
    try:
        given = model(**parameters)
    except pydantic.ValidationError as error:
        raise UserError(_explain(name, cls, error)) from None
    nested = policy_fields(cls)
    values = {field: getattr(given, field) for field in model.model_fields}
    values |= {field: policy_from_spec(values[field]) for field in nested}
    try:
        return cls(**values)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"policy {name}: {error}") from error


def policy_from_spec(spec: str | Mapping[str, Any] | Policy) -> Policy:
    """A policy from its name, or from `{name: parameters}` as YAML gives it and `Policy.spec()` returns it."""
    from .policy import Policy

    if isinstance(spec, Policy):
        return spec
    if isinstance(spec, str):
        return make_policy(spec)
    if len(spec) != 1:
        raise UserError(f"a policy is a name or one name with its parameters, not {dict(spec)!r}")
    ((name, parameters),) = spec.items()
    return make_policy(name, **(parameters or {}))


def policy_fields(cls: type) -> list[str]:
    """The fields of this policy class that hold a policy."""
    from .policy import Policy

    hints = typing.get_type_hints(cls)
    return [f.name for f in dataclasses.fields(cls) if hints[f.name] is Policy]


@functools.cache
def parameters_model(cls: Any) -> type[pydantic.BaseModel]:
    """The parameters of a policy or task class as a pydantic model: types, defaults, nothing else allowed."""
    hints = typing.get_type_hints(cls)
    nested = policy_fields(cls)
    fields: dict[str, Any] = {}
    for field in dataclasses.fields(cls):
        default: Any = ...
        if field.default is not dataclasses.MISSING:
            default = field.default
        elif field.default_factory is not dataclasses.MISSING:
            default = pydantic.Field(default_factory=field.default_factory)
        fields[field.name] = (Any if field.name in nested else hints[field.name], default)
    # No lax conversions between kinds: `k: "many"` and `k: true` are mistakes, 2 for a float is not.
    config = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=True)
    return pydantic.create_model(cls.__name__, __config__=config, **fields)


def _explain(name: str, cls: type, error: pydantic.ValidationError) -> str:
    legal = [field.name for field in dataclasses.fields(cls)]
    lines = []
    for mistake in error.errors():
        field = ".".join(str(part) for part in mistake["loc"])
        if mistake["type"] == "extra_forbidden":
            lines.append(unknown(f"parameter of {name}", field, legal))
        elif mistake["type"] == "missing":
            lines.append(f"{name}.{field} must be given")
        else:
            lines.append(f"{name}.{field}: {mistake['msg']}, not {mistake['input']!r}")
    return "; ".join(lines)
