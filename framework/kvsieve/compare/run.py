"""Run a comparison: every cell on all of its samples, into a folder from which it can be continued."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from .. import plugins, processes
from ..errors import UserError
from . import diagnostics, earlier, identity, manifest, rounds, summary
from .cells import Cell
from .config import Config
from .execute import Began, Executor, Measured, Prepared, Restarted, Work, units
from .execute.local import Local
from .journal import Journal, safe
from .progress import RunProgress
from .results import Results, Row
from .samples import Store
from .terminal import overview


class Compared(NamedTuple):
    """The results of a comparison."""

    folder: Path
    rows: list[Row]  # of summary.csv
    failures: dict[str, str]  # by cell id, or model: why
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
        UserError: before anything is measured, for what the model cannot do, or a folder that holds another
            comparison; later, when results cannot be written.
        KeyboardInterrupt: when interrupted; the samples measured so far are in the folder.
    """
    if not config.settings.tensor_parallel:
        processes.check_alone()
    console = console or Console(stderr=True)
    folder = folder or Path("results") / config.name
    config.check_output(folder)
    if model is not None and len(config.models) > 1:
        raise UserError(f"a prepared model is one, and the file names {len(config.models)}: leave it out")
    executor = executor or Local(model)
    models = _prepared(executor, config)
    first = next(models)  # refused before anything is written
    if config.settings.tensor_parallel and processes.rank() > 0:
        return _take_part(executor, itertools.chain([first], models), folder)
    with Store(folder / "samples.jsonl") as store:
        assert isinstance(first[1], Prepared), "what the first model cannot do is raised"
        asked = manifest.entries(first[1].cells, config.models[0], {})
        note = earlier.left_out(folder, list(store.records.values()), asked, config.models)
        if note:
            console.print(note, style="yellow", soft_wrap=True, markup=False, highlight=False)
        # The workers of another executor are other processes, and maybe elsewhere.
        journal = Journal(config, store, here=isinstance(executor, Local))
        for one, prepared in itertools.chain([first], models):
            if isinstance(prepared, UserError):
                journal.cannot(one.settings.model, prepared)
                console.print(
                    f"failed: model {one.settings.model}: {prepared}",
                    style="red", soft_wrap=True, markup=False, highlight=False,
                )  # fmt: skip
                continue
            if len(config.models) > 1:
                console.print(f"model {one.settings.model}", soft_wrap=True, markup=False, highlight=False)
            measured = _measure_model(executor, one, config.models, prepared, store, journal, console)
            store.restore()
            rows = summary.write(folder, store.records.values())
            _diagnose(executor, one, measured, journal, console)
        if journal.measured and journal.disturbed:
            note = f"tokens/s are not to be quoted: {journal.disturbed}"
            console.print(note, style="yellow", soft_wrap=True)
        _tell(console, "run_finished", folder=folder, summary=list(rows))
        store.restore()
        if store.restored:
            console.print(
                f"{store.path}: another program changed it during the run; {store.restored} samples were "
                "written again",
                style="yellow", soft_wrap=True, markup=False, highlight=False,
            )  # fmt: skip
        cells = [cell for prepared in journal.prepared.values() for cell in prepared.cells]
        lost = sum(len(store.missing(c.id, c.task.samples)) for c in cells if c.id not in journal.failures)
    return Compared(folder, rows, journal.failures, lost)


def _prepared(executor: Executor, config: Config) -> Iterator[tuple[Config, Prepared | UserError]]:
    """The comparison on each model, prepared when its turn comes; or why a later one cannot be.

    Raises:
        UserError: what the first model cannot do.
    """
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    for number, one in enumerate(config.each()):
        found: Prepared | UserError
        try:
            found = executor.prepare(one, started)
        except UserError as error:
            if number == 0:
                raise
            found = error
        yield one, found


def _measure_model(
    executor: Executor,
    config: Config,
    models: Sequence[str],
    prepared: Prepared,
    store: Store,
    journal: Journal,
    console: Console,
) -> list[Cell]:
    """Measure the cells of one of the `models`, in rounds where the file asks for it; return those that did
    not fail.
    """
    model, cells = config.settings.model, rounds.begin(prepared.cells, config.rounds)
    notes: list[str] | None = None  # on what needs another round
    while notes is None or notes:
        now = prepared._replace(cells=cells)
        journal.begin(model, now)
        if notes is None:
            _tell(console, "run_started", folder=journal.folder, cells=list(cells))
            _say_what_is_there(config, models, now, store, console)
        journal.end(_measure_missing(executor, config, now, store, journal, console))
        entries = manifest.entries(cells, model, journal.failures)
        cells, notes = rounds.go_on(cells, entries, store.records.values(), config.rounds)
        for note in notes:
            console.print(note, soft_wrap=True, markup=False, highlight=False)
    if config.settings.tensor_parallel:
        processes.gather(None)  # the other processes go on to the next model
    return [cell for cell in cells if cell.id not in journal.failures]


