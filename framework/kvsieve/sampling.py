"""The next token of each row: the likeliest, one drawn with transformers' logits processors, or one that is given."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .errors import UserError


class Sampler:
    """The next token of each row: the most likely, or drawn from a stream of the row's own.

    A row ends with one of the tokens `ends`; from then on its token is `pad`.
    """

    def __init__(
        self,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        seed: int,
        processors: LogitsProcessorList | None,
        rows: list[list[int]],
        device: torch.device,
        ends: Sequence[int] = (),
        pad: int = 0,
    ) -> None:
        self.processors = LogitsProcessorList(processors or [])
        # Processors may look at the tokens so far, left-padded with zeros; our own do not.
        self.ids = None
        if self.processors:
            longest = max(map(len, rows))
            self.ids = torch.tensor([[0] * (longest - len(row)) + row for row in rows], device=device)
        self.draws = any(option is not None for option in (temperature, top_k, top_p))
        try:
            if temperature is not None and temperature != 1:
                self.processors.append(TemperatureLogitsWarper(float(temperature)))
            if top_k is not None:
                self.processors.append(TopKLogitsWarper(top_k))
            if top_p is not None:
                self.processors.append(TopPLogitsWarper(float(top_p)))
        except ValueError as error:
            raise UserError(f"sampling: {error}") from error
        self.seed = seed
        self.streams = [
            torch.Generator(device).manual_seed(seed + b) for b in range(len(rows) if self.draws else 0)
        ]
        self.ends, self.pad = torch.tensor(list(ends), device=device), pad
        self.rows_end = len(self.ends) > 0
        self.kind = ("sample", temperature, top_k, top_p, tuple(ends), pad)

    @property
    def why_not_captured(self) -> str | None:
        """Why a step with it cannot be a graph; None if it can."""
        return (
            None if self.ids is None else "a logits_processor looks at the tokens so far, whose number grows"
        )

    def restart(self, like: Sampler) -> None:
        """Go on as `like`, which was just made and is of the same kind, in the tensors that are here."""
        for b, stream in enumerate(self.streams):
            stream.manual_seed(like.seed + b)

    def __call__(self, logits: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
        """The tokens `[B]`, from `logits [B, V]`; marks in `ended [B]` the rows that end with them."""
        logits = self.processors(cast(torch.LongTensor, self.ids), cast(torch.FloatTensor, logits.float()))
        if self.draws:
            # The largest of p / e, e exponentially distributed, is a draw from p; torch.multinomial would synchronise.
            noise = torch.stack(
                [torch.empty_like(logits[0]).exponential_(generator=stream) for stream in self.streams]
            )
            tokens = (torch.softmax(logits, -1) / noise).argmax(-1)
        else:
            tokens = logits.argmax(-1)
        tokens = tokens.masked_fill(ended, self.pad)
        if self.ids is not None:
            self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        ended |= (tokens[:, None] == self.ends).any(1)
        return tokens


class Given:
    """The tokens of `rows`, one after the other, and what the model thinks of them; a row ends with its last."""

    why_not_captured = None
    streams: Sequence[torch.Generator] = ()

    def __init__(self, rows: list[list[int]], device: torch.device) -> None:
        longest = max(map(len, rows))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        self.tokens, self.sizes = padded, torch.tensor([len(row) for row in rows], device=device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        self.log_probabilities = torch.zeros(padded.shape, dtype=torch.float32, device=device)
        self.likeliest = torch.zeros(padded.shape, dtype=torch.bool, device=device)
        self.rows_end = any(len(row) < longest for row in rows)
        self.kind = ("given", longest, self.rows_end)

    def restart(self, like: Given) -> None:
        """As `Sampler.restart`."""
        self.tokens.copy_(like.tokens)
        self.sizes.copy_(like.sizes)
        self.at.zero_()

    def __call__(self, logits: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
        """As `Sampler`."""
        at = self.at.expand(len(logits))[:, None]
        tokens = self.tokens.gather(1, at)
        probabilities = torch.log_softmax(logits.float(), -1)
        self.log_probabilities.scatter_(1, at, probabilities.gather(1, tokens))
        self.likeliest.scatter_(1, at, probabilities.argmax(1, keepdim=True) == tokens)
        self.at += 1
        ended.copy_(self.at >= self.sizes)
        return tokens[:, 0]
