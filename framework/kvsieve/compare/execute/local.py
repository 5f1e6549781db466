"""Measure in this process, one cell after the other, in the order of the file."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from ...errors import UserError
from ...hf import models, parallel
from .. import environment, identity
from ..cells import Cell, expand
from ..config import Config, Diagnose, Settings
from ..samples import Record
from . import Events, Failed, Finished, Measured, Prepared, Work
from .cell import Measurement
from .diagnose import diagnose_cells


class Local:
    """An executor in this process."""

    def __init__(self, model: PreTrainedModel | None = None) -> None:
        """`model`: a prepared model with its tokenizer, instead of the one that the configuration names."""
        self.model, self.given = model, model is not None

    def prepare(self, config: Config, started: str) -> Prepared:
        self.settings = config.settings
        if self.model is None or not self.given:
            # Never two at a time.
            self.model = None
            gc.collect()
            self.model = load_model(config.settings)
        return prepare(config, self.model, started)

    def measure(self, work: Work) -> Events:
        assert self.model is not None
        for cell, missing in work:
            yield from measure_cell(self.model, self.settings, cell, missing)

    def diagnose(self, asked: Diagnose, cells: Sequence[Cell], missing: Mapping[str, list[int]]) -> Events:
        assert self.model is not None
        return diagnose_cells(self.model, self.settings, asked, cells, missing)


def load_model(settings: Settings) -> PreTrainedModel:
    """The model that a configuration names."""
    return models.load(
        settings.model,
        dtype=settings.dtype,
        device=settings.device,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        tensor_parallel=settings.tensor_parallel,
    )


def prepare(config: Config, model: PreTrainedModel, started: str) -> Prepared:
    """The cells of a comparison on a loaded model."""
    shared = identity.shared_fields(config, model)
    cells = expand(config, model, shared)
    seed = config.settings.seed
    return Prepared(
        cells,
        {cell.id: cell.task.sample(model.tokenizer, seed, 0).limit for cell in cells},
        {cell.id: identity.fields(cell.task, cell.policy, shared) for cell in cells},
        {
            "dtype": shared["dtype"],
            "device": None if parallel.is_split(model) else str(model.device),
            "revision": shared["revision"] or config.settings.revision,
        },
        environment.describe(model, cells, shared, started),
    )


def measure_cell(model: PreTrainedModel, settings: Settings, cell: Cell, missing: list[int]) -> Events:
    """Measure batch by batch; an error fails this cell alone.

    Where processes share a model, only errors that all of them raise alike fail the cell: after any other the
    rest would wait for ever.
    """
    alone = (UserError, ArithmeticError) if parallel.is_split(model) else Exception

    def measured(first: int) -> list[Record]:
        indexes = missing[first : first + settings.batch_size]
        samples = [cell.task.sample(model.tokenizer, settings.seed, index) for index in indexes]
        return measurement.batch(indexes, samples)

    try:
        measurement = Measurement(model, cell, settings.eager)
        if missing and model.device.type == "cuda":
            measured(0)  # untimed: kernels are compiled, and the steps are captured
        for first in range(0, len(missing), settings.batch_size):
            yield Measured(cell, measured(first))
    except alone as error:
        yield failed(cell, error)
    else:
        yield Finished(cell)


def failed(cell: Cell, error: Exception) -> Failed:
    """The failure that is being handled."""
    reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    return Failed(cell, reason, traceback.format_exc())