def _measure_missing(
    executor: Executor, config: Config, prepared: Prepared, store: Store, journal: Journal, console: Console
) -> dict[str, str]:
    """Measure what the folder does not hold of a model. Returns why cells failed, by their id."""
    cells = [cell for cell in prepared.cells if cell.id not in journal.failures]
    work = units(cells, {cell.id: store.missing(cell.id, cell.task.samples) for cell in cells})
    if config.settings.tensor_parallel:
        processes.gather(work)  # the other processes measure the same
    entries = manifest.entries(cells, config.settings.model, {})

    def so_far() -> Iterator[Table]:
        return overview(Results(summary.summarize(entries, store.records.values())), console)

    with RunProgress(console, work, prepared.new_tokens, so_far) as progress:
        return _measure(executor, work, store, journal, progress)


def _say_what_is_there(
    config: Config, models: Sequence[str], prepared: Prepared, store: Store, console: Console
) -> None:
    """Say which samples of one of the `models` the folder holds, and why it uses others not."""
    folder = store.path.parent
    missing = {cell.id: store.missing(cell.id, cell.task.samples) for cell in prepared.cells}
    found = sum(cell.task.samples - len(missing[cell.id]) for cell in prepared.cells)
    if found:
        console.print(f"{found} samples are already in {folder}", soft_wrap=True)
    known = identity.read(folder)
    theirs = {
        id for id, fields in known.items() if fields.get("model") in {*models} - {config.settings.model}
    }
    for line in _unused(store, units(prepared.cells, missing), prepared, known, theirs):
        console.print(line, style="yellow", soft_wrap=True, markup=False, highlight=False)
    with safe():
        identity.write(folder, prepared.fields)


def _unused(
    store: Store,
    work: Work,
    prepared: Prepared,
    known: dict[str, identity.Fields],
    theirs: Collection[str],
) -> list[str]:
    """A line for each reason why samples of the same task and policy in the folder are not used.

    But for cells of the comparison's other models, `theirs`.
    """
    asked: dict[str, str] = {_asked(cell.record()): cell.id for unit in work for cell in unit.cells}
    others: Counter[tuple[str, str]] = Counter()
    for record in store.records.values():
        now = asked.get(_asked(record)) or record["cell"]
        if record["cell"] != now and record["cell"] not in theirs:
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
    executor: Executor, work: Work, store: Store, journal: Journal, progress: RunProgress
) -> dict[str, str]:
    """Store batches as they come; report cells that fail. Returns the reasons by cell id."""
    failures: dict[str, str] = {}
    left = {name: len(missing) for unit in work for name, missing in unit.missing.items()}
    with contextlib.closing(executor.measure(work)) as events:
        for event in events:
            cell = event.cell
            if isinstance(event, Began):
                progress.begin(cell)
            elif isinstance(event, Measured):
                store.append(event.records)
                if cell.id in failures:  # elsewhere: other samples of it were being measured
                    continue
                left[cell.id] -= len(event.records)
                progress.advance(cell, len(event.records))
                if left[cell.id] == 0:
                    progress.finish(cell)
            elif isinstance(event, Restarted):
                progress.again(cell, event.reason)
            elif cell.id not in failures:
                failures[cell.id] = event.reason
                progress.fail(cell, event.reason)
                journal.error(cell.label, event.details)
                progress.advance(cell, left[cell.id], measured=False)
    return failures


def _diagnose(
    executor: Executor, config: Config, cells: list[Cell], journal: Journal, console: Console
) -> None:
    """Compare samples of these cells with dense attention, if the file asks for it; report what fails."""
    if config.settings.diagnose is None:
        return
    with safe():
        failed = diagnostics.run(executor, config.settings.diagnose, cells, journal.folder, console)
    for cell, reason, details in failed:
        console.print(
            f"no diagnostics of {cell.label}: {reason}", style="yellow", soft_wrap=True, markup=False,
            highlight=False,
        )  # fmt: skip
        journal.error(f"diagnostics of {cell.label}", details)


def _take_part(
    executor: Executor, models: Iterable[tuple[Config, Prepared | UserError]], folder: Path
) -> Compared:
    """In a process that does not write: measure the work that the first process hands out."""
    for _, prepared in models:
        if isinstance(prepared, Prepared):
            while (work := processes.gather(None)[0]) is not None:
                for _ in executor.measure(work):
                    pass
    return Compared(folder, [], {})


def _tell(console: Console, hook: str, **arguments: Any) -> None:
    """Call a run-level hook; a plugin that fails in it is reported and spoils nothing."""
    for problem in plugins.tell(hook, **arguments):
        console.print(problem, style="yellow", markup=False)
