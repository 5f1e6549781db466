"""Tokens per second: a batch's first decode steps, repeated without the meter once its answers are there."""

from __future__ import annotations

import time
from typing import Any

import torch

from ...loop import Generation
from ...sampling import Sampler

_ROUNDS = 3
_STEPS = 6  # of a round, at most; few, because they come on top of the steps that answer


class Stopwatch:
    """Times decode steps of the batches of one cell, which share a cache and, on a GPU, a captured step without a meter.

    Use, for each batch: `mark` when the prompts are in the cache, `measure` when the answers are there.
    """

    def __init__(self) -> None:
        self._captured: Any = None  # the decode step without the meter: see KVCache.captured

    def mark(self, generation: Generation) -> None:
        """Remember where the prompts end."""
        decoder = generation.decoder
        self._start = decoder.cache.checkpoint(), decoder.positions.clone(), decoder.mask

    def measure(self, generation: Generation, steps: int) -> list[float]:
        """Repeat at most `steps` steps from the mark on, greedily: tokens per second of all rows, for each round.

        What the cache holds behind the mark is overwritten.
        """
        if steps < 1:
            return []
        decoder, cache = generation.decoder, generation.decoder.cache
        metered, cache.captured = cache.captured, self._captured
        sampler = Sampler(None, None, None, 0, None, decoder.rows, decoder.model.device)
        timed = Generation(decoder, sampler, eager=False)
        timed.tokens.copy_(generation.tokens)
        if timed.ran_eagerly is None:
            timed._replay()
            while timed.replay is not None and timed.replay.graph is None:  # until the step is captured
                self._go_back(timed)
                timed.advance()
        rounds = [self._round(timed, min(steps, _STEPS)) for _ in range(_ROUNDS)]
        self._captured, cache.captured = cache.captured, metered
        return rounds

    def _round(self, generation: Generation, steps: int) -> float:
        self._go_back(generation)
        device = generation.decoder.model.device
        seconds = 0.0
        for _ in range(steps):
            started = _now(device)
            generation.advance()
            generation.status.tolist()  # as `decode` looks at it after every step
            seconds += _now(device) - started
        return len(generation.tokens) * steps / seconds

    def _go_back(self, generation: Generation) -> None:
        decoder = generation.decoder
        checkpoint, positions, decoder.mask = self._start
        decoder.cache.restore(checkpoint)
        decoder.positions.copy_(positions)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
