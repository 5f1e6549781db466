"""The tasks of a comparison, one file each; they come in through the same door as a plugin's."""

from collections.abc import Callable

from ...hooks import hookimpl
from .base import Answer, Sample, Task
from .key_value import KeyValue
from .needle import Needle
from .perplexity import Perplexity
from .repetition import Repetition

__all__ = ["Answer", "KeyValue", "Needle", "Perplexity", "Repetition", "Sample", "Task"]


@hookimpl
def register_tasks(register: Callable[[type[Task]], None]) -> None:
    for task in (Needle, Repetition, Perplexity, KeyValue):
        register(task)
