"""Perplexity: how well a text is predicted, token by token on the decode path, so that the policy acts."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import text
from .base import MOST_TOKENS, Answer, Sample, Task, check_range


@dataclasses.dataclass(frozen=True)
class Perplexity(Task):
    """Bits per byte of what follows a passage: the first token from the prefill, others fed one by one.

    Both end with a whole character, up to three tokens earlier than asked for where a tokenizer splits some.
    """

    name = "perplexity"
    metric = "bits per byte"
    higher_is_better = False
    chance = 8.0  # a byte has eight bits: nothing was predicted

    tokens: int = 128  # that are predicted after the context
    text: str | None = None  # a text file to predict; none: held-out Python sources

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tokens < 2:
            raise ValueError(
                f"tokens must be at least 2 (the first comes from the prefill), not {self.tokens}"
            )
        check_range("tokens", self.tokens, 2, MOST_TOKENS)

    def positions(self) -> int:
        return self.context + self.tokens

    def sample(self, tokenizer: Any, seed: int, index: int) -> Sample:
        before = text.beginning(tokenizer)
        room = self.context - len(before)
        ids = text.passage(tokenizer, self.text, room + self.tokens, self.random(seed, index))
        # Where a character ends: its bytes count with all of its tokens, or not at all.
        start, end = (text.whole_characters(tokenizer, ids, number) for number in (room, len(ids)))
        if end - start < 2:
            start, end = room, len(ids)
        known = text.decode(tokenizer, ids[:start])
        reference = text.decode(tokenizer, ids[:end])[len(known) :]
        return Sample(before + ids[:start], [reference], forced=ids[start:end])

    def score(self, sample: Sample, answer: Answer) -> float:
        return -sum(answer.log_probabilities) / math.log(2) / len(sample.reference.encode())

    def files(self) -> Mapping[str, Path]:
        return text.named(self.text)

    def source(self) -> str:
        return text.digest(self.text)
