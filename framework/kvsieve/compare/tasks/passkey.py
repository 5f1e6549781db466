"""A pass key, or a string of digits with repeats, hidden in noise (after InfiniteBench, arXiv:2402.13718).

Deviations: the noise is our own, a prompt has exactly `context` tokens, places are spread evenly over the
depth however many samples there are, and the beginning of the answer is given to chat models, too.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from . import haystack as hay
from . import metrics, text
from .base import Answer, Sample, Task, ask, check_question, spread, title_of

_NAMES = {"passkey": "pass key", "number_string": "sequence of digits"}
_INTRODUCTION = "Something important is hidden in a lot of noise. Find it and remember it.\n"
_DIGITS = 5
_SPARE = 4  # new tokens beyond the digits


@dataclasses.dataclass(frozen=True)
class Passkey(Task):
    """Share of the keys, five digits each (number_string: ten), that are the first number of an answer."""

    name = "passkey"
    metric = "exact match"
    chance = 0.0

    kind: Literal["passkey", "number_string"] = "passkey"
    question: Literal["prefill", "after"] = "prefill"  # in the prompt, or after what stays was decided
    chat: bool = False  # ask in the model's own chat template; the answer's beginning is given as well

    def __post_init__(self) -> None:
        super().__post_init__()
        check_question(self.question)

    @property
    def title(self) -> str:
        return title_of(self.kind, self.question)

    @property
    def limits(self) -> tuple[float, float]:
        return 0.0, 1.0

    def sample(self, tokenizer: Any, seed: int, index: int) -> Sample:
        what, key = _NAMES[self.kind], self._key(self.random(seed, index))
        begin, end = text.frame(tokenizer, self.chat)
        before = begin + text.encode(tokenizer, _INTRODUCTION)
        said = f"The {what} is {key}. Remember it. {key} is the {what}.\n"
        hidden = [(spread(index), text.encode(tokenizer, said))]
        asked, lead = f"\nWhat is the {what}?", f"The {what} is"
        after = text.encode(tokenizer, f"{asked}\n{lead}")
        if self.chat:
            after = text.encode(tokenizer, asked) + end + text.encode(tokenizer, lead)
        prompt = hay.hide(self.title, self.context, before, hay.noise(tokenizer), hidden, after)
        new_tokens = len(text.encode(tokenizer, f" {key}")) + _SPARE
        read, facts = prompt[: -len(after)], {"depth": spread(index)}
        return ask(read, [after], self.question, [key], new_tokens=new_tokens, facts=facts)

    def score(self, sample: Sample, answer: Answer) -> float:
        return float(metrics.first_number(answer.text) == sample.reference)

    def _key(self, rng: np.random.Generator) -> str:
        """Five digits; in a number string, five times one of them is doubled where it stands."""
        digits = [str(digit) for digit in rng.integers(10, size=_DIGITS)]
        for _ in range(_DIGITS if self.kind == "number_string" else 0):
            place = int(rng.integers(len(digits)))
            digits.insert(place, digits[place])
        return "".join(digits)
