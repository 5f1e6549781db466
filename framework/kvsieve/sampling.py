"""The next token of each row: greedy, or sampled with transformers' logits processors."""

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
    """The next token of each row: the most likely, or drawn from a stream of the row's own."""

    def __init__(
        self,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        seed: int,
        processors: LogitsProcessorList | None,
        rows: list[list[int]],
        device: torch.device,
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
        self.streams = [
            torch.Generator(device).manual_seed(seed + b) for b in range(len(rows) if self.draws else 0)
        ]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        logits = self.processors(cast(torch.LongTensor, self.ids), cast(torch.FloatTensor, logits.float()))
        if self.draws:
            # The largest of p / e, e exponentially distributed, is a draw from p; torch.multinomial would synchronise.
            noise = torch.stack(
                [torch.empty_like(logits[0]).exponential_(generator=stream) for stream in self.streams]
            )
            tokens = (torch.softmax(logits, -1) / noise).argmax(-1)
        else:
            tokens = logits.argmax(-1)
        if self.ids is not None:
            self.ids = torch.cat([self.ids, tokens[:, None]], 1)
        return tokens
