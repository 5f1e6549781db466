"""Haystacks: text in units of a line, exactly as many tokens as there is room for, with statements in it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ...errors import UserError
from . import text, words

NOISE = "A lake lies still. Leaves fall in autumn. Some trains are late. Up we go. Then down again.\n"
_SENTENCES = (
    "The {a} {n} did not {v} the {m}.",
    "No {n} would ever {v} an {m} like this.",
    "Some say that the {n} must {v} before the {m} is {a}.",
    "Once the {n} had to {v}, and the {m} stayed {a}.",
    "Between the {n} and the {m} nobody could {v}.",
    "It was {a} to {v} with the {n} in spring.",
    "Who would {v} for the {a} {n}?",
)
_LONGEST = 400  # characters of a line of a text file; longer ones are parted at the ends of sentences

Ids = list[int]
Units = Iterator[Ids]


def noise(tokenizer: Any) -> Units:
    """One line again and again."""
    ids = text.encode(tokenizer, NOISE)
    while True:
        yield ids


def prose(tokenizer: Any, rng: np.random.Generator) -> Units:
    """Lines of three sentences of real words, without end and without sense."""
    nouns, adjectives, verbs = words.words()

    def sentence() -> str:
        a, v = (some[int(rng.integers(len(some)))] for some in (adjectives, verbs))
        n, m = (nouns[int(i)] for i in rng.integers(len(nouns), size=2))
        return _SENTENCES[int(rng.integers(len(_SENTENCES)))].format(a=a, v=v, n=n, m=m)

    while True:
        yield text.encode(tokenizer, " ".join(sentence() for _ in range(3)) + "\n")


def lines(tokenizer: Any, path: str, rng: np.random.Generator) -> Units:
    """The lines of a text file from a random one on, once round."""
    found = [
        part
        for line in text.read(path).splitlines()
        for part in ([line] if len(line) <= _LONGEST else re.split(r"(?<=[.!?]) +", line))
        if part.strip()
    ]
    start = int(rng.random() * len(found))
    for line in found[start:] + found[:start]:
        yield text.encode(tokenizer, line + "\n")


def said(tokenizer: Any, make: Callable[[], str]) -> Units:
    """Statements, each made anew."""
    while True:
        yield text.encode(tokenizer, make() + "\n")


def hide(
    what: str, context: int, before: Ids, units: Units, hidden: Sequence[tuple[float, Ids]], after: Ids
) -> Ids:
    """A prompt of exactly `context` tokens: `before`, units with statements among them, `after`.

    Args:
        what: the name of the task, for messages.
        hidden: depth of each statement, from 0 to 1, and its tokens; of equal depths the first comes first.

    Raises:
        UserError: not even one unit fits, with the shortest context into which it does; or the units end.
    """
    fixed = len(before) + sum(len(ids) for _, ids in hidden) + len(after)
    hay = _filled(what, context, context - fixed, units)
    prompt, done = list(before), 0
    for depth, ids in sorted(hidden, key=lambda one: one[0]):
        place = round(depth * len(hay))
        prompt += [token for unit in hay[done:place] for token in unit] + ids
        done = place
    return prompt + [token for unit in hay[done:] for token in unit] + after


def _filled(what: str, context: int, room: int, units: Units) -> list[Ids]:
    """Units of `room` tokens together; the first is the end of one that does not fit whole."""
    found: list[Ids] = []
    for unit in units:
        if not found and len(unit) > room:
            raise too_short(what, context, len(unit) - room)
        if len(unit) > room:
            return [unit[len(unit) - room :], *found]
        found.append(unit)
        room -= len(unit)
    if room > 0 or not found:
        raise UserError(
            f"the text of {what} is too short: a context of {context} needs {room} tokens more of it"
        )
    return found


def too_short(what: str, context: int, missing: int) -> UserError:
    """The error for a context that lacks so many tokens."""
    return UserError(f"{what} needs a context of at least {context + missing} tokens here, not {context}")
