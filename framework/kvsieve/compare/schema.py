"""The JSON schema of a configuration, made from the fields of policies and tasks: editors check with it."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable
from typing import Any

import pydantic

from ..entries import COMPRESSION, MEMORY, TOKENS, budgets, fields
from ..plugins import Registered
from ..values import is_list
from .config import Settings, Until

_FRACTION: dict[str, Any] = {
    "anyOf": [
        {"type": "string", "pattern": "^ *[0-9]+ */ *[0-9]+ *$"},
        {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
    ],
}
_BUDGETS: dict[str, dict[str, Any]] = {
    COMPRESSION: {
        "description": "fraction of dense attention's bytes to read, from which the other parameters follow"
    }
    | _FRACTION,
    MEMORY: {"description": "instead, fraction of its cache's bytes to hold"} | _FRACTION,
    TOKENS: {"description": "instead, how many are read whole at a step", "type": "integer", "minimum": 1},
}


def schema(policies: Iterable[Registered], tasks: Iterable[Registered]) -> dict[str, Any]:
    """The schema with these policies and tasks."""
    whole = Settings.model_json_schema()
    whole["properties"]["tasks"] |= {
        "items": {"$ref": "#/$defs/task"},
        "description": "each meets every policy",
    }
    whole["properties"]["model"] = _sweep(whole["properties"]["model"])
    whole["properties"]["policies"] |= {"items": {"$ref": "#/$defs/policy"}}
    whole["$defs"] = whole.pop("$defs") | {"task": _rounds(_entry(tasks)), "policy": _entry(policies)}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        **whole,
        "title": "A kvsieve comparison",
    }


def _entry(registered: Iterable[Registered]) -> dict[str, Any]:
    """A name, or one name with its parameters."""
    known = sorted(registered)
    optional = [task.name for task in known if not _required(task.cls)]
    properties = {one.name: _parameters(one.cls) for one in known}
    named = {"type": "object", "properties": properties, "additionalProperties": False}
    return {"anyOf": [{"enum": optional}, named | {"minProperties": 1, "maxProperties": 1}]}


def _rounds(tasks: dict[str, Any]) -> dict[str, Any]:
    """With a width in place of a number of samples."""
    for task in tasks["anyOf"][1]["properties"].values():
        task["properties"]["samples"]["anyOf"].append(Until.model_json_schema())
    return tasks


def _parameters(cls: Any) -> dict[str, Any]:
    properties: dict[str, Any] = {kind: _sweep(_BUDGETS[kind]) for kind in budgets(cls)}
    defaults = {field.name: field.default for field in dataclasses.fields(cls)}
    for name, field in fields(cls).items():
        if field.is_policy:
            properties[name] = _sweep({"$ref": "#/$defs/policy"})
            continue
        kind = pydantic.TypeAdapter(field.kind).json_schema()
        properties[name] = kind if is_list(field.kind) else _sweep(kind)
        if defaults[name] is not dataclasses.MISSING:
            properties[name] |= {"default": defaults[name]}
    described = (inspect.getdoc(cls) or "").partition("\n\n")[0].replace("\n", " ")
    return {
        "type": ["object", "null"],
        "description": described,
        "properties": properties,
        "required": _required(cls),
        "additionalProperties": False,
    }


def _required(cls: Any) -> list[str]:
    return [name for name, field in fields(cls).items() if field.required]


def _sweep(kind: dict[str, Any]) -> dict[str, Any]:
    """One value, or a list of them."""
    return {"anyOf": [kind, {"type": "array", "items": kind, "minItems": 1}]}
