"""Real words for prompts, from the lists of the package wonderwords."""

from __future__ import annotations

import functools
import re
from importlib import resources
from typing import NamedTuple

import numpy as np

from ... import corpus

_WORD = re.compile(r"[a-z]{3,9}")


class Words(NamedTuple):
    """English words of 3 to 9 letters, each list sorted, without offensive ones."""

    nouns: list[str]
    adjectives: list[str]
    verbs: list[str]

    def unheard(self) -> Words:
        """Those that begin with a vowel: no word that the reference model was trained on does."""
        return Words(*([word for word in some if word[0] in "aeiou"] for some in self))


@functools.cache
def words() -> Words:
    """The lists of the installed version."""
    offensive = set(_lines("profanity"))
    kinds = ("noun", "adjective", "verb")
    return Words(*(sorted({w for w in _lines(kind) if _WORD.fullmatch(w)} - offensive) for kind in kinds))


@functools.cache
def digest() -> str:
    """Of all lists: prompts from other lists are another protocol."""
    return corpus.digest("\n".join(" ".join(some) for some in words()))


def pairs(rng: np.random.Generator, count: int) -> list[str]:
    """Draw so many different keys such as `idle-acorn`."""
    nouns, adjectives, _ = words().unheard()
    drawn = rng.choice(len(nouns) * len(adjectives), size=count, replace=False)
    return [f"{adjectives[n // len(nouns)]}-{nouns[n % len(nouns)]}" for n in drawn]


def singles(rng: np.random.Generator, count: int) -> list[str]:
    """Draw so many different words; pairs where there are no more."""
    known = sorted({word for some in words().unheard() for word in some})
    drawn = [known[n] for n in rng.permutation(len(known))[:count]]
    return drawn + pairs(rng, max(0, count - len(drawn)))


def _lines(kind: str) -> list[str]:
    return resources.files("wonderwords.assets").joinpath(f"{kind}list.txt").read_text("utf-8").split("\n")
