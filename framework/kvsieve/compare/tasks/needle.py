"""Needle in a haystack: a number hidden anywhere in a long text, asked for at its end, or after it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from ...errors import UserError
from . import text
from .base import Answer, Sample, Task, ask, check_question, check_range, spread, title_of

# Real names; none of them can be put together from the syllables that the reference model was trained on.
NAMES = [
    "Accra", "Adelaide", "Amsterdam", "Ankara", "Antwerp", "Asmara", "Athens", "Auckland", "Baghdad",
    "Bangkok", "Belgrade", "Bergen", "Boston", "Brisbane", "Brussels", "Budapest", "Calgary", "Cardiff",
    "Chennai", "Chicago", "Cologne", "Copenhagen", "Cracow", "Dakar", "Damascus", "Delhi", "Dhaka",
    "Dresden", "Dublin", "Edinburgh", "Florence", "Frankfurt", "Glasgow", "Hamburg", "Hanoi", "Helsinki",
    "Houston", "Istanbul", "Jakarta", "Karachi", "Kyiv", "Kyoto", "Lagos", "Leipzig", "Lisbon", "Lucknow",
    "Lyon", "Madrid", "Melbourne", "Montreal", "Moscow", "Mumbai", "Munich", "Nairobi", "Naples", "Nicosia",
    "Osaka", "Oslo", "Ottawa", "Oxford", "Paris", "Phoenix", "Prague", "Quebec", "Quito", "Reykjavik",
    "Rotterdam", "Salzburg", "Santiago", "Seattle", "Seoul", "Shanghai", "Sofia", "Stockholm", "Stuttgart",
    "Sydney", "Tallinn", "Tashkent", "Tbilisi", "Tehran", "Thessaloniki", "Tokyo", "Toulouse", "Trieste",
    "Tripoli", "Tunis", "Turku", "Utrecht", "Valencia", "Vancouver", "Vienna", "Warsaw", "Yokohama",
    "Zagreb", "Zurich",
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Needle(Task):
    """Share of the numbers, six digits each, that are found again."""

    name = "needle"
    metric = "exact match"
    chance = 0.0

    question: Literal["prefill", "after"] = "prefill"  # in the prompt, or after what stays was decided
    questions: int = 1  # numbers that are asked for, each after a copy of what stays of one text
    distractors: int = 0  # other names with other numbers, hidden in the same text
    text: str | None = None  # a text file to hide the number in; none: held-out Python sources
    chat: bool = False  # ask in the model's own chat template; the answer's beginning is given as well

    def __post_init__(self) -> None:
        super().__post_init__()
        check_question(self.question)
        check_range("questions", self.questions, 1, len(NAMES))
        if self.questions > 1 and self.question == "prefill":
            raise ValueError(f"{self.questions} questions cannot be in one prompt: give `question: after`")
        most = len(NAMES) - self.questions
        if not 0 <= self.distractors <= most:
            raise ValueError(f"distractors must be 0 to {most}, not {self.distractors}")

    def sample(self, tokenizer: Any, seed: int, index: int) -> Sample:
        rng = self.random(seed, index)
        asked = self.questions
        names = rng.permutation(NAMES)[: asked + self.distractors]
        numbers = ["".join(map(str, rng.integers(0, 10, size=6))) for _ in names]
        depths = [*(spread(index * asked + i) for i in range(asked)), *rng.random(self.distractors)]
        hidden = [
            text.encode(tokenizer, f"\nThe secret number of {name} is {number}.\n")
            for name, number in zip(names, numbers, strict=True)
        ]
        before, end = text.frame(tokenizer, self.chat)
        questions = [self._question(tokenizer, end, name) for name in names[:asked]]
        fixed = len(before) + sum(map(len, hidden)) + max(map(len, questions))
        if fixed > self.context:
            raise UserError(f"needle needs a context of at least {fixed} tokens here, not {self.context}")
        hay = text.passage(tokenizer, self.text, self.context - fixed, rng)
        prompt, start = before, 0
        for depth, needle in sorted(zip(depths, hidden, strict=True)):
            place = round(depth * len(hay))
            prompt = prompt + hay[start:place] + needle
            start = place
        references = [f" {number}" for number in numbers[:asked]]
        facts = {"depth": depths[0]} if asked == 1 else {"depths": depths[:asked]}
        return ask(prompt + hay[start:], questions, self.question, references, characters=7, facts=facts)

    def _question(self, tokenizer: Any, end: list[int], name: str) -> list[int]:
        """The beginning of an answer; in a chat after a question and the `end` of the user's turn."""
        if not self.chat:
            return text.encode(tokenizer, f"\nThe secret number of {name} is")
        asked = text.encode(tokenizer, f"\nWhat is the secret number of {name}?")
        return asked + end + text.encode(tokenizer, f"The secret number of {name} is")

    @property
    def title(self) -> str:
        return title_of(self.name, self.question, self.questions)

    @property
    def limits(self) -> tuple[float, float]:
        return 0.0, 1.0

    def score(self, sample: Sample, answer: Answer) -> float:
        said = answer.texts or [answer.text] * len(sample.references)
        right = [
            text.lstrip()[:6] == wanted.strip() for text, wanted in zip(said, sample.references, strict=True)
        ]
        return sum(right) / len(right)

    def files(self) -> Mapping[str, Path]:
        return text.named(self.text)

    def source(self) -> str:
        return text.digest(self.text)
