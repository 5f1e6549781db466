"""Measure the cells of one task together, batch after batch: policies that read its prompts alike share one
prefill.
"""

from __future__ import annotations

import traceback
from collections.abc import Hashable, Sequence

import torch
from transformers import PreTrainedModel

from ...errors import UserError
from ...hf import parallel
from ...reading import Begun
from ...recording import Alike, Needs, Recording, begin
from ..cells import Cell
from ..config import Settings
from ..samples import Record
from ..tasks import Sample
from . import Began, Events, Failed, Measured, Unit
from .cell import Measurement, prompts_of


def measure_unit(model: PreTrainedModel, settings: Settings, unit: Unit) -> Events:
    """Measure batch by batch, and each batch under every policy; an error fails its cell alone.

    A batch that does not fit into memory under a policy is measured in halves, down to one row.
    Where processes share a model, only errors that all of them raise alike fail a cell: after any other the
    rest would wait for ever.
    """
    measuring = _Measuring(model, settings, unit)
    samples = unit.samples
    for first in range(0, len(samples), settings.rows):
        yield from measuring.batch(samples[first : first + settings.rows])


class _Measuring:
    """The measuring of a unit."""

    def __init__(self, model: PreTrainedModel, settings: Settings, unit: Unit) -> None:
        self.model, self.settings, self.unit = model, settings, unit
        self.alone = (UserError, ArithmeticError) if parallel.is_split(model) else Exception
        self.measurements: dict[str, Measurement] = {}  # by cell id
        self.failed: set[str] = set()
        self.samples: dict[int, Sample] = {}  # of the running batch
        self.recording: Recording | Begun | None = None  # of the running batch, where cells share a prefill

    def batch(self, batch: Sequence[int]) -> Events:
        """Measure these samples, of each cell those that it misses."""
        self.samples.clear()
        # The cells that share a prefill, or one that reads by itself; and what each needs of it.
        groups: dict[Hashable, list[tuple[Cell, Needs | Alike | str]]] = {}
        missing: dict[Hashable, list[int]] = {}
        for cell in self.unit.cells:
            indexes = [index for index in self.unit.missing.get(cell.id, ()) if index in batch]
            if not indexes or cell.id in self.failed:
                continue
            try:
                found = self._measurement(cell).needs(self._samples(indexes))
            except self.alone as error:
                yield self._failed(cell, error)
                continue
            shares = found.weights if isinstance(found, Needs) else found
            key: Hashable = (*indexes, cell.id if isinstance(shares, str) else shares)
            groups.setdefault(key, []).append((cell, found))
            missing[key] = indexes
        for key, group in groups.items():
            yield from self._together(group, missing[key])

    def _together(self, group: list[tuple[Cell, Needs | Alike | str]], indexes: list[int]) -> Events:
        """Measure samples of cells that share a prefill."""
        self.recording = None
        for number, (cell, _) in enumerate(group):
            yield Began(cell)
            if number == 0 and len(group) > 1:
                self.recording = self._record(indexes, group)
            try:
                records = self._records(cell, indexes)
            except self.alone as error:
                yield self._failed(cell, error)
            else:
                yield Measured(cell, records)

    def _record(
        self, indexes: list[int], group: list[tuple[Cell, Needs | Alike | str]]
    ) -> Recording | Begun | None:
        """Read what a group reads of these samples together; None if that is nothing, or if it failed: every
        cell then reads, and fails, by itself.
        """
        prompts, segments = prompts_of(self._samples(indexes))
        wanted = [found for _, found in group if isinstance(found, Needs)]
        try:
            if wanted:
                return Recording(self.model, prompts, wanted)
            return begin(self.model, [cell.policy for cell, _ in group], prompts, segments)
        except self.alone:
            return None

    def _records(self, cell: Cell, indexes: list[int]) -> list[Record]:
        """Measure samples of a cell together, or in parts that fit into memory.

        Raises:
            UserError: there is not enough for one row.
        """
        measurement, records = self._measurement(cell), list[Record]()
        parts = [indexes]
        while parts:
            part = parts.pop(0)
            rows = min(len(part), measurement.rows or len(part))
            part, *rest = [part[first : first + rows] for first in range(0, len(part), rows)]
            parts[:0] = rest
            try:
                records += self._batch(measurement, part, self.recording if part == indexes else None)
            except Exception as error:
                if parallel.is_split(self.model) or not _out_of_memory(error):
                    raise
                parts.insert(0, part)
                self._make_room(measurement, part, error)
        return records

    def _batch(
        self, measurement: Measurement, indexes: list[int], recording: Recording | Begun | None
    ) -> list[Record]:
        samples = self._samples(indexes)
        if not measurement.warm and self.model.device.type == "cuda":
            # Untimed: kernels are compiled, and the steps are captured.
            measurement.batch(indexes, samples, recording)
            measurement.warm = True
        return measurement.batch(indexes, samples, recording)

    def _make_room(self, measurement: Measurement, indexes: list[int], error: Exception) -> None:
        """Let go of what others hold; where nobody holds anything, halve the cell's batches from now on.

        Raises:
            UserError: they are of one row.
        """
        measurement.release()
        held = self.recording is not None or any(each.cache for each in self.measurements.values())
        self.recording = None
        for each in self.measurements.values():
            each.release()
        if self.model.device.type == "cuda":
            torch.cuda.empty_cache()
        if held:
            return
        if len(indexes) == 1:
            prompt = len(self.samples[indexes[0]].prompt)
            raise UserError(
                f"out of memory with a single row, a prompt of {prompt} tokens: choose a shorter context, a "
                f"smaller dtype or another device ({str(error).splitlines()[0]})"
            )
        measurement.rows = -(-len(indexes) // 2)

    def _measurement(self, cell: Cell) -> Measurement:
        if cell.id not in self.measurements:
            self.measurements[cell.id] = Measurement(self.model, cell, self.settings.eager)
        return self.measurements[cell.id]

    def _samples(self, indexes: Sequence[int]) -> list[Sample]:
        task, seed = self.unit.cells[0].task, self.settings.seed
        for index in indexes:
            if index not in self.samples:
                self.samples[index] = task.sample(self.model.tokenizer, seed, index)
        return [self.samples[index] for index in indexes]

    def _failed(self, cell: Cell, error: Exception) -> Failed:
        self.failed.add(cell.id)
        self.measurements.pop(cell.id, None)
        return failed(cell, error)


def _out_of_memory(error: Exception) -> bool:
    """Whether memory of the device, or of this machine, was not enough."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and "can't allocate memory" in str(error))


def failed(cell: Cell, error: Exception) -> Failed:
    """The failure that is being handled."""
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return Failed(cell, reason, traceback.format_exc())
