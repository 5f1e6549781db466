"""The SparQ paper's needle in a haystack (arXiv:2312.04985, Table 3): a sentence in essays to go on with.

Prompts are those of the authors' code (llm-inference-research@ead9b6a): `context` - 128 tokens of essays, and
every piece is tokenised alone. Deviations: an answer ends where the model ends it, and a tokenizer that needs
more than 128 tokens for needle, question and answer gets them.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np

from ...errors import UserError
from . import text
from .base import Answer, Sample, check_range
from .hub import DataSet
from .rows import FromRows

_ROOM = 128  # tokens for needle, question and answer; more where a tokenizer needs more
_PREFIX = "Articles by Paul Graham:\n"
_REFERENCE = "eat a sandwich and sit in Dolores Park on a sunny day"
_NEEDLE = f"The best thing to do in San Francisco is to {_REFERENCE}.\n"
_QUESTION = (
    '.\n\n\nWhat is the best thing to do in San Francisco? "The best thing to do in San Francisco is to'
)
_SHUFFLE = 4852341


@dataclasses.dataclass(frozen=True)
class SparqNeedle(FromRows):
    """Share of the answers that go on as the needle does. The paper's contexts are 1,024 to 32,768."""

    name = "sparq_needle"
    metric = "match"
    chance = 0.0
    hub = DataSet(
        "Mindofmachine/paul_graham_and_sam_altman_articles",
        None,
        "train",
        "e63d4aa9a59da7f95a766af6437ee3e465e1f360",
    )
    columns = ("content",)

    samples: int = 17
    depths: int = 17  # of the needle, from the beginning to the end; sample i is at the i-th

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("depths", self.depths, 2, 10_000)

    @property
    def limits(self) -> tuple[float, float]:
        return 0.0, 1.0

    def sample(self, tokenizer: Any, seed: int, index: int) -> Sample:
        if max(self.samples, index + 1) > self.depths:
            raise UserError(f"{self.name} has {self.depths} depths: samples cannot be {self.samples}")
        depth = float(np.linspace(0, 1, self.depths)[index])
        before = text.beginning(tokenizer) + text.encode(tokenizer, _PREFIX)
        inside, at_the_start = (text.encode(tokenizer, start + _NEEDLE) for start in (".\n", ""))
        question = text.encode(tokenizer, _QUESTION)
        new_tokens = 5 + len(text.encode(tokenizer, _REFERENCE))
        room = max(_ROOM, len(before) + len(inside) + len(question) + new_tokens)
        length = self.context - room
        if length < 1:
            raise UserError(f"{self.name} needs a context of at least {room + 1} tokens, not {self.context}")
        hay = _essays(dataclasses.replace(self, samples=1), tokenizer)
        if len(hay) < length:
            raise UserError(f"{self.where}: has {len(hay)} tokens, and {self.name} needs {length} of them")
        place = int(depth * length)
        needle = inside if place else at_the_start
        prompt = before + hay[:place] + needle + hay[place:length] + question
        return Sample(prompt, [_REFERENCE], new_tokens=new_tokens, facts={"depth": depth})

    def score(self, sample: Sample, answer: Answer) -> float:
        return float(answer.text.lstrip().startswith(sample.reference))


@functools.cache
def _essays(task: SparqNeedle, tokenizer: Any) -> list[int]:
    """The first tokens of all essays, in the authors' order; more than a context has."""
    essays = [row["content"] for row in task.rows()]
    np.random.RandomState(_SHUFFLE).shuffle(essays)
    longest = int(1 + np.mean([len(token) for token in tokenizer.get_vocab()]))
    return text.encode(tokenizer, "\n\n".join(essays)[: longest * task.context])
