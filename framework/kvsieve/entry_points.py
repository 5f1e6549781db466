"""Find plugins: beside this package those that ship with kvsieve, by entry point those of other packages."""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import sys
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from . import __version__

GROUP = "kvsieve"
_US = "kvsieve"  # our distribution's name
# As in pyproject.toml.
_BUILTIN = {
    "builtin": "kvsieve_policies",
    "builtin_tasks": "kvsieve.compare.tasks",
    "builtin_lm_eval": "kvsieve.lm_eval.task",
}


class Origin(NamedTuple):
    plugin: str
    distribution: str
    version: str
    target: str
    builtin: bool = False

    def __str__(self) -> str:
        return f"plugin {self.plugin!r} of {self.distribution} {self.version} ({self.target})"


def found() -> Iterator[tuple[Origin, Callable[[], object]]]:
    """Every plugin, ours first, with the function that loads it."""
    for name, module in _BUILTIN.items():
        origin = Origin(name, _US, __version__, module, builtin=True)
        yield origin, functools.partial(_load_builtin, module)
    for origin, point in _announced():
        yield origin, functools.partial(_load_announced, origin, point)


def _load_builtin(module: str) -> ModuleType:
    """Import what ships with kvsieve from beside this package; elsewhere the name may be a stranger's."""
    top = module.partition(".")[0]
    package = Path(__file__).parent
    homes = [package.parent, package.parent.parent / "policies"]  # installed together; in a source tree
    spec = PathFinder.find_spec(top, [str(home) for home in homes])
    if spec is None or spec.origin is None or spec.loader is None:
        raise ImportError(
            f"{top} is in none of {', '.join(map(str, homes))}: kvsieve is not installed completely"
        )
    loaded = sys.modules.get(top)
    if loaded is None:
        sys.modules[top] = loaded = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(loaded)
        except BaseException:
            del sys.modules[top]
            raise
    if not os.path.samefile(loaded.__file__ or "", spec.origin):
        raise ImportError(
            f"{top} was imported from {loaded.__file__}; the one that ships with kvsieve is {spec.origin}"
        )
    return importlib.import_module(module)


def _announced() -> list[tuple[Origin, importlib.metadata.EntryPoint]]:
    """The entry points of other packages, in a fixed order."""
    found = []
    for point in importlib.metadata.entry_points(group=GROUP):
        name, version = (str(point.dist.name), str(point.dist.version)) if point.dist else ("unknown", "")
        ours = _normal(name) == _US and _BUILTIN.get(point.name) == point.value
        if not ours:
            found.append((Origin(point.name, name, version, point.value), point))
    return sorted(found)


def _load_announced(origin: Origin, point: importlib.metadata.EntryPoint) -> object:
    if _normal(origin.distribution) == _US:
        raise ImportError(f"not loaded: its distribution calls itself {_US}, and this is no part of it")
    if not point.pattern.match(point.value):
        raise ImportError(f"{point.value!r} is neither a module nor module:object")
    return point.load()


def _normal(name: str) -> str:
    """A distribution's name as installers compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()
