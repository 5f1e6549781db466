"""The base of all tasks: prompts of an exact length with a known answer, and a score for an answer."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

MOST_TOKENS = 2**24
MOST_SAMPLES = 1_000_000


@dataclasses.dataclass(frozen=True)
class Sample:
    """One prompt and what a right answer to it holds.

    An answer is decoded until it has `new_tokens` tokens or `characters` characters, until one of `stop`
    stands in it, or the model ends it, whichever comes first. `stop` and the end are no part of its text.

    Raises:
        ValueError: `references` is a single text, empty, or not one for each question; `segments` do not add
            up to the prompt; `facts` are not plain data.
    """

    prompt: Sequence[int]  # token ids, at most the task's context
    references: Sequence[str]  # right answers, or the parts of one
    needs: Literal["any", "all"] = "any"  # of the references
    new_tokens: int | None = None  # None: as many as the references have bytes
    characters: int | None = None
    stop: Sequence[str] = ()
    forced: Sequence[int] = ()  # token ids to be scored one by one, instead of decoding freely
    # Tokens of the prompt's parts: context and question, say, or turns. None: it is one.
    segments: Sequence[int] = ()
    # Token ids, asked once the policy has read the prompt and decided who stays, each of a copy of what was
    # kept; of several, the right answer to each is the reference of its number. None: the prompt asks.
    questions: Sequence[Sequence[int]] = ()
    # Plain data that is stored with the result, such as depth, level, document.
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("references", "stop"):
            if isinstance(getattr(self, name), str):
                raise ValueError(f"{name} are a list of texts, not the text {getattr(self, name)[:40]!r}")
        if not self.references:
            raise ValueError("a sample needs a reference at least")
        if len(self.questions) > 1 and len(self.questions) != len(self.references):
            raise ValueError(f"{len(self.questions)} questions have {len(self.references)} references")
        if self.segments and sum(self.segments) != len(self.prompt):
            raise ValueError(f"the segments {list(self.segments)} of a prompt of {len(self.prompt)} tokens")
        try:
            json.dumps(self.facts, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"the facts of a sample are not plain data: {error}") from None

    @property
    def reference(self) -> str:
        """The only reference, or the first."""
        return self.references[0]

    @property
    def limit(self) -> int:
        """Tokens that are decoded, or scored, at most: no tokenizer takes more tokens than bytes."""
        if self.forced:
            return len(self.forced)
        if self.new_tokens is not None:
            return self.new_tokens
        sizes = [len(text.encode()) for text in self.references]
        one = self.needs == "any" or len(self.questions) > 1
        return max(1, max(sizes) if one else sum(sizes) + 2 * (len(sizes) - 1))

    def asked(self, number: int) -> Sample:
        """Return the sample that question `number` after the prompt is."""
        prompt = [*self.prompt, *self.questions[number]]
        whole = dataclasses.replace(self, prompt=prompt, segments=(), questions=())
        if len(self.questions) == 1:
            return whole
        return dataclasses.replace(whole, references=[self.references[number]], needs="any")


@dataclasses.dataclass(frozen=True)
class Answer:
    """A model's answer to a sample."""

    text: str = ""  # what was decoded, up to a stop text or the model's end; of several, with " | " between
    texts: Sequence[str] = ()  # the answer to each of the sample's `questions`
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

    context: int = 1024  # tokens in a prompt, at most
    samples: int = 32

    def __post_init__(self) -> None:
        for field, most in (("context", MOST_TOKENS), ("samples", MOST_SAMPLES)):
            check_range(field, getattr(self, field), 1, most)

    def sample(self, tokenizer: Any, seed: int, index: int) -> Sample:
        """The sample `index`, whose prompt has `context` tokens with this tokenizer, or fewer.

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


def ask(
    context: Sequence[int],
    questions: Sequence[Sequence[int]],
    question: str,
    references: Sequence[str],
    **more: Any,
) -> Sample:
    """Make the sample that asks a question in its prompt ("prefill"), or questions after it ("after")."""
    if question == "after":
        return Sample(context, references, questions=questions, **more)
    (only,) = questions
    return Sample([*context, *only], references, segments=(len(context), len(only)), **more)


def title_of(name: str, question: str, questions: int = 1) -> str:
    """`needle`, `needle asked after`, or `needle 4 asked after`: cut without knowing the question."""
    if question == "prefill":
        return name
    return f"{name} asked after" if questions == 1 else f"{name} {questions} asked after"


def check_question(question: str) -> None:
    """Raise ValueError unless it says where a question stands: "prefill" or "after"."""
    if question not in ("prefill", "after"):
        raise ValueError(f"question must be 'prefill' or 'after', not {question!r}")


def check_range(name: str, value: int, least: int, most: int) -> None:
    """Raise ValueError unless `least <= value <= most`."""
    if value < least:
        raise ValueError(f"{name} must be at least {least}, not {value}")
    if value > most:
        raise ValueError(f"{name} must be at most {most}, not {value}")


def spread(index: int) -> float:
    """A number in [0, 1) per index; however many, they lie evenly (multiples of the golden ratio)."""
    return (0.5 + index * 0.6180339887498949) % 1.0
