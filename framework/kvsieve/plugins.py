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
import signal
import sys
import threading
import traceback
import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pluggy

from . import entry_points, hooks, registration
from .entry_points import Origin
from .errors import UserError, unknown

if typing.TYPE_CHECKING:
    from .policy import Policy

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
    # It ships with kvsieve itself, whatever the plugin and its distribution call themselves.
    builtin: bool = False


class _Registry(NamedTuple):
    manager: pluggy.PluginManager
    origins: list[tuple[object, Origin]]  # of the plugins in the manager
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
            if not _implements(manager, hook, plugin):
                continue
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
    manager = pluggy.PluginManager(entry_points.GROUP)
    manager.add_hookspecs(hooks)
    registry = _Registry(manager, [], {}, {}, [])
    # What a plugin prints must not end up in the output of a command.
    with _tell_interrupts_apart(), contextlib.redirect_stdout(sys.stderr):
        for origin, load in entry_points.found():
            _add(registry, origin, load)
    return registry


def _add(registry: _Registry, origin: Origin, load: Callable[[], object]) -> None:
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


def _registered_by(registry: _Registry, origin: Origin, plugin: object, kind: str) -> dict[str, Registered]:
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
    if _implements(registry.manager, hook, plugin) and not offered and not refused:
        _report(registry.problems, origin, f"its {hook} registers nothing")
    return offered


def _caller(manager: pluggy.PluginManager, hook: str, plugin: object) -> Callable[..., Any]:
    """Calls the hook of this plugin alone."""
    return manager.subset_hook_caller(hook, [other for other in manager.get_plugins() if other is not plugin])


def _implements(manager: pluggy.PluginManager, hook: str, plugin: object) -> bool:
    return any(one.plugin is plugin for one in getattr(manager.hook, hook).get_hookimpls())


def _is_unmarked(manager: pluggy.PluginManager, plugin: object, hook: str) -> bool:
    return callable(getattr(plugin, hook, None)) and manager.parse_hookimpl_opts(plugin, hook) is None


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


def _report(problems: list[str], origin: Origin, what: str) -> None:
    problems.append(f"{origin}: {' '.join(what.split())}"[:_LONGEST_PROBLEM])


def _in_words(error: BaseException) -> str:
    """Type and text of an exception in one line, also of one whose text cannot be made."""
    return " ".join("".join(traceback.format_exception_only(error)).split())[:_LONGEST_PROBLEM]
