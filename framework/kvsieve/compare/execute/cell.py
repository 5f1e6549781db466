"""Measure one cell, batch after batch: the answers, and the bytes, memory and time they took."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import TypeVar

import torch
from transformers import PreTrainedModel

from .. import graph, processes, transfer
from ..cache.kv_cache import KVCache
from ..hf import parallel
from ..loop import decode
from ..scoring import Forcing
from .cells import Cell, new_tokens_at_most
from .store import Record
from .tasks import Answer, Sample
from .tasks import text as texts

Item = TypeVar("Item")


class Measurement:
    """The measuring of one cell. Its batches share a cache, and with it, on a GPU, the captured decode step.

    `eager`: run decode steps from Python, on a GPU too.
    """

    def __init__(self, model: PreTrainedModel, cell: Cell, eager: bool = False) -> None:
        self.model, self.cell, self.eager = model, cell, eager
        self.meter = transfer.Meter()
        self.cache: KVCache | None = None
        self.capacity = 0

    def batch(self, indexes: Sequence[int], samples: Sequence[Sample]) -> list[Record]:
        """A record for each of the samples, decoded together.

        The prompts of a task are of equal length and take equal steps: each is charged its share of the batch. A task
        that answers for itself may ask several requests of unequal length for a sample: it has no speed.
        """
        model, cell, rows = self.model, self.cell, len(samples)
        self.meter.reset()
        clock = _Clock(model.device)
        with transfer.measure(self.meter), graph.capturing(not self.eager):
            why_eager = graph.why_not(KVCache(model, cell.policy), model)
            own = cell.task.answer(model, cell.policy, samples)
            answers, kv_bytes = self._answers(samples, clock) if own is None else own
        meter = self.meter
        if parallel.is_split(model):  # each process counts its own heads
            meter, kv_bytes = meter.over_ranks(), sum(processes.gather(kv_bytes))
        shares = {
            "steps": meter.steps / rows,
            "bytes_read": meter.read / rows,
            "bytes_written": meter.written / rows,
            "bytes_dense": meter.dense_read / rows,
            "kv_bytes": kv_bytes / rows,
            "tokens_per_second": rows * clock.steps / clock.seconds if clock.steps else None,
            "ran_eagerly": why_eager if model.device.type == "cuda" else None,
        }
        records = []
        for index, sample, answer in zip(indexes, samples, answers, strict=True):
            value = cell.task.score(sample, answer)
            if not math.isfinite(value):
                raise ArithmeticError(f"the score of sample {index} is {value}")
            found = {"sample": index, "score": value, "answer": answer.text, "reference": sample.reference}
            records.append(cell.record() | found | shares)
        return records

    def _answers(self, samples: Sequence[Sample], clock: _Clock) -> tuple[Sequence[Answer], int]:
        """What the model says, and the bytes of KV cache held for it."""
        model, policy = self.model, self.cell.policy
        prompts = [sample.prompt for sample in samples]
        limit = max(map(new_tokens_at_most, samples))
        cache = self._empty_cache(self.cell.task.context + limit)
        if samples[0].forced:
            forcing = Forcing(
                model, prompts, [list(sample.forced) for sample in samples], policy, cache=cache
            )
            for _ in clock.after_the_first(forcing):
                pass
            return [
                Answer(log_probabilities=row.log_probabilities.tolist()) for row in forcing.result()
            ], cache.memory()
        rows: list[list[int]] = [[] for _ in samples]
        said = ["" for _ in samples]
        # No token ends a row: every policy takes the same steps, and ending early is a wrong answer anyway.
        steps = decode(model, prompts, policy, max_new_tokens=limit, eos_token_id=(), cache=cache)
        for tokens in clock.after_the_first(steps):
            for row, token in zip(rows, tokens.tolist(), strict=True):
                row.append(token)
            said = [texts.continuation(model.tokenizer, p, row) for p, row in zip(prompts, rows, strict=True)]
            if all(len(text) >= sample.characters for text, sample in zip(said, samples, strict=True)):
                break
        return [Answer(text) for text in said], cache.memory()

    def _empty_cache(self, capacity: int) -> KVCache:
        if self.cache is None or self.capacity != capacity:
            self.cache, self.capacity = KVCache(self.model, self.cell.policy, capacity=capacity), capacity
        else:
            self.cache.reset()  # type: ignore[no-untyped-call]
        return self.cache


class _Clock:
    """Seconds that the steps of a decode take; the first, which is the prefill's, is left out."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds = 0.0
        self.steps = 0

    def after_the_first(self, steps: Iterable[Item]) -> Iterator[Item]:
        """The same steps; what is done between them is not timed."""
        iterator = iter(steps)
        yield next(iterator)
        while True:
            started = self._now()
            try:
                item = next(iterator)
            except StopIteration:
                return
            self.seconds += self._now() - started
            self.steps += 1
            yield item

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()
