"""The hooks that a plugin may implement. Called at discovery and around runs, never inside a decode step."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pluggy

hookspec = pluggy.HookspecMarker("kvsieve")
hookimpl = pluggy.HookimplMarker("kvsieve")


@hookspec
def register_policies(register: Callable[[type], None]) -> None:
    """Call `register(MyPolicy)` for each policy class; its `name` is its name in YAML and on the command line."""


@hookspec
def register_tasks(register: Callable[[type], None]) -> None:
    """Call `register(MyTask)` for each task class of a comparison."""


@hookspec
def run_started(folder: Path, cells: list[Any]) -> None:
    """A comparison begins: its run folder and the cells it will run."""


@hookspec
def run_finished(folder: Path, summary: list[Any]) -> None:
    """A comparison has ended, with failures or without: its run folder and the rows of summary.csv
    (`kvsieve.compare.results.Row`)."""
