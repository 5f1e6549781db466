"""Measure in this process, one task after the other, in the order of the file."""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence

from transformers import PreTrainedModel

from ...hf import models, parallel
from .. import environment, identity
from ..cells import Cell, expand
from ..config import Config, Diagnose, Settings
from . import Events, Prepared, Work, heap
from .batch import batch_size
from .diagnose import diagnose_cells
from .unit import measure_unit


class Local:
    """An executor in this process."""

    def __init__(self, model: PreTrainedModel | None = None) -> None:
        """`model`: a prepared model with its tokenizer, instead of the one that the configuration names."""
        self.model, self.given = model, model is not None

    def prepare(self, config: Config, started: str) -> Prepared:
        if self.model is None or not self.given:
            # Never two at a time.
            self.model = None
            gc.collect()
            heap.give_back()
            self.model = load_model(config.settings)
        prepared = prepare(config, self.model, started)
        self.settings = config.settings.model_copy(update={"batch_size": prepared.batch_size})
        return prepared

    def measure(self, work: Work) -> Events:
        assert self.model is not None
        for unit in work:
            yield from measure_unit(self.model, self.settings, unit)

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
    new_tokens = {cell.id: cell.task.sample(model.tokenizer, seed, 0).limit for cell in cells}
    rows = batch_size(config.settings, model, cells, new_tokens)
    return Prepared(
        cells,
        new_tokens,
        {cell.id: identity.fields(cell.task, cell.policy, shared) for cell in cells},
        {
            "dtype": shared["dtype"],
            "device": None if parallel.is_split(model) else str(model.device),
            "revision": shared["revision"] or config.settings.revision,
            "batch_size": rows,
        },
        environment.describe(model, cells, shared, started),
        rows,
    )
