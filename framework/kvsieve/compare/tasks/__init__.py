"""The tasks of a comparison, one file each; they come in through the same door as a plugin's."""

from collections.abc import Callable

from ...hooks import hookimpl
from .base import Answer, Sample, Task
from .conversation import Conversation
from .key_value import KeyValue
from .needle import Needle
from .passkey import Passkey
from .perplexity import Perplexity
from .repetition import Repetition
from .retrieval import Retrieval

__all__ = [
    "Answer",
    "Conversation",
    "KeyValue",
    "Needle",
    "Passkey",
    "Perplexity",
    "Repetition",
    "Retrieval",
    "Sample",
    "Task",
]


@hookimpl
def register_tasks(register: Callable[[type[Task]], None]) -> None:
    for task in (Needle, Repetition, Perplexity, KeyValue, Retrieval, Passkey, Conversation):
        register(task)
