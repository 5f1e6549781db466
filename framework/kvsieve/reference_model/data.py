"""Training data of the reference model: source text with retrieval and repetition inserted.

A sequence depends on (seed, step, row) alone, so a resumed run sees the same data as an uninterrupted one.
Training shares the form of the evaluation tasks but no content: keys are invented syllables where the tasks
use real names, and the surrounding text is never held-out text.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from . import retrieval
from .tokenizer import BOS, EOS, PAD
from .words import Words

# Loss weights of plain text and of retrieved values; that of repeated text, `Recipe.copy`, changes.
FILLER, ANSWER = 0.1, 4.0
_FILLED = (0.95, 0.95, 0.5, 0.25, 0.12)  # shares of a sequence that statements and questions may take


class Recipe(NamedTuple):
    """The content of one stage's sequences."""

    mix: dict[str, float]  # the share of each kind: a method of _Builder, or a function of retrieval.py
    copy: float  # loss weight of repeated text
    parts: int = 1  # at most so many values or keys in an answer, or links in a chain
    plain: float = 0.0  # share of the scenes that take the first of all wordings
    questions: int = 4  # at most so many pairs are asked for


def batch(
    text: np.ndarray, seed: int, step: int, rows: int, length: int, recipe: Recipe
) -> tuple[np.ndarray, np.ndarray]:
    """Return token ids `[rows, length]` and the loss weight of each as a target, `[rows, length]`."""
    sequences = [
        _sequence(text, np.random.default_rng([seed, step, row]), length, recipe) for row in range(rows)
    ]
    return np.stack([ids for ids, _ in sequences]), np.stack([weights for _, weights in sequences])


def _sequence(
    text: np.ndarray, rng: np.random.Generator, length: int, recipe: Recipe
) -> tuple[np.ndarray, np.ndarray]:
    kind = str(rng.choice(list(recipe.mix), p=list(recipe.mix.values())))
    builder = _Builder(text, rng, length, recipe)
    if hasattr(builder, kind):
        getattr(builder, kind)()
    else:
        builder.words.plain = rng.random() < recipe.plain
        builder.scene(getattr(retrieval, kind))
    return builder.finished()


