"""The base of all tasks: prompts of an exact length with a known answer, and a score for an answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

MOST_TOKENS = 2**24
MOST_SAMPLES = 1_000_000


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt and its right continuation."""

    prompt: list[int]  # token ids, exactly the task's context
    reference: str
    characters: int = 0  # decode until this many characters are there
    forced: Sequence[int] = ()  # token ids to be scored one by one, instead of decoding freely


@dataclasses.dataclass(frozen=True)
class Answer:
    """A model's answer to a sample."""

    text: str = ""  # what was decoded
    log_probabilities: Sequence[float] = ()  # natural log, of the sample's forced tokens


@dataclasses.dataclass(frozen=True)
class Task:
    """Base of all tasks: a frozen dataclass whose fields are its parameters and its YAML keys.

    Sample i is a function of the tokenizer, the seed and i alone: asking for more does not change the first.
    """

    name: ClassVar[str] = ""
    metric: ClassVar[str] = ""
    higher_is_better: ClassVar[bool] = True
    chance: ClassVar[float | None] = None  # the score of a model that knows nothing; None: not known

    context: int = 1024  # tokens in the prompt
    samples: int = 32

    def __post_init__(self) -> None:
        for field, most in (("context", MOST_TOKENS), ("samples", MOST_SAMPLES)):
            check_range(field, getattr(self, field), 1, most)

    def sample(self, tokenizer: Any, seed: int, index: int) -> Sample:
        """The sample `index`, whose prompt is exactly `context` tokens long with this tokenizer.

        Raises:
            UserError: the context is too short for the task, or the text for the context.
        """
        raise NotImplementedError

    @property
    def title(self) -> str:
        """Its name in tables."""
        return self.name

    @property
    def limits(self) -> tuple[float, float] | None:
        """The lowest and the highest score of a sample. None: there are none, or none are known."""
        return None

    def files(self) -> Mapping[str, Path]:
        """The text files that prompts are made of, by the parameter that names them."""
        return {}

    def code(self) -> Mapping[str, Path]:
        """The folders whose code the task runs, by their parameter; the user must allow them."""
        return {}

    def positions(self) -> int | None:
        """Positions that a prompt and its answer need at least; None: not known before prompts are made."""
        return self.context + 1

    def answer(
        self, model: Any, policy: Any, samples: Sequence[Sample]
    ) -> tuple[Sequence[Answer], int] | None:
        """Answer samples that take more than one prompt each; and the most bytes of KV cache held at a time.

        None, right for most tasks: the answer is decoded after a sample's prompt, or is the probabilities
        of its forced tokens.
        """
        return None

    def score(self, sample: Sample, answer: Answer) -> float:
        """Score the answer in the task's metric."""
        raise NotImplementedError

    def source(self) -> str:
        """A digest of the text that prompts are made of: results from another text are never mixed in."""
        return ""

    def random(self, seed: int, index: int) -> np.random.Generator:
        """The random numbers of one sample."""
        return np.random.default_rng([seed, index, *self.name.encode()])


def check_range(name: str, value: int, least: int, most: int) -> None:
    """Raise ValueError unless `least <= value <= most`."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, not {value}")


def spread(index: int) -> float:
    """A number in [0, 1) per index; however many, they lie evenly (multiples of the golden ratio)."""
    return (0.5 + index * 0.6180339887498949) % 1.0
