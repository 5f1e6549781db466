"""Conversation: facts told in some of many turns, chatter between them, and a question in the last one."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError
from . import text
from .base import Answer, Sample, Task, check_range, spread
from .needle import NAMES


@dataclasses.dataclass(frozen=True)
class Conversation(Task):
    """Share of the facts, six digits each, that are found again turns after they were told.

    The turns are the segments of the prompt: policies that read turn by turn go by them.
    """

    name = "conversation"
    metric = "exact match"
    chance = 0.0

    turns: int = 16  # before the one that asks
    told: int = 4  # of these, turns that tell a fact; one of the facts is asked for
    text: str | None = None  # a text file to take the chatter from; none: held-out Python sources

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("turns", self.turns, 1, 1000)
        check_range("told", self.told, 1, min(self.turns, len(NAMES)))

    def sample(self, tokenizer: Any, seed: int, index: int) -> Sample:
        rng = self.random(seed, index)
        names = rng.permutation(NAMES)[: self.told]
        numbers = ["".join(map(str, rng.integers(0, 10, size=6))) for _ in names]
        # The fact that is asked for, in any turn as often; the others, in other turns.
        asked = int(spread(index) * self.turns)
        others = [int(turn) for turn in rng.permutation(self.turns) if turn != asked][: self.told - 1]
        opening, end = text.encode(tokenizer, "\nUser: "), text.encode(tokenizer, "\n")
        facts: dict[int, list[int]] = {}
        for turn, name, number in zip([asked, *others], names, numbers, strict=True):
            facts[turn] = text.encode(tokenizer, f"\nThe secret number of {name} is {number}.\n")
        before = text.beginning(tokenizer)
        question = text.encode(tokenizer, f"\nUser: \nThe secret number of {names[0]} is")
        fixed = len(before) + sum(map(len, facts.values())) + len(question)
        fixed += self.turns * (len(opening) + len(end))
        chatter = self.context - fixed
        if chatter < self.turns:
            raise UserError(
                f"conversation needs a context of at least {fixed + self.turns} tokens here, not "
                f"{self.context}: fewer turns, or a longer context"
            )
        hay, prompt, segments = text.passage(tokenizer, self.text, chatter, rng), before, []
        for turn in range(self.turns):
            part = hay[turn * chatter // self.turns : (turn + 1) * chatter // self.turns]
            start = len(prompt) if turn else 0
            prompt = prompt + opening + part + facts.get(turn, []) + end
            segments.append(len(prompt) - start)
        return Sample(
            prompt + question,
            [f" {numbers[0]}"],
            characters=7,
            segments=[*segments, len(question)],
            facts={"turns_ago": self.turns - asked},
        )

    @property
    def limits(self) -> tuple[float, float]:
        return 0.0, 1.0

    def score(self, sample: Sample, answer: Answer) -> float:
        return float(answer.text.lstrip()[:6] == sample.reference.strip())

    def files(self) -> Mapping[str, Path]:
        return text.named(self.text)

    def source(self) -> str:
        return text.digest(self.text)
