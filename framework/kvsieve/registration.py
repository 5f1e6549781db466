"""Check a policy or task class when it is registered: a frozen dataclass whose fields are plain data.

Its fields are its parameters, in YAML and on the command line, in tables and in the ids of results. So each
must be plain data, which can be written as text and read again.
"""

from __future__ import annotations

import dataclasses
import enum
import pkgutil
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

# By name: tasks belong to `kvsieve.compare`, which is above this module.
_BASES = {"policies": "kvsieve.policy:Policy", "tasks": "kvsieve.compare.tasks.base:Task"}
_SCALARS = (bool, int, float, str, type(None))
_CONTAINERS = (list, tuple, set, frozenset, dict, Sequence, Mapping)
_PLAIN = "bool, int, float, str, None, an Enum, a Literal, a Policy, or lists, tuples and dicts of them"
_LONGEST_NAME = 64


def check(kind: str, cls: Any) -> None:
    """Check a class of kind "policies" or "tasks".

    Raises:
        TypeError, ValueError: it cannot be registered, and why.
    """
    from . import contract  # torch: only once there is a class to check

    base = pkgutil.resolve_name(_BASES[kind])
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise TypeError(f"{_short(cls)} is not a subclass of kvsieve.{base.__name__}")
    untyped: Any = cls
    if "__dataclass_fields__" not in vars(cls) or not untyped.__dataclass_params__.frozen:
        raise TypeError(f"{cls.__name__} must be a frozen dataclass: @dataclass(frozen=True)")
    _check_fields(cls, base)
    below = cls.__mro__[: cls.__mro__.index(base)] or (base,)  # the base's name is no subclass's
    name = next((vars(kind)["name"] for kind in below if "name" in vars(kind)), None)
    if not _is_name(name):
        raise TypeError(
            f"{cls.__name__} needs a class attribute name: ClassVar[str], an identifier of at most "
            f"{_LONGEST_NAME} ASCII characters; it is {_short(name)}"
        )
    for attribute in ("paper", "metric"):
        if not isinstance(value := getattr(cls, attribute, ""), str):
            raise TypeError(f"{cls.__name__}.{attribute} must be a str, not {_short(value)}")
    if kind == "policies":
        contract.check_class(cls)


def _is_name(name: object) -> bool:
    """Whether it can stand in YAML and on the command line, and looks like no other name."""
    return isinstance(name, str) and name.isidentifier() and name.isascii() and len(name) <= _LONGEST_NAME


def _check_fields(cls: Any, base: type) -> None:
    try:
        hints = typing.get_type_hints(cls)
    except Exception as error:
        raise TypeError(
            f"an annotation of {cls.__name__} cannot be resolved: {type(error).__name__}: {error}"
        ) from error
    taken = {name for name, value in vars(base).items() if callable(value) or isinstance(value, classmethod)}
    taken |= {"name", "paper"}
    for field in dataclasses.fields(cls):
        name = f"{cls.__name__}.{field.name}"
        if field.name in taken:
            raise TypeError(
                f"{name} is a field, and {base.__name__}.{field.name} is not: write {field.name}: "
                "ClassVar[...], or rename the field"
            )
        if field.name.startswith("_") or not field.init:
            raise TypeError(
                f"{name} cannot be given: a field is a parameter, without a leading _ and with init=True"
            )
        if not _is_plain_type(hints[field.name]):
            raise TypeError(f"{name} is annotated {_short(field.type)}, which is not plain data: {_PLAIN}")
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        if default is not dataclasses.MISSING and not _is_plain(default):
            raise TypeError(f"the default of {name} is {_short(default)}, which is not plain data: {_PLAIN}")


def _is_plain_type(kind: Any) -> bool:
    if kind is Any or kind is Ellipsis or kind in _SCALARS or kind in _CONTAINERS:
        return True
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Literal:
        return all(_is_plain(value) for value in arguments)
    if origin in (typing.Union, types.UnionType) or origin in _CONTAINERS:
        return all(map(_is_plain_type, arguments))
    return isinstance(kind, type) and issubclass(kind, (enum.Enum, pkgutil.resolve_name(_BASES["policies"])))


def _is_plain(value: object) -> bool:
    if isinstance(value, (*_SCALARS, enum.Enum, pkgutil.resolve_name(_BASES["policies"]))):
        return True
    if isinstance(value, dict):
        return all(_is_plain(key) and _is_plain(item) for key, item in value.items())
    return isinstance(value, list | tuple | set | frozenset) and all(map(_is_plain, value))


def _short(value: object) -> str:
    """For a message; a stranger's repr may be long, and may fail."""
    try:
        text = repr(value)
    except Exception:
        text = f"an instance of {type(value).__name__}"
    return text if len(text) <= 80 else text[:77] + "..."
