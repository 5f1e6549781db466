"""Find a line in a list of lines (after LongEval's line retrieval): a task in a package of its own."""

from dataclasses import dataclass
from typing import ClassVar

import kvsieve


@dataclass(frozen=True)
class Lines(kvsieve.Task):
    """Share of the numbers, five digits each, that are found again."""

    name: ClassVar[str] = "lines"
    metric: ClassVar[str] = "exact match"
    chance: ClassVar[float] = 0.0
    limits = (0.0, 1.0)  # the lowest and the highest score

    def sample(self, tokenizer, seed, index):
        rng = self.random(seed, index)
        keys = [f"{key:06}" for key in rng.permutation(10**6)[: self.context]]
        values = [f"{value:05}" for value in rng.integers(0, 10**5, size=len(keys))]

        def ids(text):
            return tokenizer(text, add_special_tokens=False)["input_ids"]

        begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
        asked = ids(f"\nWhat stands in line {keys[0]}? Line {keys[0]}:")
        room = self.context - len(begin) - len(asked)
        lines = []  # as many as fit: a prompt may be shorter than the context
        for key, value in zip(keys, values, strict=True):
            line = ids(f"Line {key}: {value}\n")
            if len(line) > room:
                break
            lines.append(line)
            room -= len(line)
        if not lines:
            raise kvsieve.UserError(f"lines needs a context of {self.context + len(line) - room} tokens")
        place = int(rng.integers(len(lines)))
        lines[0], lines[place] = lines[place], lines[0]
        facts = {"depth": place / len(lines), "lines": len(lines)}  # stored with the result
        prompt = [*begin, *(token for line in lines for token in line), *asked]
        return kvsieve.Sample(prompt, [values[0]], new_tokens=16, stop=["\n"], facts=facts)

    def score(self, sample, answer):
        return float(answer.text.strip() == sample.reference)


@kvsieve.hookimpl
def register_tasks(register):
    register(Lines)
