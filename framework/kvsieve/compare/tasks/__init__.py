"""The tasks of a comparison, one file each; they come in through the same hook as a plugin's."""

from collections.abc import Callable

from ... import __version__, plugins
from ...hooks import hookimpl
from ...plugins import Registered
from .base import Answer, Sample, Task
from .key_value import KeyValue
from .lm_eval import LmEval
from .needle import Needle
from .perplexity import Perplexity
from .repetition import Repetition

__all__ = [
    "Answer",
    "KeyValue",
    "LmEval",
    "Needle",
    "Perplexity",
    "Repetition",
    "Sample",
    "Task",
    "registered",
]


@hookimpl
def register_tasks(register: Callable[[type[Task]], None]) -> None:
    for task in (Needle, Repetition, Perplexity, KeyValue, LmEval):
        register(task)


def registered() -> dict[str, Registered]:
    """All tasks by name: the built-in ones, then those of plugins."""
    found: dict[str, Registered] = {}
    register_tasks(
        lambda cls: found.update({cls.name: Registered(cls.name, cls, "builtin", "kvsieve", __version__)})
    )
    return found | {name: task for name, task in plugins.tasks().items() if name not in found}
