"""Where the cells of a comparison are measured: here, one after the other. `on_ray` does it on a cluster."""

from __future__ import annotations

import traceback
from collections.abc import Generator, Sequence
from typing import Any, NamedTuple, Protocol

from transformers import PreTrainedModel

from ..errors import UserError
from ..hf import models, parallel
from . import environment
from .cells import Cell, expand, new_tokens_at_most, protocol
from .config import Config, Settings
from .measure import Measurement
from .store import Record

Work = Sequence[tuple[Cell, list[int]]]  # cells, and which of their samples are to be measured


class Plan(NamedTuple):
    """What is known of a comparison once the model is loaded."""

    cells: list[Cell]
    new_tokens: dict[str, int]  # that a sample decodes at most, by cell id
    facts: dict[str, Any]  # settings known better now
    environment: dict[str, Any]  # where it is measured


class Measured(NamedTuple):
    """A batch of a cell."""

    cell: Cell
    records: list[Record]


class Failed(NamedTuple):
    """A cell that goes no further."""

    cell: Cell
    reason: str
    details: str


class Finished(NamedTuple):
    """A cell that is through."""

    cell: Cell


class Begun(NamedTuple):
    """A cell that is begun again where it stopped."""

    cell: Cell
    reason: str


Events = Generator[Measured | Failed | Finished | Begun, None, None]


class Executor(Protocol):
    """Who measures: batches come back as they are measured, and whoever asks stores them."""

    def plan(self, config: Config, started: str) -> Plan:
        """Load the model, expand the cells. Raises UserError for what the model cannot do."""

    def measure(self, work: Work) -> Events:
        """Of every cell its batches and then how it ended; cells may be mixed."""


class Here:
    """In this process, in the order of the file."""

    def __init__(self, model: PreTrainedModel | None = None) -> None:
        """`model`: instead of the one that the configuration names."""
        self.model = model

    def plan(self, config: Config, started: str) -> Plan:
        self.settings = config.settings
        self.model = self.model or load_model(config.settings)
        return plan(config, self.model, started)

    def measure(self, work: Work) -> Events:
        assert self.model is not None
        for cell, missing in work:
            yield from measure_cell(self.model, self.settings, cell, missing)


def load_model(settings: Settings) -> PreTrainedModel:
    return models.load(
        settings.model,
        dtype=settings.dtype,
        device=settings.device,
        revision=settings.revision,
        trust_remote_code=settings.trust_remote_code,
        tensor_parallel=settings.tensor_parallel,
    )


def plan(config: Config, model: PreTrainedModel, started: str) -> Plan:
    cells = expand(config, model)
    shared = protocol(config, model)
    seed = config.settings.seed
    return Plan(
        cells,
        {cell.id: new_tokens_at_most(cell.task.sample(model.tokenizer, seed, 0)) for cell in cells},
        {
            "dtype": shared["dtype"],
            "device": None if parallel.is_split(model) else str(model.device),
            "revision": shared["revision"] or config.settings.revision,
        },
        environment.describe(model, cells, shared, started),
    )


def measure_cell(model: PreTrainedModel, settings: Settings, cell: Cell, missing: list[int]) -> Events:
    """Batch by batch; what goes wrong is the cell's matter alone.

    Where processes share a model, only what fails in all of them alike: else the others would wait for ever.
    """
    alone = (UserError, ArithmeticError) if parallel.is_split(model) else Exception

    def measured(first: int) -> list[Record]:
        indexes = missing[first : first + settings.batch_size]
        samples = [cell.task.sample(model.tokenizer, settings.seed, index) for index in indexes]
        return measurement.batch(indexes, samples)

    try:
        measurement = Measurement(model, cell, settings.eager)
        if missing and model.device.type == "cuda":
            measured(0)  # untimed: kernels are compiled, and the step is captured
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
