"""Run a comparison: every cell on all of its samples, into a folder from which it can be continued."""

from __future__ import annotations

import contextlib
import datetime
import json
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from transformers import PreTrainedModel

from .. import plugins, processes
from ..errors import UserError
from . import files, manifest, summary
from .config import Config
from .executors import Begun, Executor, Failed, Here, Measured, Plan, Work
from .progress import RunProgress
from .results import Row
from .store import Store


class Outcome(NamedTuple):
    """What came of a run."""

    folder: Path
    rows: list[Row]  # of summary.csv
    failures: dict[str, str]  # by cell id: why


def compare(
    config: Config,
    folder: Path | None = None,
    console: Console | None = None,
    model: PreTrainedModel | None = None,
    executor: Executor | None = None,
) -> Outcome:
    """Measure what the folder does not hold yet and write its summary.

    Args:
        config: from `config.load`.
        folder: None is `results/<name of the config>`; samples of equal cells in it are kept and used.
        console: where progress is shown; None is standard error.
        model: a prepared model with its tokenizer, instead of the one that the config names.
        executor: who measures; None is this process. With `tensor_parallel` all processes that torchrun
            started call this together, and the first of them writes.

    Raises:
        UserError: before anything is measured, for what the model cannot do; later, when results cannot be
            written.
        KeyboardInterrupt: when interrupted; the samples measured so far are in the folder.
    """
    if not config.settings.tensor_parallel:
        processes.check_alone()
    console = console or Console(stderr=True)
    folder = folder or Path("results") / config.name
    config.check_output(folder)
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    executor = executor or Here(model)
    plan = executor.plan(config, started)
    if config.settings.tensor_parallel and processes.rank() > 0:
        return _take_part(executor, folder)
    cells = plan.cells
    with Store(folder / "samples.jsonl") as store:
        files.write(folder / "config.yaml", config.resolved(**plan.facts))
        files.write(
            folder / "environment.json", json.dumps(plan.environment, indent=2, ensure_ascii=False) + "\n"
        )
        manifest.write(folder, cells, config.settings.model, {})
        _tell(console, "run_started", folder=folder, cells=cells)
        missing = {cell.id: store.missing(cell.id, cell.task.samples) for cell in cells}
        work = [(cell, missing[cell.id]) for cell in cells if missing[cell.id]]
        if config.settings.tensor_parallel:
            processes.gather(work)  # the other processes measure the same
        found = sum(cell.task.samples - len(missing[cell.id]) for cell in cells)
        if found:
            console.print(f"{found} samples are already in {folder}", soft_wrap=True)
        failures = _measure(executor, work, plan, store, console)
        manifest.write(folder, cells, config.settings.model, failures)
        rows = summary.write(folder)
    _tell(console, "run_finished", folder=folder, summary=list(rows))
    return Outcome(folder, rows, failures)


def _measure(executor: Executor, work: Work, plan: Plan, store: Store, console: Console) -> dict[str, str]:
    """Store what comes; a cell that fails is reported, and the others go on. Returns the failures."""
    failures: dict[str, str] = {}
    left = {cell.id: len(missing) for cell, missing in work}
    sizes = [(cell, left[cell.id], plan.new_tokens[cell.id]) for cell, _ in work]
    with RunProgress(console, sizes) as progress, contextlib.closing(executor.measure(work)) as events:
        if work:
            progress.begin(work[0][0])
        for event in events:
            cell = event.cell
            progress.begin(cell)
            if isinstance(event, Measured):
                store.append(event.records)
                left[cell.id] -= len(event.records)
                progress.advance(cell, len(event.records))
            elif isinstance(event, Failed):
                failures[cell.id] = event.reason
                progress.fail(cell, event.reason)
                _append(store.path.parent / "errors.txt", f"{cell.label}\n{event.details}\n")
                progress.advance(cell, left[cell.id], measured=False)
            elif isinstance(event, Begun):
                progress.again(cell, event.reason)
            else:
                progress.finish(cell)
    return failures


def _take_part(executor: Executor, folder: Path) -> Outcome:
    """In a process that does not write: measure, with its heads, what the first process gives out."""
    work: Work = []
    for _ in executor.measure(processes.gather(work)[0]):
        pass
    return Outcome(folder, [], {})


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
    for problem in plugins.tell(hook, **arguments):
        console.print(problem, style="yellow", markup=False)
