"""Key-value retrieval: a JSON object of random pairs, and one key asked for (after Liu et al., 2023)."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

import numpy as np

from ...errors import UserError
from . import text
from .base import Answer, Sample, Task, ask, check_question, spread, title_of


@dataclasses.dataclass(frozen=True)
class KeyValue(Task):
    """Share of the values, eight hexadecimal digits or a UUID each, that are found again."""

    name = "key_value"
    metric = "exact match"
    chance = 0.0

    words: Literal["hexadecimal", "uuids"] = "hexadecimal"  # keys and values
    question: Literal["prefill", "after"] = "prefill"  # in the prompt, or after what stays was decided
    chat: bool = False  # ask in the model's own chat template; the answer's beginning is given as well

    def __post_init__(self) -> None:
        super().__post_init__()
        check_question(self.question)

    def sample(self, tokenizer: Any, seed: int, index: int) -> Sample:
        rng = self.random(seed, index)
        before, turn = text.frame(tokenizer, self.chat)
        separator, end = text.encode(tokenizer, ",\n "), text.encode(tokenizer, "}\n")
        key, value = self._word(rng), self._word(rng)
        lead = f'{{"{key}": "'
        question = text.encode(tokenizer, f"\n{lead}")
        if self.chat:
            question = text.encode(tokenizer, f'\nWhat is the value of "{key}"?') + turn
            question += text.encode(tokenizer, lead)
        asked = text.encode(tokenizer, f'"{key}": "{value}"')
        before += text.encode(tokenizer, "{")
        room = self.context - len(before) - len(asked) - len(end) - len(question)
        pairs: list[list[int]] = []
        while True:
            pair = text.encode(tokenizer, f'"{self._word(rng)}": "{self._word(rng)}"')
            if len(pair) + len(separator) > room:
                break
            pairs.append(pair)
            room -= len(pair) + len(separator)
        if not pairs:
            raise UserError(
                f"key_value needs a context for at least two pairs; {self.context} tokens are too few"
            )
        place = int(spread(index) * (len(pairs) + 1))
        depth = place / len(pairs)
        pairs.insert(place, asked)
        lines = pairs[0] + [token for pair in pairs[1:] for token in separator + pair]
        # What is left of the context are line breaks before the question.
        blank = text.encode(tokenizer, "\n")[-1:] * room
        facts = {"depth": depth, "pairs": len(pairs)}
        read = before + lines + end + blank
        return ask(read, [question], self.question, [value], characters=len(value), facts=facts)

    @property
    def title(self) -> str:
        return title_of(self.name, self.question)

    @property
    def limits(self) -> tuple[float, float]:
        return 0.0, 1.0

    def score(self, sample: Sample, answer: Answer) -> float:
        return float(answer.text[: len(sample.reference)] == sample.reference)

    def _word(self, rng: np.random.Generator) -> str:
        return text.uuid(rng) if self.words == "uuids" else f"{rng.integers(0, 2**32):08x}"
