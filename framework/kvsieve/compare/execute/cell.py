"""Measure one cell, batch after batch: the answers, and the bytes, memory and time they took."""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import PreTrainedModel

from ... import graph, processes, transfer
from ...cache.kv_cache import KVCache
from ...hf import parallel
from ...loop import Decoding, Runner
from ...prompts import check_lengths
from ...sampling import Sampler
from ...scoring import Scoring
from ..cells import Cell, new_tokens_at_most
from ..samples import Record
from ..tasks import Answer, Sample
from ..tasks import text as texts
from .speed import Stopwatch


class Measurement:
    """The measuring of one cell. Its batches share a cache, and with it, on a GPU, the captured decode step.

    `eager`: run decode steps from Python, on a GPU too.
    """

    def __init__(self, model: PreTrainedModel, cell: Cell, eager: bool = False) -> None:
        self.model, self.cell, self.eager = model, cell, eager
        self.meter = transfer.Meter()
        self.stopwatch = Stopwatch()
        self.cache: KVCache | None = None
        self.capacity = 0

    def batch(self, indexes: Sequence[int], samples: Sequence[Sample]) -> list[Record]:
        """A record for each of the samples, decoded together.

        The prompts of a task are of equal length and take equal steps: each is charged its share of the
        batch. Tasks that implement `answer` report no tokens/s: their requests are of unequal length.

        Raises:
            ArithmeticError: a score or a log-probability is not a number.
        """
        model, cell, rows = self.model, self.cell, len(samples)
        self.meter.reset()
        with graph.capturing(not self.eager):
            why_eager = graph.why_not(KVCache(model, cell.policy), model)
            with transfer.measure(self.meter):
                own = cell.task.answer(model, cell.policy, samples)
            if own is None:
                answers, kv_bytes, speeds = self._answers(indexes, samples)
            else:
                (answers, kv_bytes), speeds = own, []
        meter = self.meter
        if parallel.is_split(model):  # each process counts its own heads
            meter, kv_bytes = meter.over_ranks(), sum(processes.gather(kv_bytes))
        shares = {
            "steps": meter.steps / rows,
            "bytes_read": meter.read / rows,
            "bytes_written": meter.written / rows,
            "bytes_dense": meter.dense_read / rows,
            "kv_bytes": kv_bytes / rows,
            "rows": rows,
            "tokens_per_second": speeds or None,
            "eager_because": why_eager if model.device.type == "cuda" else None,
        }
        records = []
        for index, sample, answer in zip(indexes, samples, answers, strict=True):
            value = cell.task.score(sample, answer)
            if not math.isfinite(value):
                raise ArithmeticError(f"the score of sample {index} is {value}")
            found = {"sample": index, "score": value, "answer": answer.text, "reference": sample.reference}
            records.append(cell.record() | found | shares)
        return records

    def _answers(
        self, indexes: Sequence[int], samples: Sequence[Sample]
    ) -> tuple[Sequence[Answer], int, list[float]]:
        """The model's answers, metered; the bytes of KV cache held for them; speeds, without the meter."""
        prompts = [sample.prompt for sample in samples]
        limit = max(map(new_tokens_at_most, samples))
        cache = self._empty_cache(self.cell.task.context + limit)
        with transfer.measure(self.meter):
            if samples[0].forced:
                answers, decoding = self._score(indexes, samples, prompts, cache)
            else:
                answers, decoding = self._decode(samples, prompts, limit, cache)
        return answers, cache.memory(), self.stopwatch.measure(decoding)

    def _score(
        self, indexes: Sequence[int], samples: Sequence[Sample], prompts: list[list[int]], cache: KVCache
    ) -> tuple[list[Answer], Decoding]:
        forced = [list(sample.forced) for sample in samples]
        scoring = Scoring(self.model, prompts, forced, self.cell.policy, cache=cache)
        for step, _ in enumerate(scoring):
            self.stopwatch.passed(step, scoring.decoding, scoring.steps)
        answers = []
        for index, row in zip(indexes, scoring.result(), strict=True):
            if row.log_probabilities.isnan().any():
                raise ArithmeticError(f"a log-probability of sample {index} is nan")
            answers.append(Answer(log_probabilities=row.log_probabilities.tolist()))
        return answers, scoring.decoding

    def _decode(
        self, samples: Sequence[Sample], prompts: list[list[int]], limit: int, cache: KVCache
    ) -> tuple[list[Answer], Decoding]:
        model = self.model
        check_lengths(model, prompts, limit)
        runner = Runner(model, prompts, self.cell.policy, limit, cache=cache)
        # No token ends a row: every policy takes the same steps, and ending early is a wrong answer anyway.
        decoding = Decoding(runner, Sampler(None, None, None, 0, None, prompts, model.device), eager=False)
        rows: list[list[int]] = [[] for _ in samples]
        said = ["" for _ in samples]
        for step, tokens in enumerate(decoding.tokens(limit)):
            self.stopwatch.passed(step, decoding, limit)
            for row, token in zip(rows, tokens.tolist(), strict=True):
                row.append(token)
            said = [texts.continuation(model.tokenizer, p, row) for p, row in zip(prompts, rows, strict=True)]
            if all(len(text) >= sample.characters for text, sample in zip(said, samples, strict=True)):
                break
        decoding.end()
        return [Answer(text) for text in said], decoding

    def _empty_cache(self, capacity: int) -> KVCache:
        if self.cache is None or self.capacity != capacity:
            self.cache, self.capacity = KVCache(self.model, self.cell.policy, capacity=capacity), capacity
        else:
            self.cache.reset()
        return self.cache
