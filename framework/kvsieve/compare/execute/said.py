"""The text of one row as it comes, and where it ends."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from ..tasks import Sample
from ..tasks import text as texts


class Said:
    """The answer to a sample so far: `text`, and whether it is `complete`."""

    def __init__(self, sample: Sample, tokenizer: Any, ends: Collection[int]) -> None:
        """`ends`: the model's end tokens."""
        self.sample, self.tokenizer, self.ends = sample, tokenizer, ends
        self.tokens: list[int] = []
        self.text = ""
        self.complete = False
        self._growing = texts.Growing(tokenizer, sample.prompt)
        self._longest = max(map(len, sample.stop), default=0)

    def take(self, token: int) -> None:
        """Add a token; a complete answer takes no more."""
        if self.complete:
            return
        if token in self.ends:
            self.complete = True
            return
        self.tokens.append(token)
        sample, seen = self.sample, len(self._growing.settled)
        self._growing.take(token)
        text = self._growing.text
        # A stop text that is new ends in what is new.
        stops = [at for stop in sample.stop if (at := text.find(stop, max(0, seen - self._longest))) >= 0]
        self.text = text[: min(stops, default=len(text))]
        enough = sample.characters is not None and len(self.text) >= sample.characters
        self.complete = bool(stops) or enough or len(self.tokens) >= sample.limit
