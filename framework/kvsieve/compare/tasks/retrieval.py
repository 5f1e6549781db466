"""Retrieval: facts hidden in a long text, chains of assignments, and words that stand often in a list.

The structure is that of RULER (Hsieh et al., 2024, arXiv:2404.06654), the wordings are our own: scores are
not RULER's. Deviations: a prompt is exactly as long as the context, and the tokens of the answer come on top;
one fact is asked for at evenly spread depths; no solved example stands before a question; the common words
are listed without numbers.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from . import haystack as hay
from . import metrics, text, words
from .base import Answer, Sample, Task, ask, check_question, check_range, spread, title_of

Kind = Literal["single", "multikey", "multivalue", "multiquery", "tracking", "common_words", "frequent_words"]
_FACT = "The password for {key} is {value}."
_INTRODUCTION = "Remember what this text says: there will be a question about it at its end.\n"
_COMMON = 10  # words that are asked for
_ZETA_2 = math.pi**2 / 6  # the share of rank k among frequent words is 1 / (k**2 * zeta(2))
_SPARE = 16  # new tokens beyond those of a wordy answer


class Draft(NamedTuple):
    """A sample before it is fitted to a context."""

    hidden: list[tuple[float, str]]  # depth and text of each statement
    question: str
    references: list[str]
    wordy: str  # a long way to say them
    facts: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Retrieval(Task):
    """Share of the references that an answer contains: values of keys, names of a chain, frequent words."""

    name = "retrieval"
    metric = "share found"
    chance = 0.0

    kind: Kind = "single"
    parts: int = 4  # keys, values, queries or hops, in the kinds that have several
    values: Literal["numbers", "uuids"] = "numbers"
    # "statements": all of the text are other keys with their values.
    haystack: Literal["prose", "noise", "statements"] = "prose"
    question: Literal["prefill", "after"] = "prefill"  # in the prompt, or after what stays was decided
    text: str | None = None  # a text file to hide statements in, in place of the haystack
    chat: bool = False  # ask in the model's own chat template; the answer's beginning is given as well

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("parts", self.parts, 1, 1000)
        check_question(self.question)

    @property
    def title(self) -> str:
        return title_of(f"{self.name} {self.kind}", self.question)

    @property
    def limits(self) -> tuple[float, float]:
        return 0.0, 1.0

    def files(self) -> Mapping[str, Path]:
        return text.named(self.text)

    def source(self) -> str:
        return words.digest() + (text.digest(self.text) if self.text else "")

    def score(self, sample: Sample, answer: Answer) -> float:
        return metrics.share_found(answer.text, sample.references)

    def sample(self, tokenizer: Any, seed: int, index: int) -> Sample:
        rng = self.random(seed, index)
        if self.kind in ("common_words", "frequent_words"):
            return self._list_of_words(tokenizer, rng)
        draft = self._chain(rng) if self.kind == "tracking" else self._facts(rng, index)
        before, after = self._around(tokenizer, draft.question)
        hidden = [(depth, text.encode(tokenizer, said + "\n")) for depth, said in draft.hidden]
        units = self._units(tokenizer, rng, draft)
        prompt = hay.hide(self.title, self.context, before, units, hidden, after)
        return self._asked(tokenizer, prompt, after, draft)

    def _around(self, tokenizer: Any, question: str) -> tuple[list[int], list[int]]:
        """The ids before and after the text; in a chat the question's last line begins the answer."""
        begin, end = text.frame(tokenizer, self.chat)
        before = begin + text.encode(tokenizer, _INTRODUCTION)
        if not self.chat:
            return before, text.encode(tokenizer, question)
        asked, _, lead = question.rpartition("\n")
        return before, text.encode(tokenizer, asked) + end + text.encode(tokenizer, lead)

    def _asked(self, tokenizer: Any, prompt: list[int], after: list[int], draft: Draft) -> Sample:
        """The sample of a prompt that ends with the question `after`."""
        more: dict[str, Any] = {
            "needs": "all",
            "new_tokens": len(text.encode(tokenizer, draft.wordy)) + _SPARE,
            "facts": {"kind": self.kind} | draft.facts,
        }
        return ask(prompt[: -len(after)], [after], self.question, draft.references, **more)

    def _units(self, tokenizer: Any, rng: np.random.Generator, draft: Draft) -> hay.Units:
        if self.text is not None:
            return hay.lines(tokenizer, self.text, rng)
        if self.haystack == "prose":
            return hay.prose(tokenizer, rng)
        if self.haystack == "noise":
            return hay.noise(tokenizer)

        stated = " ".join(said for _, said in draft.hidden)

        def other() -> str:
            key = words.pairs(rng, 1)[0]
            return other() if key in stated else _FACT.format(key=key, value=self._value(rng))

        return hay.said(tokenizer, other)

    # ---------------------------------------------------------------- facts
    def _facts(self, rng: np.random.Generator, index: int) -> Draft:
        """One value for each of several keys, or several for one; one key is asked for, or all."""
        keys = words.pairs(rng, self.parts if self.kind in ("multikey", "multiquery") else 1)
        each = self.parts if self.kind == "multivalue" else 1
        stated = [(key, self._value(rng)) for key in keys for _ in range(each)]
        asked = keys if self.kind == "multiquery" else keys[:1]
        depths = [spread(index), *rng.random(len(stated) - 1).tolist()]
        # In the order of the text, which an answer may follow.
        of_asked = sorted((d, k, v) for d, (k, v) in zip(depths, stated, strict=True) if k in asked)
        references = [value for _, _, value in of_asked]
        several = len(references) > 1
        listed = " and ".join(filter(None, [", ".join(asked[:-1]), asked[-1]]))
        question = f"\nWhat is the password for {listed}?\nThe password for {listed} is"
        if several:
            question = f"\nWhat are all the passwords for {listed}?\nThe passwords for {listed} are"
        return Draft(
            [(d, _FACT.format(key=k, value=v)) for d, (k, v) in zip(depths, stated, strict=True)],
            question,
            references,
            ", ".join(f"{key}: {value}" for _, key, value in of_asked),
            {"depths": [d for d, _, _ in of_asked]} if several else {"depth": depths[0]},
        )

    def _value(self, rng: np.random.Generator) -> str:
        return text.uuid(rng) if self.values == "uuids" else str(rng.integers(10**6, 10**7))

    def _chain(self, rng: np.random.Generator) -> Draft:
        """A number is assigned to a name, that to another, and so on; all names are asked for."""
        names: dict[str, None] = {}
        while len(names) < self.parts + 1:
            names["".join(chr(65 + letter) for letter in rng.integers(26, size=5))] = None
        held, value = list(names), str(rng.integers(10**4, 10**5))
        depths = sorted(rng.random(len(held)).tolist())
        said = [f"{b} is equal to {a}." for a, b in itertools.pairwise([value, *held])]
        question = (
            f"\nFind all variables that are equal to {value}.\nThe variables with the value {value} are"
        )
        facts = {"depths": depths, "level": self.parts}
        return Draft(
            list(zip(depths, said, strict=True)), question, held, "VAR " + ", VAR ".join(held), facts
        )

    # ---------------------------------------------------------------- words of a list
    def _list_of_words(self, tokenizer: Any, rng: np.random.Generator) -> Sample:
        """A list in which some words stand more often than others; these are asked for."""
        common = self.kind == "common_words"
        count = _COMMON if common else 3
        leave = "" if common else ", dots apart"
        question = f"\n\nWhat are the {count} most frequent words in the list{leave}?\nAnswer:"
        before, after = self._around(tokenizer, question)
        room = self.context - len(before) - len(after)
        find = self._common if common else self._frequent
        references, listed = find(tokenizer, rng, room)
        items = [ids for ids, repeats in listed for _ in range(repeats)]
        body = [token for i in rng.permutation(len(items)) for token in items[i]]
        # What is left of the context are line breaks before the question.
        blank = text.encode(tokenizer, "\n")[-1:] * (room - len(body))
        wordy = " ".join(f"{i}. {word}" for i, word in enumerate(references, start=1))
        draft = Draft([], question, references, wordy, {"words": len(items)})
        return self._asked(tokenizer, before + body + blank + after, after, draft)

    def _common(
        self, tokenizer: Any, rng: np.random.Generator, room: int
    ) -> tuple[list[str], list[tuple[list[int], int]]]:
        """Ten words stand 30 times and all others 3 times; in contexts below 4,096, 6 times and once."""
        often, seldom = (30, 3) if self.context >= 4096 else (6, 1)
        drawn = words.singles(rng, _COMMON + max(1, room // seldom))
        listed: list[tuple[list[int], int]] = []
        for n, word in enumerate(drawn):
            ids, repeats = text.encode(tokenizer, f" {word}"), often if n < _COMMON else seldom
            if len(ids) * repeats > room and n > _COMMON:
                break
            listed.append((ids, repeats))
            room -= len(ids) * repeats
            if n == _COMMON:
                self._check_room(room)
        return drawn[:_COMMON], listed

    def _frequent(
        self, tokenizer: Any, rng: np.random.Generator, room: int
    ) -> tuple[list[str], list[tuple[list[int], int]]]:
        """Invented words, by Zipf's law with exponent 2; the first rank are dots, ranks 2 to 4 the answer."""
        ranks = max(6, self.context // 50)
        letters = rng.integers(26, size=(ranks, 6))
        drawn = ["...", *dict.fromkeys("".join(chr(97 + letter) for letter in word) for word in letters)]
        encoded = [text.encode(tokenizer, f" {word}") for word in drawn]

        def counts(total: int) -> list[int]:
            return [int(total / (rank**2 * _ZETA_2)) for rank in range(1, len(drawn) + 1)]

        def cost(total: int) -> int:
            return sum(len(ids) * n for ids, n in zip(encoded, counts(total), strict=True))

        total = next(n for n in itertools.count(1) if counts(n)[3] > counts(n)[4])
        self._check_room(room - cost(total))
        step = 1 << max(1, room).bit_length()
        while step:
            total, step = (total + step if cost(total + step) <= room else total), step // 2
        return drawn[1:4], list(zip(encoded, counts(total), strict=True))

    def _check_room(self, left: int) -> None:
        if left < 0:
            raise hay.too_short(self.title, self.context, -left)
