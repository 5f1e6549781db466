"""The tasks of a comparison, one file each; they come in through the same door as a plugin's."""

from collections.abc import Callable

from ...hooks import hookimpl
from .base import Answer, Sample, Task
from .conversation import Conversation
from .key_value import KeyValue
from .needle import Needle
from .paper import CnnDailyMail, Shakespeare, Squad, TriviaQA, WikiText
from .passkey import Passkey
from .perplexity import Perplexity
from .repetition import Repetition
from .retrieval import Retrieval
from .sparq_needle import SparqNeedle

__all__ = [
    "Answer",
    "CnnDailyMail",
    "Conversation",
    "KeyValue",
    "Needle",
    "Passkey",
    "Perplexity",
    "Repetition",
    "Retrieval",
    "Sample",
    "Shakespeare",
    "SparqNeedle",
    "Squad",
    "Task",
    "TriviaQA",
    "WikiText",
]

_PAPER = (Squad, TriviaQA, CnnDailyMail, WikiText, Shakespeare, SparqNeedle)


@hookimpl
def register_tasks(register: Callable[[type[Task]], None]) -> None:
    for task in (Needle, Repetition, Perplexity, KeyValue, Retrieval, Passkey, Conversation, *_PAPER):
        register(task)
