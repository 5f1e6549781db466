"""Choose the next token of each row: the likeliest, one that is drawn, or a given one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeGuard, cast

import torch
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .arguments import is_whole
from .errors import UserError


class Sampler:
    """The next token of each row: the most likely, or drawn from a stream of the row's own.

    A row ends with one of the tokens `ends`; from then on its token is `pad`.

    Args:
        temperature, top_k, top_p: given any of these, draw; else take the most likely token.
        seed: row b draws from a stream of its own, `seed + b`.
        processors: transformers' processors, applied before the temperature: to all rows at once where their
            prompts are of one length, else row by row.
        rows: the token ids of the prompts, which processors may look at.
        rows_end: rows may be ended from outside too (`Decoding.end_rows`).

    Attributes:
        broken: 0-d bool tensor, written in place by every call. True: the processed logits of a row that has
            not ended are NaN or all -inf (or +inf, where tokens are drawn), so that no token can be chosen.

    Raises:
        UserError: an option out of its range.
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
        rows_end: bool = False,
    ) -> None:
        _check_options(temperature, top_k, top_p, seed, len(rows))
        self.processors, self.warpers = LogitsProcessorList(processors or []), LogitsProcessorList()
        # The tokens so far, which the user's processors may look at: `[B, n]`; or `[1, n]` of each row, where
        # rows differ in length, so that none sees padding.
        self.texts: list[torch.Tensor] = []
        if self.processors:
            alike = len(set(map(len, rows))) == 1
            self.texts = [torch.tensor(each, device=device) for each in ([rows] if alike else zip(rows))]
        self.draws = any(option is not None for option in (temperature, top_k, top_p))
        if temperature is not None and temperature != 1:
            self.warpers.append(TemperatureLogitsWarper(float(temperature)))
        if top_k is not None:
            self.warpers.append(TopKLogitsWarper(int(top_k)))
        if top_p is not None:
            self.warpers.append(TopPLogitsWarper(float(top_p)))
        self.seed = int(seed)
        self.streams = [
            torch.Generator(device).manual_seed(self.seed + b) for b in range(len(rows) if self.draws else 0)
        ]
        self.broken = torch.zeros((), dtype=torch.bool, device=device)
        self.ends, self.pad = torch.tensor(list(ends), device=device), pad
        self.rows_end = rows_end or len(self.ends) > 0
        self.kind = ("sample", temperature, top_k, top_p, tuple(ends), pad, self.rows_end)

    @property
    def why_not_captured(self) -> str | None:
        """Why a step with it cannot be a graph; None if it can."""
        if not self.texts:
            return None
        return "a logits_processor looks at the tokens so far, whose number grows"

    def restart(self, like: Sampler) -> None:
        """Become `like`, a new sampler of the same kind, and keep the tensors that a graph has captured."""
        for b, stream in enumerate(self.streams):
            stream.manual_seed(like.seed + b)

    def __call__(self, logits: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
        """Return the tokens `[B]` for `logits [B, V]`; mark in `ended [B]` the rows that end with them.

        Nothing here waits for the device.
        """
        logits = self._processed(logits.float())
        largest = logits.amax(1)  # NaN if any is
        unusable = largest.isnan() | (largest.isinf() if self.draws else largest == -math.inf)
        self.broken.copy_((unusable & ~ended).any())
        if self.draws:
            # The largest of p / e, e exponentially distributed, is a draw from p. torch.multinomial waits for
            # the device.
            noise = torch.stack(
                [torch.empty_like(logits[0]).exponential_(generator=stream) for stream in self.streams]
            )
            tokens = (torch.softmax(logits, -1) / noise).argmax(-1)
        else:
            tokens = logits.argmax(-1)
        tokens = tokens.masked_fill(ended, self.pad)
        added = tokens[:, None].split([len(text) for text in self.texts]) if self.texts else ()
        self.texts = [torch.cat(pair, 1) for pair in zip(self.texts, added, strict=True)]
        ended |= (tokens[:, None] == self.ends).any(1)
        return tokens

    def _processed(self, logits: torch.Tensor) -> torch.Tensor:
        """The logits `[B, V]` float32 behind the user's processors and our own."""
        if self.texts:
            parts = zip(self.texts, logits.split([len(text) for text in self.texts]), strict=True)
            logits = torch.cat([_apply(self.processors, text, part) for text, part in parts])
        return _apply(self.warpers, None, logits)


def _apply(processors: LogitsProcessorList, text: torch.Tensor | None, logits: torch.Tensor) -> torch.Tensor:
    return processors(cast(torch.LongTensor, text), cast(torch.FloatTensor, logits))


class Given:
    """The tokens of `rows`, one after the other, and their probabilities; a row ends with its last token.

    `broken`: as `Sampler.broken`; the log-probability of a row's token is NaN.
    """

    why_not_captured = None
    streams: Sequence[torch.Generator] = ()

    def __init__(self, rows: list[list[int]], device: torch.device) -> None:
        longest = max(map(len, rows))
        padded = torch.tensor([row + [0] * (longest - len(row)) for row in rows], device=device)
        self.tokens, self.sizes = padded, torch.tensor([len(row) for row in rows], device=device)
        self.at = torch.zeros(1, dtype=torch.int64, device=device)
        self.log_probabilities = torch.zeros(padded.shape, dtype=torch.float32, device=device)
        self.likeliest = torch.zeros(padded.shape, dtype=torch.bool, device=device)
        self.broken = torch.zeros((), dtype=torch.bool, device=device)
        self.rows_end = any(len(row) < longest for row in rows)
        self.kind = ("given", longest, self.rows_end)

    def restart(self, like: Given) -> None:
        """See `Sampler.restart`."""
        self.tokens.copy_(like.tokens)
        self.sizes.copy_(like.sizes)
        self.at.zero_()

    def __call__(self, logits: torch.Tensor, ended: torch.Tensor) -> torch.Tensor:
        """See `Sampler.__call__`."""
        at = self.at.expand(len(logits))[:, None]
        tokens = self.tokens.gather(1, at)
        probabilities = torch.log_softmax(logits.float(), -1)
        chosen = probabilities.gather(1, tokens)
        self.broken.copy_((chosen[:, 0].isnan() & ~ended).any())
        self.log_probabilities.scatter_(1, at, chosen)
        self.likeliest.scatter_(1, at, probabilities.argmax(1, keepdim=True) == tokens)
        self.at += 1
        ended.copy_(self.at >= self.sizes)
        return tokens[:, 0]


# Below, float32 logits divided by the temperature overflow: 1e-6 leaves room for logits of 1e32.
_COLDEST = 1e-6


def _check_options(temperature: object, top_k: object, top_p: object, seed: object, rows: int) -> None:
    """Raise UserError for an option that is not of its type or out of its range."""
    if temperature is not None and not (_is_finite(temperature) and temperature >= _COLDEST):
        raise UserError(
            f"sampling: temperature must be a finite number of at least {_COLDEST:g}, not {temperature!r}; "
            "leave it out to take the most likely token"
        )
    if top_k is not None and not (is_whole(top_k) and top_k >= 1):
        raise UserError(f"sampling: top_k must be a whole number of at least 1, not {top_k!r}")
    if top_p is not None and not (_is_finite(top_p) and 0 <= top_p <= 1):
        raise UserError(f"sampling: top_p must be a number from 0 to 1, not {top_p!r}")
    if not (is_whole(seed) and 0 <= seed <= 2**64 - rows):
        raise UserError(
            f"sampling: seed must be a whole number from 0 to 2**64 - {rows}, not {seed!r}: "
            f"row b of {rows} draws from seed + b"
        )


def _is_finite(value: Any) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
