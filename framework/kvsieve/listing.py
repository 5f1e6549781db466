"""The list of policies or tasks, with their parameters: as text, or as JSON for programs."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Iterable
from typing import Any, NamedTuple

import typer
from rich.console import Console

from .plugins import Registered


class _Parameter(NamedTuple):
    """One line of `kvsieve policies`."""

    name: str
    type: str
    required: bool
    default: Any


def show(registered: Iterable[Registered], problems: list[str], as_json: bool) -> None:
    """Print what is registered, and on standard error what could not be loaded."""
    found = [(one, _parameters(one.cls)) for one in registered]
    if as_json:
        _list_json(found)
    else:
        _list_text(found)
    for problem in problems:
        Console(stderr=True, soft_wrap=True, markup=False).print(f"not loaded: {problem}", style="red")


def _list_text(found: list[tuple[Registered, list[_Parameter]]]) -> None:
    console = Console(highlight=False, soft_wrap=True, markup=False)
    for one, parameters in found:
        origin = f"{one.distribution} {one.version}"
        paper = getattr(one.cls, "paper", "")
        console.print(one.name, style="bold", end="")
        console.print(f"  ({', '.join(filter(None, [origin, paper]))})")
        summary, _, _ = (inspect.getdoc(one.cls) or "").partition("\n")
        console.print(f"    {summary}", style="dim")
        for parameter in parameters:
            console.print(f"    {parameter.name}: {parameter.type}", end="")
            console.print("" if parameter.required else f" = {parameter.default!r}")


def _list_json(found: list[tuple[Registered, list[_Parameter]]]) -> None:
    listed = [
        {
            "name": one.name,
            "distribution": one.distribution,
            "version": one.version,
            "paper": getattr(one.cls, "paper", None) or None,
            "metric": getattr(one.cls, "metric", None),
            "description": inspect.getdoc(one.cls),
            "parameters": [parameter._asdict() for parameter in parameters],
        }
        for one, parameters in found
    ]
    typer.echo(json.dumps(listed, indent=2, default=str))


def _parameters(cls: type) -> list[_Parameter]:
    hints = typing.get_type_hints(cls)
    missing, found = dataclasses.MISSING, []
    for field in dataclasses.fields(cls):
        default = field.default_factory() if field.default_factory is not missing else field.default
        required = default is missing
        found.append(
            _Parameter(field.name, _type_name(hints[field.name]), required, None if required else default)
        )
    return found


def _type_name(kind: Any) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return " | ".join(map(repr, typing.get_args(kind)))
    return kind.__name__ if isinstance(kind, type) and not typing.get_args(kind) else str(kind)
