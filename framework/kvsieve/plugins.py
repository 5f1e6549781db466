"""Discovery: which policies and tasks there are, from which package, and what could not be loaded.

Packages announce themselves by an entry point in the group `kvsieve`; the built-in policies come in through the same
door. A plugin that fails is reported and takes nothing else down.
"""

from __future__ import annotations

import functools
import importlib.metadata
import typing
from collections.abc import Callable
from typing import NamedTuple

import pluggy

from . import __version__ as kvsieve_version
from . import hooks
from .errors import UserError, unknown

if typing.TYPE_CHECKING:
    from .policy import Policy

GROUP = "kvsieve"
_BUILTIN = {  # as in pyproject.toml
    "builtin": "kvsieve_policies",
    "builtin_tasks": "kvsieve.compare.tasks",
    "builtin_lm_eval": "kvsieve.lm_eval.task",
}


class Registered(NamedTuple):
    """A policy or task class and where it came from."""

    name: str
    cls: type
    plugin: str
    distribution: str
    version: str


class _Registry(NamedTuple):
    manager: pluggy.PluginManager
    policies: dict[str, Registered]
    tasks: dict[str, Registered]
    problems: list[str]


def policies() -> dict[str, Registered]:
    """All policies by name."""
    return _registry().policies


def tasks() -> dict[str, Registered]:
    """All tasks by name."""
    return _registry().tasks


def problems() -> list[str]:
    """What failed to load or to register, a line each, naming the plugin."""
    return _registry().problems


def hook() -> pluggy.HookRelay:
    """To call run-level hooks: `plugins.hook().run_started(...)`."""
    return _registry().manager.hook


def reload() -> None:
    """Forget what was discovered, so that packages installed since are seen."""
    _registry.cache_clear()


@functools.cache
def _registry() -> _Registry:
    manager = pluggy.PluginManager("kvsieve")
    manager.add_hookspecs(hooks)
    registry = _Registry(manager, {}, {}, [])
    for point in _entry_points():
        distribution = point.dist.name if point.dist else "kvsieve"
        version = point.dist.version if point.dist else kvsieve_version
        try:
            plugin = point.load()
            manager.register(plugin, name=f"{distribution}:{point.name}")
            _refuse_misspelt_hooks(manager, plugin)
            for kind, found in (("policies", registry.policies), ("tasks", registry.tasks)):
                implementation = getattr(plugin, f"register_{kind}", None)
                if implementation is not None:
                    implementation(_register(found, point.name, distribution, version, kind))
        except Exception as error:  # whatever a stranger's module raises must not take the others down
            registry.problems.append(
                f"plugin {point.name!r} of {distribution} {version} ({point.value}): {type(error).__name__}: {error}"
            )
    return registry


def _entry_points() -> list[importlib.metadata.EntryPoint]:
    """The built-in ones first: they win a quarrel over a name, so that no plugin replaces them unnoticed."""
    found = dict.fromkeys(importlib.metadata.entry_points(group=GROUP))
    names = {point.name for point in found}
    for name, module in _BUILTIN.items():
        if name not in names:  # run from a source tree on PYTHONPATH, not installed
            found[importlib.metadata.EntryPoint(name, module, GROUP)] = None
    return sorted(found, key=lambda point: (point.name not in _BUILTIN, point.name))


def _refuse_misspelt_hooks(manager: pluggy.PluginManager, plugin: object) -> None:
    try:
        manager.check_pending()
    except pluggy.PluginValidationError:
        manager.unregister(plugin)
        raise


def _register(
    found: dict[str, Registered], plugin: str, distribution: str, version: str, kind: str
) -> Callable[[type], None]:
    def register(cls: type) -> None:
        if kind == "policies":
            _check_policy_class(cls)
        name = getattr(cls, "name", "")
        if not isinstance(name, str) or not name.isidentifier():
            raise TypeError(
                f"{cls.__name__} needs a class attribute name: ClassVar[str], an identifier; it is {name!r}"
            )
        if name in found:
            raise ValueError(f"{name!r} is already registered by {found[name].distribution}")
        found[name] = Registered(name, cls, plugin, distribution, version)

    return register


def _check_policy_class(cls: type) -> None:
    from .policy import Policy

    if not (isinstance(cls, type) and issubclass(cls, Policy)):
        raise TypeError(f"{cls!r} is not a subclass of kvsieve.Policy")
    if "__dataclass_fields__" not in vars(cls) or not cls.__dataclass_params__.frozen:  # type: ignore[attr-defined]
        raise TypeError(f"{cls.__name__} must be a frozen dataclass: @dataclass(frozen=True)")


def policy_class(name: str) -> type[Policy]:
    """The class registered under this name; UserError names the legal ones, and the plugins that failed to load."""
    found = policies().get(name)
    if found is None:
        failed = "".join(f"\n  not loaded: {problem}" for problem in problems())
        raise UserError(unknown("policy", name, policies()) + failed)
    return found.cls
