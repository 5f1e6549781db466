"""Tokens per second: some of a batch's decode steps, repeated without the meter after its answers."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from ...graph import Replay
from ...hf import parallel
from ...loop import Decoding
from ...sampling import Sampler

_ROUNDS = 3
# A round ends after so many steps, or once it has taken so long: they come on top of the steps that answer.
_STEPS = 6
_SECONDS = 0.05


class Stopwatch:
    """Times decode steps of the batches of one cell.

    The batches share a cache and, on a GPU, a captured step without a meter. For each batch call `passed`
    after every step, and `measure` when the answers are there.
    """

    def __init__(self) -> None:
        self._captured: Any = None  # the step without the meter: see KVCache.captured
        self._start: Any = None  # where rounds begin, and how many steps there is room for

    def passed(self, step: int, decoding: Decoding, steps: int) -> None:
        """Say that `step` of the `steps` steps was made; step 0 is the prefill.

        Rounds begin behind the first step after the prefill, where every policy has evicted what it does not
        keep.
        """
        if step == 0:
            self._start = None  # of an earlier question's decode, on another cache
        if step == min(1, steps - 2):
            runner = decoding.runner
            place = runner.cache.checkpoint(), decoding.state.positions.clone(), runner.mask
            self._start = place, steps - 1 - step

    def measure(self, decoding: Decoding) -> list[float]:
        """Repeat steps: tokens per second of all rows together, for each round; none if there are no steps.

        What the cache holds behind the place where rounds begin is overwritten.
        """
        if self._start is None:
            return []
        # A place holds storage: none is kept behind the measurement.
        (place, steps), self._start = self._start, None
        runner, cache = decoding.runner, decoding.runner.cache
        metered, cache.captured = cache.captured, self._captured
        sampler = Sampler(None, None, None, 0, None, runner.rows, runner.model.device)
        timed = Decoding(runner, sampler, eager=False)
        if timed.eager_because is None:
            timed.replay = Replay(cache, runner.model, timed.choice, timed.state)
            timed.choice, timed.state = timed.replay.choice, timed.replay.state
        timed.state.tokens.copy_(decoding.state.tokens)
        while timed.replay is not None and timed.replay.run.graph is None:  # until the step is captured
            _go_back(timed, place)
            timed.advance()
        rounds = [_round(timed, place, min(steps, _STEPS)) for _ in range(_ROUNDS)]
        self._captured, cache.captured = cache.captured, metered
        return rounds


def _round(decoding: Decoding, place: Any, at_most: int) -> float:
    _go_back(decoding, place)
    device = decoding.runner.model.device
    # Processes that share a model must stop after the same step, and each has a clock of its own.
    most = math.inf if parallel.is_split(decoding.runner.model) else _SECONDS
    steps, seconds = 0, 0.0
    while steps < at_most and seconds < most:
        started = _now(device)
        decoding.advance()
        decoding.state.status.tolist()  # `decode` looks at it after every step
        seconds += _now(device) - started
        steps += 1
    return len(decoding.state.tokens) * steps / seconds


def _go_back(decoding: Decoding, place: Any) -> None:
    checkpoint, positions, decoding.runner.mask = place
    decoding.runner.cache.restore(checkpoint)
    decoding.state.positions.copy_(positions)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
