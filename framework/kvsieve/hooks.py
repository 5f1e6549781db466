"""The hooks that a plugin may implement: called at discovery and around runs, never in a decode step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pluggy

hookspec = pluggy.HookspecMarker("kvsieve")
hookimpl = pluggy.HookimplMarker("kvsieve")


@hookspec
def register_policies(register: Callable[[type], None]) -> None:
    """Call `register(MyPolicy)` for each policy class; `name` is its name in YAML and on the command line."""


@hookspec
def register_tasks(register: Callable[[type], None]) -> None:
    """Call `register(MyTask)` for each task class of a comparison."""


@hookspec
def run_started(folder: Path, cells: list[Any]) -> None:
    """Called when a comparison begins, with its run folder and a copy of the cells that it will run.

    Of several models, for each when its turn comes.
    """


@hookspec
def run_finished(folder: Path, summary: list[Any]) -> None:
    """Called when a comparison has ended, even with failures; `summary`: `kvsieve.compare.results.Row`s."""
