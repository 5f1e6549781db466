"""Discovery: the policies and tasks there are, the package each comes from, and what could not be loaded.

Packages announce themselves by an entry point in the group `kvsieve`. The built-in policies and tasks are
plugins too; they are found beside this package, whatever else is installed, and come first, so that nobody
can replace them.

A plugin is code that runs when it is discovered. One that fails is reported and taken out whole; a class that
cannot be registered is reported, and the plugin's others stay. Neither takes anything else down.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.metadata
import importlib.util
import os
import re
import signal
import sys
import threading
import traceback
import typing
from collections.abc import Callable, Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import pluggy

from . import __version__ as kvsieve_version
from . import hooks, registration
from .errors import UserError, unknown

if typing.TYPE_CHECKING:
    from .policy import Policy

GROUP = "kvsieve"
_US = "kvsieve"  # our distribution's name
_BUILTIN = {"builtin": "kvsieve_policies", "builtin_tasks": "kvsieve.compare.tasks"}  # as in pyproject.toml
_KINDS = ("policies", "tasks")
_HOOKS = [name for name in vars(hooks) if name.startswith(("register_", "run_"))]
_LONGEST_PROBLEM = 500


class Registered(NamedTuple):
    """A policy or task class and where it came from."""

    name: str
    cls: type
    plugin: str
    distribution: str
    version: str
    builtin: bool = (
        False  # it ships with kvsieve itself, whatever the plugin and its distribution call themselves
    )


class _Origin(NamedTuple):
    plugin: str
    distribution: str
    version: str
    target: str
    builtin: bool = False

    def __str__(self) -> str:
        return f"plugin {self.plugin!r} of {self.distribution} {self.version} ({self.target})"


class _Registry(NamedTuple):
    manager: pluggy.PluginManager
    origins: list[tuple[object, _Origin]]  # of the plugins in the manager
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


def policy_class(name: str) -> type[Policy]:
    """The class registered under this name.

    Raises:
        UserError: there is none; it names the legal ones, and the plugins that failed to load.
    """
    found = policies().get(name)
    if found is None:
        failed = "".join(f"\n  not loaded: {problem}" for problem in problems())
        raise UserError(unknown("policy", name, policies()) + failed)
    return found.cls


def tell(hook: str, **arguments: Any) -> list[str]:
    """Call a run-level hook of every plugin, each with copies of the arguments of its own.

    Returns:
        What failed, a line each, naming the plugin; a plugin that fails keeps no other from being told.
    """
    manager, failed = _registry().manager, []
    with _tell_interrupts_apart():
        for plugin, origin in _registry().origins:
            try:
                _caller(manager, hook, plugin)(**copy.deepcopy(arguments))
            except _CtrlC:
                raise
            except BaseException as error:  # a stranger's code may raise anything
                failed.append(f"{origin} failed in {hook}: {_in_words(error)}")
    return failed


def reload() -> None:
    """Forget what was discovered, so that packages installed since are seen."""
    _registry.cache_clear()


@functools.cache
def _registry() -> _Registry:
    manager = pluggy.PluginManager(GROUP)
    manager.add_hookspecs(hooks)
    registry = _Registry(manager, [], {}, {}, [])
    # What a plugin prints must not end up in the output of a command.
    with _tell_interrupts_apart(), contextlib.redirect_stdout(sys.stderr):
        for name, module in _BUILTIN.items():
            origin = _Origin(name, _US, kvsieve_version, module, builtin=True)
            _add(registry, origin, functools.partial(_load_builtin, module))
        for origin, point in _announced():
            _add(registry, origin, functools.partial(_load_announced, origin, point))
    return registry


def _add(registry: _Registry, origin: _Origin, load: Callable[[], object]) -> None:
    """Load a plugin and register what it offers, or report why not."""
    manager, report = registry.manager, functools.partial(_report, registry.problems, origin)
    entered: object = None
    try:
        plugin = load()
        hash(plugin)  # pluggy keeps plugins in sets
        if plugin is None or manager.get_name(plugin) is not None:
            raise ValueError("it is None, or has been announced before")
        entered = plugin
        manager.register(plugin, name=f"{origin.distribution}:{origin.plugin}")
        manager.check_pending()  # raises for a marked function that is none of our hooks
        unmarked = [name for name in _HOOKS if _is_unmarked(manager, plugin, name)]
        for name in unmarked:
            report(f"{name} is not marked with @kvsieve.hookimpl, so it is never called")
        if not unmarked and not manager.get_hookcallers(plugin):
            report(f"it has none of the hooks, {', '.join(_HOOKS)}, so it does nothing")
        offered = [_registered_by(registry, origin, plugin, kind) for kind in _KINDS]
    except _CtrlC:
        raise
    except BaseException as error:  # whatever a stranger's module raises must not take the others down
        report(_in_words(error))
        if entered is not None and manager.get_name(entered) is not None:
            manager.unregister(entered)
        return
    registry.origins.append((plugin, origin))
    registry.policies.update(offered[0])
    registry.tasks.update(offered[1])


def _registered_by(registry: _Registry, origin: _Origin, plugin: object, kind: str) -> dict[str, Registered]:
    """The classes of one kind that a plugin registers; those that are refused are reported."""
    hook, known = f"register_{kind}", registry.policies if kind == "policies" else registry.tasks
    offered: dict[str, Registered] = {}
    refused = []

    def register(cls: type) -> None:
        try:
            registration.check(kind, cls)
            name: str = cls.name  # type: ignore[attr-defined]
            if taken := known.get(name) or offered.get(name):
                raise ValueError(f"{name!r} is already registered by {taken.distribution} {taken.version}")
        except (TypeError, ValueError) as error:
            refused.append(cls)
            _report(registry.problems, origin, str(error))
        else:
            offered[name] = Registered(name, cls, *origin[:3], origin.builtin)

    _caller(registry.manager, hook, plugin)(register=register)
    implements = any(one.plugin is plugin for one in getattr(registry.manager.hook, hook).get_hookimpls())
    if implements and not offered and not refused:
        _report(registry.problems, origin, f"its {hook} registers nothing")
    return offered


def _caller(manager: pluggy.PluginManager, hook: str, plugin: object) -> Callable[..., Any]:
    """Calls the hook of this plugin alone."""
    return manager.subset_hook_caller(hook, [other for other in manager.get_plugins() if other is not plugin])


def _is_unmarked(manager: pluggy.PluginManager, plugin: object, hook: str) -> bool:
    return callable(getattr(plugin, hook, None)) and manager.parse_hookimpl_opts(plugin, hook) is None


# ---------------------------------------------------------------- where plugins are
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


def _announced() -> list[tuple[_Origin, importlib.metadata.EntryPoint]]:
    """The entry points of other packages, in a fixed order."""
    found = []
    for point in importlib.metadata.entry_points(group=GROUP):
        name, version = (str(point.dist.name), str(point.dist.version)) if point.dist else ("unknown", "")
        ours = _normal(name) == _US and _BUILTIN.get(point.name) == point.value
        if not ours:
            found.append((_Origin(point.name, name, version, point.value), point))
    return sorted(found)


def _load_announced(origin: _Origin, point: importlib.metadata.EntryPoint) -> object:
    if _normal(origin.distribution) == _US:
        raise ImportError(f"not loaded: its distribution calls itself {_US}, and this is no part of it")
    if not point.pattern.match(point.value):
        raise ImportError(f"{point.value!r} is neither a module nor module:object")
    return point.load()


def _normal(name: str) -> str:
    """A distribution's name as installers compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


# ---------------------------------------------------------------- what plugins raise
class _CtrlC(KeyboardInterrupt):
    """The user's Ctrl-C, as opposed to a KeyboardInterrupt that a plugin raises itself."""


@contextlib.contextmanager
def _tell_interrupts_apart() -> Iterator[None]:
    """Inside, a SIGINT raises `_CtrlC`; outside of the main thread none arrives."""
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield
        return

    def interrupt(*arguments: Any) -> None:
        try:
            before(*arguments)
        except KeyboardInterrupt:
            raise _CtrlC from None

    signal.signal(signal.SIGINT, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _report(problems: list[str], origin: _Origin, what: str) -> None:
    problems.append(f"{origin}: {' '.join(what.split())}"[:_LONGEST_PROBLEM])


def _in_words(error: BaseException) -> str:
    """Type and text of an exception in one line, also of one whose text cannot be made."""
    return " ".join("".join(traceback.format_exception_only(error)).split())[:_LONGEST_PROBLEM]
