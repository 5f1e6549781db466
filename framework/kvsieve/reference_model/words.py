"""Invented words, keys, values and filler for the training of the reference model.

No key comes from a list of words, as those of the tasks do.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

T = TypeVar("T")

SYLLABLES = [a + b for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er", "il", "on")]
_ONSETS = [
    "b", "bl", "br", "c", "ch", "cl", "cr", "d", "dr", "f", "fl", "fr", "g", "gl", "gr", "h", "j", "k", "l",
    "m", "n", "p", "pl", "pr", "qu", "r", "s", "sc", "sh", "sl", "sn", "sp", "st", "t", "th", "tr", "v",
    "w", "z",
]  # fmt: skip
_VOWELS = ["a", "e", "i", "o", "u", "a", "e", "i", "o", "u", "ai", "ea", "ee", "oa", "oo", "ou"]
_CODAS = [
    "", "", "", "b", "ck", "d", "ft", "l", "ll", "m", "mp", "n", "nd", "ng", "nk", "nt", "p", "r", "rd",
    "rn", "rt", "s", "sh", "st", "t", "th", "x",
]  # fmt: skip
_ENDINGS = [
    "", "", "", "er", "y", "le", "ing", "ed", "ion", "ous", "al", "ic", "ful", "ment", "et", "or", "ish",
    "ant",
]  # fmt: skip
_SMALL = [
    "the", "a", "of", "to", "and", "in", "that", "it", "is", "was", "for", "on", "with", "as", "at", "by",
    "from", "not", "but", "they", "had", "his", "her", "or", "which",
]  # fmt: skip
_LETTERS = np.array(list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"))
_HEXADECIMAL = np.array(list("0123456789abcdef"))
# Nouns of facts; more often than not an invented word replaces a part of one, or all of it.
_NOUNS = [
    "badge number", "invoice number", "serial number", "ticket", "phone extension", "reference", "score",
    "weight", "price", "room number", "postal code", "seat", "port", "shelf", "record", "token", "balance",
    "mileage", "id", "pin", "tag", "secret code", "magic number", "count", "label", "signal", "grade",
    "key number", "order number", "address", "height", "tax number", "registration", "value", "result",
    "batch", "lot number", "sample number",
]  # fmt: skip


class Words:
    """Draws words from one stream of random numbers; a `plain` one says everything in the first wording."""

    def __init__(self, rng: np.random.Generator, plain: bool = False) -> None:
        self.rng, self.plain = rng, plain

    def pick(self, choices: Sequence[T]) -> T:
        return choices[int(self.rng.integers(len(choices)))]

    def wording(self, wordings: Sequence[str]) -> str:
        return wordings[0] if self.plain else self.pick(wordings)

    def count(self, most: int) -> int:
        """Draw how many parts an answer has, rather many than few: one to `most`."""
        return int(self.rng.integers(1, most + 1, size=2).max())

    def name(self) -> str:
        return "".join(self.rng.choice(SYLLABLES, size=int(self.rng.integers(2, 5)))).capitalize()

    def word(self) -> str:
        """Draw one to three syllables that could be English."""
        syllables = int(self.rng.choice([1, 2, 3], p=[0.55, 0.4, 0.05]))
        parts = [self.pick(_ONSETS) + self.pick(_VOWELS) + self.pick(_CODAS) for _ in range(syllables)]
        return "".join(parts) + self.pick(_ENDINGS)

    def letters(self, low: int, high: int) -> str:
        return "".join(self.rng.choice(_LETTERS, size=int(self.rng.integers(low, high + 1))))

    def digits(self, size: int) -> str:
        """Draw a number without a leading zero."""
        return str(self.rng.integers(10 ** (size - 1), 10**size))

    def hexadecimal(self, size: int) -> str:
        return "".join(self.rng.choice(_HEXADECIMAL, size=size))

    def uuid(self) -> str:
        return "-".join(self.hexadecimal(size) for size in (8, 4, 4, 4, 12))

    def noun(self) -> str:
        """Draw the NOUN of `The NOUN of KEY is VALUE.`"""
        kind = self.rng.random()
        if kind < 0.4:
            return self.pick(_NOUNS)
        return f"{self.word()} {self.pick(_NOUNS).split()[-1]}" if kind < 0.8 else self.word()

    def keys(self, count: int) -> list[str]:
        """Draw different keys of one kind; some keys of two words share the first."""
        kind = int(self.rng.choice(8, p=[0.15, 0.15, 0.3, 0.1, 0.1, 0.1, 0.05, 0.05]))
        if self.plain and self.rng.random() < 0.5:
            kind = 2
        shared = self.word() if self.rng.random() < 0.2 else None

        def two(between: str) -> str:
            first = shared if shared and self.rng.random() < 0.3 else self.word()
            return first + between + self.word()

        made: tuple[Callable[[], str], ...] = (
            self.name,
            self.word,
            lambda: two("-"),
            lambda: two(" "),
            lambda: self.word().capitalize(),
            lambda: self.letters(3, 6),
            lambda: self.digits(5),
            lambda: self.hexadecimal(8),
        )
        return _different(made[kind], count)

    def values(self, count: int) -> list[str]:
        """Draw different values of one kind."""
        kind = int(self.rng.choice(5, p=[0.75, 0.08, 0.07, 0.03, 0.07]))
        size = int(self.rng.integers(4, 10))
        made: tuple[Callable[[], str], ...] = (
            lambda: self.digits(size),
            lambda: self.hexadecimal(8),
            self.word,
            self.uuid,
            lambda: self.letters(4, 7),
        )
        return _different(made[kind], count)

    def sentence(self) -> str:
        size = int(self.rng.integers(4, 13))
        small = self.rng.random(size) < 0.45
        text = " ".join(self.pick(_SMALL) if s else self.word() for s in small)
        return text[0].upper() + text[1:] + "."

    def line(self) -> str:
        """Draw a line of a few sentences, which the caller repeats."""
        return " ".join(self.sentence() for _ in range(int(self.rng.integers(1, 5)))) + "\n"

    def prose(self, size: int) -> str:
        """Draw sentences of at most `size` characters together."""
        text = ""
        while len(more := text + self.sentence() + " ") <= size:
            text = more
        return text


def _different(make: Callable[[], str], count: int) -> list[str]:
    found: dict[str, None] = {}
    while len(found) < count:
        found[make()] = None
    return list(found)
