"""Measure one cell on a batch of samples: the answers, and the bytes, memory and time they took."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, Self

import torch
from transformers import PreTrainedModel

from .. import parallel, transfer
from ..cache import KVCache
from ..loop import decode, score
from .cells import Cell, new_tokens_at_most
from .store import Record
from .tasks import Answer, Sample
from .tasks import text as texts


def measure(
    model: PreTrainedModel, cell: Cell, indexes: Sequence[int], samples: Sequence[Sample]
) -> list[Record]:
    """A record for each of the samples, decoded together.

    The prompts of a task are of equal length and take equal steps: each is charged its share of the batch. A task that
    answers for itself may ask several requests of unequal length for a sample: it has no speed.
    """
    with transfer.measure() as meter, _DecodeClock(model) as clock:
        own = cell.task.answer(model, cell.policy, samples)
        answers, kv_bytes = _answers(model, cell, samples) if own is None else own
    rows, timed = len(samples), own is None and clock.steps > 0
    if parallel.is_split(model):  # each process counts its own heads
        meter, kv_bytes = meter.over_ranks(), sum(parallel.gather(kv_bytes))
    shares = {
        "steps": meter.steps / rows,
        "bytes_read": meter.read / rows,
        "bytes_written": meter.written / rows,
        "bytes_dense": meter.dense_read / rows,
        "kv_bytes": kv_bytes / rows,
        "tokens_per_second": rows * clock.steps / clock.seconds if timed else None,
    }
    records = []
    for index, sample, answer in zip(indexes, samples, answers, strict=True):
        value = cell.task.score(sample, answer)
        if not math.isfinite(value):
            raise ArithmeticError(f"the score of sample {index} is {value}")
        found = {"sample": index, "score": value, "answer": answer.text, "reference": sample.reference}
        records.append(cell.record() | found | shares)
    return records


def _answers(model: PreTrainedModel, cell: Cell, samples: Sequence[Sample]) -> tuple[Sequence[Answer], int]:
    """What the model says, and the bytes of KV cache held for it."""
    prompts = [sample.prompt for sample in samples]
    capacity = cell.task.context + max(map(new_tokens_at_most, samples))
    cache = KVCache(model, cell.policy, capacity=capacity)
    if samples[0].forced:
        forced = [list(sample.forced) for sample in samples]
        found = score(model, prompts, forced, cell.policy, cache=cache)
        return [Answer(log_probabilities=row.tolist()) for row in found], cache.memory()
    rows: list[list[int]] = [[] for _ in samples]
    said = ["" for _ in samples]
    limit = max(map(new_tokens_at_most, samples))
    # No token ends a row: every policy takes the same steps, and ending early is a wrong answer anyway.
    for tokens in decode(model, prompts, cell.policy, max_new_tokens=limit, eos_token_id=(), cache=cache):
        for row, token in zip(rows, tokens.tolist(), strict=True):
            row.append(token)
        said = [texts.continuation(model.tokenizer, p, row) for p, row in zip(prompts, rows, strict=True)]
        if all(len(text) >= sample.characters for text, sample in zip(said, samples, strict=True)):
            break
    return [Answer(text) for text in said], cache.memory()


class _DecodeClock:
    """Seconds that the model takes for decode steps; the prefill, with the first token, is left out."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.seconds = 0.0
        self.steps = 0

    def __enter__(self) -> Self:
        self._hooks = [
            self.model.register_forward_pre_hook(self._start, with_kwargs=True),
            self.model.register_forward_hook(self._stop, with_kwargs=True),
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _start(self, module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        self._started = self._now()

    def _stop(self, module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if kwargs["input_ids"].shape[1] == 1:
            self.seconds += self._now() - self._started
            self.steps += 1

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()
