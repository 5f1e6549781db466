"""Run a comparison: every cell on all of its samples, into a folder from which it can be continued."""

from __future__ import annotations

import datetime
import json
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from transformers import PreTrainedModel

from .. import models, plugins
from ..errors import UserError
from . import environment, summary
from .cells import Cell, expand, new_tokens_at_most, protocol
from .config import Config
from .measure import measure
from .progress import RunProgress
from .store import Store
from .tasks import Sample


class Outcome(NamedTuple):
    """What came of a run."""

    folder: Path
    rows: list[dict[str, Any]]  # the lines of summary.csv
    failures: dict[str, str]  # by cell id: why


def compare(
    config: Config,
    folder: Path | None = None,
    console: Console | None = None,
    model: PreTrainedModel | None = None,
) -> Outcome:
    """Measure what the folder does not hold yet and write its summary.

    Args:
        config: from `config.load`.
        folder: None is `results/<name of the config>`; samples of equal cells in it are kept and used.
        console: where progress is shown; None is standard error.
        model: a prepared model with its tokenizer, instead of the one that the config names.

    Raises:
        UserError: before anything is measured, for what the model cannot do; later, when results cannot be
            written.
        KeyboardInterrupt: when interrupted; the samples measured so far are in the folder.
    """
    console = console or Console(stderr=True)
    folder = folder or Path("results") / config.name
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    settings = config.settings
    if model is None:
        model = models.load(
            settings.model,
            dtype=settings.dtype,
            device=settings.device,
            revision=settings.revision,
            trust_remote_code=settings.trust_remote_code,
        )
    cells = expand(config, model)
    shared = protocol(config, model)
    with Store(folder / "samples.jsonl") as store:
        known = {
            "dtype": shared["dtype"],
            "device": str(model.device),
            "revision": shared["revision"] or settings.revision,
        }
        _write(folder / "config.yaml", config.resolved(**known))
        described = environment.describe(model, cells, shared, started)
        _write(folder / "environment.json", json.dumps(described, indent=2, ensure_ascii=False))
        _write_cells(folder, config, cells, {})
        _tell(console, "run_started", folder=folder, cells=cells)
        failures = _Run(config, model, store, console).all(cells)
        _write_cells(folder, config, cells, failures)
        rows = summary.write(folder)
    _tell(console, "run_finished", folder=folder, summary=rows)
    return Outcome(folder, rows, failures)


class _Run:
    def __init__(self, config: Config, model: PreTrainedModel, store: Store, console: Console) -> None:
        self.seed, self.batch_size = config.settings.seed, config.settings.batch_size
        self.model, self.store, self.console = model, store, console

    def all(self, cells: list[Cell]) -> dict[str, str]:
        """Measure every cell; one that fails is reported, and the others go on. Returns the failures."""
        failures: dict[str, str] = {}
        work = []
        for cell in cells:
            missing = len(self.store.missing(cell.id, cell.task.samples))
            if missing:
                work.append(
                    (cell, missing, new_tokens_at_most(cell.task.sample(self.model.tokenizer, self.seed, 0)))
                )
        found = sum(cell.task.samples for cell in cells) - sum(missing for _, missing, _ in work)
        if found:
            self.console.print(f"{found} samples are already in {self.store.path.parent}", soft_wrap=True)
        with RunProgress(self.console, work) as progress:
            for cell, _, _ in work:
                progress.begin(cell)
                try:
                    for batch in self._batches(cell):
                        progress.advance(cell, batch)
                except _NotWritten as error:
                    raise UserError(str(error)) from None
                except Exception as error:
                    reason = (
                        str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
                    )
                    failures[cell.id] = reason
                    progress.fail(cell, reason)
                    _append(
                        self.store.path.parent / "errors.txt", f"{cell.label}\n{traceback.format_exc()}\n"
                    )
                    left = len(self.store.missing(cell.id, cell.task.samples))
                    progress.advance(cell, left, measured=False)
                else:
                    progress.finish(cell)
        return failures

    def _batches(self, cell: Cell) -> Iterator[int]:
        """Measure and store what is missing of a cell, a batch at a time; yields the size of each."""
        missing = self.store.missing(cell.id, cell.task.samples)
        if missing and self.model.device.type == "cuda":
            measure(
                self.model, cell, *self._samples(cell, missing[:1])
            )  # kernels are compiled at their first call
        for first in range(0, len(missing), self.batch_size):
            indexes = missing[first : first + self.batch_size]
            records = measure(self.model, cell, *self._samples(cell, indexes))
            try:
                self.store.append(records)
            except UserError as error:
                raise _NotWritten(str(error)) from None
            yield len(indexes)

    def _samples(self, cell: Cell, indexes: list[int]) -> tuple[list[int], list[Sample]]:
        return indexes, [cell.task.sample(self.model.tokenizer, self.seed, index) for index in indexes]


class _NotWritten(Exception):
    """Results cannot be stored: no matter of one cell."""


def _write_cells(folder: Path, config: Config, cells: list[Cell], failures: dict[str, str]) -> None:
    """cells.json: the lines of the summary in their order, without their numbers."""
    lines = [
        {
            "cell": cell.id,
            "label": cell.label,
            "model": config.settings.model,
            "task": cell.task.name,
            "context": cell.task.context,
            "policy": cell.policy_name,
            "parameters": cell.parameters,
            "compression": "" if cell.compression is None else str(cell.compression),
            "metric": cell.task.metric,
            "higher_is_better": cell.task.higher_is_better,
            "samples": cell.task.samples,
            "error": failures.get(cell.id),
        }
        for cell in cells
    ]
    _write(folder / summary.CELLS, json.dumps(lines, indent=1, ensure_ascii=False))


def _write(path: Path, text: str) -> None:
    """Replace a file in one move."""
    try:
        beside = path.with_name(path.name + ".tmp")
        beside.write_text(text + ("" if text.endswith("\n") else "\n"), encoding="utf-8")
        os.replace(beside, path)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}; the samples measured so far are safe"
        ) from None


def _append(path: Path, text: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(text)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written: {error.strerror}; the samples measured so far are safe"
        ) from None


def _tell(console: Console, hook: str, **arguments: Any) -> None:
    """Call a run-level hook; a plugin that fails in it is reported and spoils nothing."""
    try:
        getattr(plugins.hook(), hook)(**arguments)
    except Exception as error:
        console.print(
            f"a plugin failed in {hook}: {type(error).__name__}: {error}", style="yellow", markup=False
        )
