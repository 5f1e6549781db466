"""Repetition: a passage begins anew at the end of its text; go on as it went on there (as in SparQ)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...errors import UserError
from . import text
from .base import MOST_TOKENS, Answer, Sample, Task, check_range


@dataclasses.dataclass(frozen=True)
class Repetition(Task):
    """Characters that are right before the first wrong one. The paper's lengths are 128 and 256."""

    name = "repetition"
    metric = "matching characters"
    chance = 0.0

    prompt: int = 64  # characters that say which passage is meant
    length: int = 64  # characters to go on with: the highest score
    text: str | None = None  # a text file to repeat from; none: held-out Python sources

    def __post_init__(self) -> None:
        super().__post_init__()
        for field in ("prompt", "length"):
            check_range(field, getattr(self, field), 1, MOST_TOKENS)

    def sample(self, tokenizer: Any, seed: int, index: int) -> Sample:
        rng = self.random(seed, index)
        before = text.beginning(tokenizer)
        room = self.context - len(before)
        body = text.passage(tokenizer, self.text, room, rng)
        # Tokens for the question; grows if need be.
        reserved = len(text.encode(tokenizer, "\n" + "x" * self.prompt))
        for _ in range(1000):
            visible = text.decode(tokenizer, body[: max(0, room - reserved)])
            last = len(visible) - self.prompt - self.length
            if last < 0:
                break
            start = int(rng.integers(0, last + 1))
            asked = visible[start : start + self.prompt]
            question = text.encode(tokenizer, "\n" + asked)
            if len(question) > reserved:
                reserved = len(question)
            elif visible.count(asked) == 1:  # else the question would have two right answers
                reference = visible[start + self.prompt : start + self.prompt + self.length]
                prompt = before + body[: room - len(question)] + question
                facts = {"depth": start / len(visible)}
                return Sample(prompt, [reference], characters=self.length + 1, facts=facts)
        raise UserError(
            f"repetition found no {self.prompt} + {self.length} characters that stand only once in a text of "
            f"{self.context} tokens: give a longer context, or a text that repeats itself less"
        )

    @property
    def limits(self) -> tuple[float, float]:
        return 0.0, float(self.length)

    def score(self, sample: Sample, answer: Answer) -> float:
        given, wanted = answer.text, sample.reference
        if given[:1] == " " != wanted[:1]:  # some tokenizers put a space before the first word
            given = given[1:]
        elif wanted[:1] == " " != given[:1]:  # and some take it away
            given = " " + given
        pairs = zip(given, wanted, strict=False)
        return float(next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(given), len(wanted))))

    def files(self) -> Mapping[str, Path]:
        return text.named(self.text)

    def source(self) -> str:
        return text.digest(self.text)