class _Builder:
    """Appends pieces of text with their loss weights until the sequence is full."""

    def __init__(self, text: np.ndarray, rng: np.random.Generator, length: int, recipe: Recipe) -> None:
        self.text, self.rng, self.length, self.recipe = text, rng, length, recipe
        self.words = Words(rng)
        self.ids: list[np.ndarray] = [np.array([BOS])]
        self.weights: list[np.ndarray] = [np.array([0.0])]
        self.size = 1

    def add(self, piece: str | np.ndarray, weight: float) -> None:
        ids = np.frombuffer(piece.encode(), np.uint8) if isinstance(piece, str) else piece
        self.ids.append(ids.astype(np.int64))
        self.weights.append(np.full(len(ids), weight))
        self.size += len(ids)

    def filler(self, size: int) -> None:
        if size > 0:
            start = int(self.rng.integers(0, len(self.text) - size))
            self.add(self.text[start : start + size], FILLER)

    def finished(self) -> tuple[np.ndarray, np.ndarray]:
        ids, weights = np.concatenate(self.ids)[: self.length], np.concatenate(self.weights)[: self.length]
        missing = self.length - len(ids)
        return np.pad(ids, (0, missing), constant_values=PAD), np.pad(weights, (0, missing))

    def scene(self, make: Callable[[Words, int, int], retrieval.Scene]) -> None:
        """Hide statements in a haystack of one kind, then ask about them."""
        room = self.length - 1
        scene = make(self.words, int(room * self.rng.choice(_FILLED)), self.recipe.parts)
        room -= scene.size()
        if room < 0:
            return self.plain()
        around = str(self.rng.choice(["source", "prose", "noise"], p=[0.5, 0.3, 0.2]))
        gaps = self._split(room if around != "noise" else room - room // 8, len(scene.statements) + 1)
        if around == "source":
            haystack = [self._source(gap) for gap in gaps]
        elif around == "prose":
            haystack = [self.words.prose(gap) for gap in gaps]
        else:
            line = self.words.line()
            haystack = [line * (gap // len(line)) for gap in gaps]
        # Whole sentences leave some room: it comes first, so that the questions end the sequence.
        self.filler(room - sum(map(len, haystack)))
        between = "\n" if around != "prose" else " "
        for hay, statement in zip(haystack, scene.statements, strict=False):
            self.add(hay + ("\n" if around == "source" else "") + statement + between, FILLER)
        self.add(haystack[-1], FILLER)
        for question in scene.questions:
            self.add("\n" + question.text, FILLER)
            self.add(f"{question.answer}.", ANSWER)
            self.add(np.array([EOS]), ANSWER)

    def _source(self, size: int) -> str:
        start = int(self.rng.integers(0, len(self.text) - size))
        return self.text[start : start + size].tobytes().decode()

    # ------------------------------------------------------------------ the four kinds of sequence
    def plain(self) -> None:
        self.filler(self.length)

    def needles(self) -> None:
        """Hide statements in the text and ask about each of them later, the last time at the very end."""
        count = int(self.rng.integers(1, 3 + self.length // 256))
        answers = {
            self.words.name(): "".join(map(str, self.rng.integers(0, 10, size=6))) for _ in range(count)
        }
        count = len(answers)  # a name may have been drawn twice
        asked = [*self.rng.permutation(list(answers))]
        sizes = [len(f"\nThe secret number of {key} is {value}.\n") for key, value in answers.items()]
        room = self.length - 1 - 2 * sum(sizes)
        if room < 0:
            return self.plain()
        split = room if self.rng.random() < 0.7 else int(room * self.rng.random())
        gaps = self._split(split, count + 1)
        for gap, (key, value) in zip(gaps, answers.items(), strict=False):
            self.filler(gap)
            self.add(f"\nThe secret number of {key} is {value}.\n", FILLER)
        self.filler(gaps[-1])
        later = [*self._split(room - split, count)]
        for gap, key in zip(later, asked, strict=True):
            self.filler(gap)
            self.add(f"\nThe secret number of {key} is", FILLER)
            self.add(f" {answers[key]}", ANSWER)
            self.add(".\n", FILLER)

    def repetitions(self) -> None:
        """Begin with text; then repeat segments from anywhere before, each after a line break."""
        self.filler(int(self.length * self.rng.uniform(0.4, 0.85)))
        while self.size < self.length:
            size = int(self.rng.integers(64, 193))
            before = np.concatenate(self.ids)
            if len(before) <= size + 1:
                return self.filler(self.length - self.size)
            start = int(self.rng.integers(1, len(before) - size))
            prompt = int(self.rng.integers(16, 33))  # long enough to identify the segment
            self.add("\n", FILLER)
            self.add(before[start : start + prompt], FILLER)
            self.add(before[start + prompt : start + size], self.recipe.copy)

    def pairs(self) -> None:
        """Write a JSON object of random pairs and ask for a few of them."""
        questions = int(self.rng.integers(1, self.recipe.questions + 1))
        count = max(2, (self.length - 40 - 24 * questions) // 26)
        hexadecimal = [f"{n:08x}" for n in self.rng.integers(0, 2**32, size=2 * count)]
        keys, values = hexadecimal[:count], hexadecimal[count:]
        self.add(
            "{" + ",\n ".join(f'"{k}": "{v}"' for k, v in zip(keys, values, strict=True)) + "}\n", FILLER
        )
        for i in self.rng.integers(0, count, size=questions):
            self.add(f'\n{{"{keys[i]}": "', FILLER)
            self.add(values[i], ANSWER / 2)
            self.add('"}\n', FILLER)

    def _split(self, total: int, parts: int) -> list[int]:
        """`parts` random sizes that add up to `total`."""
        cuts = np.sort(self.rng.integers(0, total + 1, size=parts - 1))
        return [int(size) for size in np.diff([0, *cuts, total])]
