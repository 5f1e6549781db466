"""Measure one cell, batch after batch: the answers, and the bytes, memory and time they took."""

from __future__ import annotations

import math
from collections.abc import Sequence

from transformers import PreTrainedModel

from ... import contract, graph, processes, transfer
from ...attention import ChangedKeys
from ...cache.kv_cache import KVCache
from ...hf import parallel
from ...loop import Decoding, Runner
from ...prompts import check_lengths, end_tokens
from ...reading import Begun, Reading, read
from ...recording import Alike, Needs, Recording, needs
from ...sampling import Sampler
from ...scoring import Scoring
from ..cells import Cell
from ..samples import Record
from ..tasks import Answer, Sample, Task
from ..tasks import text as texts
from .said import Said
from .speed import Stopwatch

_SHOWN = 400  # characters of a prompt's end that are stored with its result


class Measurement:
    """The measuring of one cell. On a GPU its batches share a cache, and with it the captured decode step.

    `eager`: run decode steps from Python, on a GPU too.
    """

    def __init__(self, model: PreTrainedModel, cell: Cell, eager: bool = False) -> None:
        self.model, self.cell, self.eager = model, cell, eager
        self.meter = transfer.Meter()
        self.stopwatch = Stopwatch()
        self.cache: KVCache | None = None
        self.capacity = 0
        self.warm = False  # kernels are compiled, and the step is captured
        self.changes_keys = False  # its policy was found to do so
        self.checked: set[str] = set()  # the questions whose first answer was: see contract
        self.rows: int | None = None  # that fit into memory; None: no more were asked for than did

    def release(self) -> None:
        """Give back the memory that is held between batches."""
        self.cache, self.stopwatch = None, Stopwatch()

    def needs(self, samples: Sequence[Sample]) -> Needs | Alike | str:
        """Return what the policy needs of the prefill of these samples, or why it reads them itself."""
        if type(self.cell.task).answer is not Task.answer:
            return "is asked by its task itself"
        if self.changes_keys:
            return "changes keys as they come"
        prompts, segments = prompts_of(samples)
        policy = self.cell.policy
        return needs(KVCache(self.model, policy), Reading(self.model, prompts, policy, segments))

    def batch(
        self, indexes: Sequence[int], samples: Sequence[Sample], recording: Recording | Begun | None = None
    ) -> list[Record]:
        """A record for each of the samples, decoded together; each is charged what it took itself.

        `recording` of the prompts: they are not read again.

        Of tasks that implement `answer` each is charged its share of the batch, and there are no tokens/s:
        their requests are of unequal length.

        Raises:
            ArithmeticError: a score or a log-probability is not a number.
            UserError: the policy's first answers are none that the contract allows, say.
        """
        try:
            return self._batch(indexes, samples, recording)
        except ChangedKeys:
            self.changes_keys = True
            return self._batch(indexes, samples, None)

    def _batch(
        self, indexes: Sequence[int], samples: Sequence[Sample], recording: Recording | Begun | None
    ) -> list[Record]:
        model, cell = self.model, self.cell
        self.meter.reset()
        with graph.capturing(not self.eager), contract.first_answers(self.checked):
            why_eager = graph.why_not(KVCache(model, cell.policy), model)
            with transfer.measure(self.meter):
                own = cell.task.answer(model, cell.policy, samples)
            if own is None:
                answers, kv_bytes, slots, speeds = self._answers(indexes, samples, recording)
            else:
                answers, kv_bytes, speeds = own[0], [own[1] / len(samples)] * len(samples), []
                slots = [None] * len(samples)
        if why_eager is not None:
            self.cache = None  # it is kept for its captured step alone
        common = {
            "rows": len(samples),
            "tokens_per_second": speeds or None,
            "eager_because": why_eager if model.device.type == "cuda" else None,
        }
        charges = self._charges(kv_bytes, slots, by_row=own is None)
        records = []
        for index, sample, answer, charge in zip(indexes, samples, answers, charges, strict=True):
            value = cell.task.score(sample, answer)
            if not math.isfinite(value):
                raise ArithmeticError(f"the score of sample {index} is {value}")
            found = {"sample": index, "score": value, "answer": answer.text}
            records.append(cell.record() | found | self._asked(sample) | charge | common)
        return records

    def _asked(self, sample: Sample) -> Record:
        """The fields of a record about its question."""
        # A character takes four tokens at most.
        asks = [token for question in sample.questions for token in question]
        end = texts.decode(self.model.tokenizer, [*sample.prompt, *asks][-4 * _SHOWN :])[-_SHOWN:]
        return {
            "references": list(sample.references),
            "needs": sample.needs,
            "prompt_end": end,
            "facts": dict(sample.facts),
        }

    def _charges(
        self, kv_bytes: Sequence[float], slots: Sequence[float | None], by_row: bool
    ) -> list[Record]:
        """The fields of each row's record about steps, bytes and memory; not `by_row`: equal shares."""
        rows, meter = len(kv_bytes), self.meter
        if parallel.is_split(self.model):  # each process counts its own heads
            meter = meter.over_ranks()
            kv_bytes = [sum(of_row) for of_row in zip(*processes.gather(list(kv_bytes)), strict=True)]
            if by_row:
                slots = [sum(of_row) / len(of_row) for of_row in zip(*processes.gather(slots), strict=True)]
        if by_row:
            moved = [tuple(row) for row in meter.by_row(rows)]
        else:
            total = meter.steps, meter.read, meter.written, meter.dense_read
            moved = [tuple(amount / rows for amount in total)] * rows
        names = ("steps", "bytes_read", "bytes_written", "bytes_dense", "kv_bytes", "slots")
        held = zip(moved, kv_bytes, slots, strict=True)
        return [dict(zip(names, (*row, *of_row), strict=True)) for row, *of_row in held]

    def _answers(
        self, indexes: Sequence[int], samples: Sequence[Sample], recording: Recording | Begun | None
    ) -> tuple[Sequence[Answer], Sequence[float], Sequence[float | None], list[float]]:
        """The model's answers, metered; the bytes of KV cache and the slots per head held for each; speeds,
        without the meter.
        """
        prompts, segments = prompts_of(samples)
        limit = max(sample.limit for sample in samples)
        # Rows are padded to the longest prompt, and then to the longest question.
        questions = [len(question) for sample in samples for question in sample.questions]
        columns = max(map(len, prompts)) + max(questions, default=0)
        peak = Reading(self.model, prompts, self.cell.policy, segments).peak
        cache = self._empty_cache(max(max(self.cell.task.context, columns) + limit, peak))
        with transfer.measure(self.meter):
            if samples[0].forced:
                answers, decoding = self._score(indexes, samples, prompts, segments, cache, recording)
            elif samples[0].questions:
                answers, decoding = self._ask(samples, prompts, segments, limit, cache, recording)
            else:
                texts_said, decoding = self._decode(samples, prompts, segments, limit, cache, recording)
                answers = [Answer(text) for text in texts_said]
        held = cache.memory_by_row([_asked_last(sample) + sample.limit for sample in samples])
        slots = cache.slots_by_row()
        return answers, held, slots, self.stopwatch.measure(decoding)

    def _score(
        self,
        indexes: Sequence[int],
        samples: Sequence[Sample],
        prompts: list[list[int]],
        segments: list[list[int]],
        cache: KVCache,
        recording: Recording | Begun | None,
    ) -> tuple[list[Answer], Decoding]:
        forced = [list(sample.forced) for sample in samples]
        scoring = Scoring(
            self.model, prompts, forced, self.cell.policy, segments=segments, cache=cache, reader=recording
        )
        for step, _ in enumerate(scoring):
            self.stopwatch.passed(step, scoring.decoding, scoring.steps)
        answers = []
        for index, row in zip(indexes, scoring.result(), strict=True):
            if row.log_probabilities.isnan().any():
                raise ArithmeticError(f"a log-probability of sample {index} is nan")
            answers.append(Answer(log_probabilities=row.log_probabilities.tolist()))
        return answers, scoring.decoding

    def _ask(
        self,
        samples: Sequence[Sample],
        prompts: list[list[int]],
        segments: list[list[int]],
        limit: int,
        cache: KVCache,
        recording: Recording | Begun | None,
    ) -> tuple[list[Answer], Decoding]:
        """Read the prompts, let the policy decide who stays, and ask each question of a copy of that."""
        read(self.model, prompts, cache, segments=segments, leave=0, reader=recording)
        last, said = len(samples[0].questions) - 1, []
        for number in range(last + 1):
            rows = [list(sample.questions[number]) for sample in samples]
            asked = [sample.asked(number) for sample in samples]
            own = cache if number == last else cache.clone()
            answers, decoding = self._decode(asked, rows, None, limit, own, None)
            said.append(answers)
        return [Answer(" | ".join(of_row), texts=of_row) for of_row in zip(*said, strict=True)], decoding

    def _decode(
        self,
        samples: Sequence[Sample],
        rows: list[list[int]],
        segments: list[list[int]] | None,
        limit: int,
        cache: KVCache,
        recording: Recording | Begun | None,
    ) -> tuple[list[str], Decoding]:
        """The texts that follow the token ids `rows`, the whole prompts of the samples or their ends."""
        model = self.model
        for sample in samples:
            check_lengths(model, [list(sample.prompt)], sample.limit)
        policy = self.cell.policy
        runner = Runner(model, rows, policy, limit, cache=cache, segments=segments, reader=recording)
        several = len(samples) > 1
        sampler = Sampler(None, None, None, 0, None, rows, model.device, rows_end=several)
        decoding = Decoding(runner, sampler, eager=False)
        ends = end_tokens(model, None)
        said = [Said(sample, model.tokenizer, ends) for sample in samples]
        for step, tokens in enumerate(decoding.tokens(limit)):
            self.stopwatch.passed(step, decoding, limit)
            for row, token in zip(said, tokens.tolist(), strict=True):
                row.take(token)
            complete = [b for b, row in enumerate(said) if row.complete]
            if len(complete) == len(said):
                break
            if complete:
                decoding.end_rows(complete)
        decoding.end()
        return [row.text for row in said], decoding

    def _empty_cache(self, capacity: int) -> KVCache:
        if self.cache is None or self.capacity < capacity:
            self.cache, self.capacity = KVCache(self.model, self.cell.policy, capacity=capacity), capacity
        else:
            self.cache.reset()
        return self.cache


def prompts_of(samples: Sequence[Sample]) -> tuple[list[list[int]], list[list[int]]]:
    """The token ids of the prompts, and their segments."""
    prompts = [list(sample.prompt) for sample in samples]
    return prompts, [list(sample.segments) or [len(sample.prompt)] for sample in samples]


def _asked_last(sample: Sample) -> int:
    """Tokens of a sample with its last question."""
    return len(sample.prompt) + (len(sample.questions[-1]) if sample.questions else 0)
