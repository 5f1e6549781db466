"""Run a comparison: every cell on all of its samples, into a folder from which it can be continued."""

from __future__ import annotations

import contextlib
import datetime
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from transformers import PreTrainedModel

from .. import plugins, processes
from ..errors import UserError
from . import diagnostics, files, identity, manifest, summary
from .cells import Cell
from .config import Config
from .environment import Load
from .execute import Executor, Failed, Measured, Prepared, Restarted, Work
from .execute.local import Local
from .progress import RunProgress
from .results import Row
from .samples import Store


class Compared(NamedTuple):
    """The results of a comparison."""

    folder: Path
    rows: list[Row]  # of summary.csv
    failures: dict[str, str]  # by cell id: why
    missing: int = 0  # samples that were asked for and are not in the folder, though their cells did not fail


def compare(
    config: Config,
    folder: Path | None = None,
    console: Console | None = None,
    model: PreTrainedModel | None = None,
    executor: Executor | None = None,
) -> Compared:
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
    executor = executor or Local(model)
    load = Load()
    at_start = load.now()
    prepared = executor.prepare(config, started)
    if config.settings.tensor_parallel and processes.rank() > 0:
        return _take_part(executor, folder)
    cells = prepared.cells
    with Store(folder / "samples.jsonl") as store:
        with _safe():
            files.write(folder / "config.yaml", config.resolved(**prepared.facts))
            _write_environment(folder, prepared, {"start": at_start})
            manifest.write(folder, cells, config.settings.model, {})
        _tell(console, "run_started", folder=folder, cells=list(cells))
        missing = {cell.id: store.missing(cell.id, cell.task.samples) for cell in cells}
        work = [(cell, missing[cell.id]) for cell in cells if missing[cell.id]]
        if config.settings.tensor_parallel:
            processes.gather(work)  # the other processes measure the same
        found = sum(cell.task.samples - len(missing[cell.id]) for cell in cells)
        if found:
            console.print(f"{found} samples are already in {folder}", soft_wrap=True)
        for line in _unused(store, work, prepared, identity.read(folder)):
            console.print(line, style="yellow", soft_wrap=True, markup=False, highlight=False)
        with _safe():
            identity.write(folder, prepared.fields)
        failures = _measure(executor, work, prepared, store, console)
        with _safe():
            during = load.since()
            if not isinstance(executor, Local):  # its workers are other processes, and maybe elsewhere
                del during["not_to_be_quoted"]
            _write_environment(folder, prepared, {"start": at_start, "run": during})
            manifest.write(folder, cells, config.settings.model, failures)
        if work and (disturbed := during.get("not_to_be_quoted")):
            console.print(f"tokens/s are not to be quoted: {disturbed}", style="yellow", soft_wrap=True)
        store.restore()
        rows = summary.write(folder, store.records.values())
        _diagnose(executor, config, [cell for cell in cells if cell.id not in failures], folder, console)
        _tell(console, "run_finished", folder=folder, summary=list(rows))
        store.restore()
        if store.restored:
            console.print(
                f"{store.path}: another program changed it during the run; {store.restored} samples were "
                "written again",
                style="yellow", soft_wrap=True, markup=False, highlight=False,
            )  # fmt: skip
        lost = sum(len(store.missing(c.id, c.task.samples)) for c in cells if c.id not in failures)
    return Compared(folder, rows, failures, lost)


def _unused(store: Store, work: Work, prepared: Prepared, known: dict[str, identity.Fields]) -> list[str]:
    """A line for each reason why samples of the same task and policy in the folder are not used."""
    asked: dict[str, str] = {_asked(cell.record()): cell.id for cell, _ in work}
    others: Counter[tuple[str, str]] = Counter()
    for record in store.records.values():
        now = asked.get(_asked(record)) or record["cell"]
        if record["cell"] != now:
            others[now, record["cell"]] += 1
    labels = {cell.id: cell.label for cell in prepared.cells}
    reasons: dict[str, list[tuple[str, int]]] = {}
    for (now, then), count in others.items():
        old = known.get(then)
        changes = identity.differences(old, prepared.fields[now]) if old else []
        reason = ", another ".join(changes) if changes else "version of kvsieve, which did not note its own"
        reasons.setdefault(reason, []).append((labels[now], count))
    lines = []
    for reason, cells in reasons.items():
        where = cells[0][0] if len(cells) == 1 else f"{len(cells)} cells, such as {cells[0][0]},"
        count = sum(count for _, count in cells)
        lines.append(f"{count} samples of {where} were measured with another {reason} and are not used")
    return lines


def _asked(record: dict[str, Any]) -> str:
    """The task and the policy of a record."""
    return json.dumps([record.get("task"), record.get("policy")], sort_keys=True)


def _measure(
    executor: Executor, work: Work, prepared: Prepared, store: Store, console: Console
) -> dict[str, str]:
    """Store batches as they come; report cells that fail. Returns the reasons by cell id."""
    failures: dict[str, str] = {}
    left = {cell.id: len(missing) for cell, missing in work}
    sizes = [(cell, left[cell.id], prepared.new_tokens[cell.id]) for cell, _ in work]
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
            elif isinstance(event, Restarted):
                progress.again(cell, event.reason)
            else:
                progress.finish(cell)
    return failures


def _diagnose(executor: Executor, config: Config, cells: list[Cell], folder: Path, console: Console) -> None:
    """Compare samples of these cells with dense attention, if the file asks for it; report what fails."""
    if config.settings.diagnose is None:
        return
    with _safe():
        failed = diagnostics.run(executor, config.settings.diagnose, cells, folder, console)
    for cell, reason, details in failed:
        console.print(
            f"no diagnostics of {cell.label}: {reason}", style="yellow", soft_wrap=True, markup=False,
            highlight=False,
        )  # fmt: skip
        _append(folder / "errors.txt", f"diagnostics of {cell.label}\n{details}\n")


def _take_part(executor: Executor, folder: Path) -> Compared:
    """In a process that does not write: measure the work that the first process hands out."""
    work: Work = []
    for _ in executor.measure(processes.gather(work)[0]):
        pass
    return Compared(folder, [], {})


def _write_environment(folder: Path, prepared: Prepared, load: dict[str, Any]) -> None:
    """environment.json; `load` is how busy the machine was that stores the samples."""
    text = json.dumps(prepared.environment | {"load": load}, indent=2, ensure_ascii=False)
    files.write(folder / "environment.json", text + "\n")


def _append(path: Path, text: str) -> None:
    """Add to a log; a link is not followed."""
    flags = (
        os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    )
    with _safe():
        try:
            with open(os.open(path, flags, 0o666), "a", encoding="utf-8", errors="replace") as file:
                file.write(text)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None


@contextlib.contextmanager
def _safe() -> Iterator[None]:
    """Add to the message of a file that cannot be written that nothing is lost."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; the samples measured so far are safe") from None


def _tell(console: Console, hook: str, **arguments: Any) -> None:
    """Call a run-level hook; a plugin that fails in it is reported and spoils nothing."""
    for problem in plugins.tell(hook, **arguments):
        console.print(problem, style="yellow", markup=False)
