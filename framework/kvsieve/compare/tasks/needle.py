"""Needle in a haystack: a number hidden anywhere in a long text, asked for at its end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError
from . import text
from .base import Answer, Sample, Task, spread

# Real names; none of them can be put together from the syllables that the reference model was trained on.
_NAMES = [
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

    distractors: int = 0  # other names with other numbers, hidden in the same text
    text: str | None = None  # a text file to hide the number in; none: held-out Python sources

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.distractors < len(_NAMES):
            raise ValueError(f"distractors must be 0 to {len(_NAMES) - 1}, not {self.distractors}")

    def sample(self, tokenizer: Any, seed: int, index: int) -> Sample:
        rng = self.random(seed, index)
        names = rng.permutation(_NAMES)[: 1 + self.distractors]
        numbers = ["".join(map(str, rng.integers(0, 10, size=6))) for _ in names]
        depths = [spread(index), *rng.random(self.distractors)]
        hidden = [
            text.encode(tokenizer, f"\nThe secret number of {name} is {number}.\n")
            for name, number in zip(names, numbers, strict=True)
        ]
        before = text.beginning(tokenizer)
        question = text.encode(tokenizer, f"\nThe secret number of {names[0]} is")
        fixed = len(before) + sum(map(len, hidden)) + len(question)
        if fixed > self.context:
            raise UserError(f"needle needs a context of at least {fixed} tokens here, not {self.context}")
        hay = text.passage(tokenizer, self.text, self.context - fixed, rng)
        prompt, start = before, 0
        for depth, needle in sorted(zip(depths, hidden, strict=True)):
            place = round(depth * len(hay))
            prompt = prompt + hay[start:place] + needle
            start = place
        prompt = prompt + hay[start:] + question
        return Sample(prompt, [f" {numbers[0]}"], characters=7, facts={"depth": depths[0]})

    @property
    def limits(self) -> tuple[float, float]:
        return 0.0, 1.0

    def score(self, sample: Sample, answer: Answer) -> float:
        return float(answer.text.lstrip()[:6] == sample.reference.strip())

    def files(self) -> Mapping[str, Path]:
        return text.named(self.text)

    def source(self) -> str:
        return text.digest(self.text)
