"""diagnostics.jsonl: the first samples of every cell beside dense attention, by layer and head; on request.

They are made when everything else is measured and written, are no part of a cell's id, and change nothing of
its samples.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pydantic
from rich import box
from rich.console import Console
from rich.table import Table

from . import code, manifest, samples
from .cells import Cell
from .config import Diagnose
from .execute import Executor, Failed, Measured
from .results import short_models
from .samples import Record
from .tasks import Task

NAME = "diagnostics.jsonl"
NUMBERS = ("mass", "recall", "error", "tail")
_ByHead = list[list[pydantic.FiniteFloat]]  # of every layer, its query heads


class Fields(samples.Fields):
    """The fields of a line: means over the decode steps of a sample."""

    KEY: ClassVar[tuple[str, ...]] = ("cell", "sample", "method")

    method: str  # the steps that were asked for, and the code that compared
    steps: pydantic.NonNegativeInt  # made; 0: there are no numbers
    layers: list[int]  # their numbers in the model
    mass: _ByHead
    recall: _ByHead
    error: _ByHead
    tail: _ByHead


def run(
    executor: Executor, asked: Diagnose, cells: Sequence[Cell], folder: Path, console: Console
) -> list[Failed]:
    """Diagnose what the folder does not hold yet; return the cells that failed.

    Tasks that implement `answer` are left out: their requests are not the samples.

    Raises:
        UserError: the file cannot be written.
    """
    left_out = dict.fromkeys(c.task.title for c in cells if type(c.task).answer is not Task.answer)
    for title in left_out:
        console.print(f"no diagnostics of {title}: it asks the model in its own way", markup=False)
    cells = [cell for cell in cells if cell.task.title not in left_out]
    method = (
        f"{asked.steps} steps, {code.digest_of('kvsieve.diagnostics', 'kvsieve.compare.execute.diagnose')}"
    )
    failed = []
    with samples.Store(folder / NAME, Fields) as store, console.status("diagnostics") as status:
        missing = {
            cell.id: [
                index
                for index in range(min(asked.samples, cell.task.samples))
                if (cell.id, index, method) not in store.records
            ]
            for cell in cells
        }
        done, total = 0, sum(map(len, missing.values()))
        for event in executor.diagnose(asked, [cell for cell in cells if missing[cell.id]], missing):
            if isinstance(event, Measured):
                store.append([{**record, "method": method} for record in event.records])
                done += len(event.records)
                status.update(f"diagnostics: {done}/{total} samples, {event.cell.label}")
            elif isinstance(event, Failed):
                failed.append(event)
    return failed


def read(folder: Path) -> dict[str, list[Record]]:
    """The lines of a run folder that have numbers, by cell; of several methods, those of the last."""
    found: dict[str, list[Record]] = {}
    for record in samples.read(folder / NAME, Fields):
        of_cell = found.setdefault(record["cell"], [])
        if of_cell and of_cell[-1]["method"] != record["method"]:
            of_cell.clear()
        of_cell.append(record)
    numbers = {cell: [record for record in records if record["steps"]] for cell, records in found.items()}
    return {cell: records for cell, records in numbers.items() if records}


@dataclasses.dataclass(frozen=True)
class Diagnosed:
    """A policy on one model beside dense attention: means over its samples, and then over its tasks."""

    policy: str
    label: str  # as in the tables; where there are several, with its model and its run
    samples: int
    steps: int  # of a sample, at most
    layers: list[int]  # their numbers in the model
    numbers: np.ndarray  # [4, L, H], in the order of NUMBERS


def by_policy(folder: Path) -> list[Diagnosed]:
    """Every policy that was diagnosed in a run folder, in the order of its cells."""
    diagnosed = read(folder)
    if not diagnosed:
        return []
    entries = manifest.read(folder, samples.read(folder / "samples.jsonl"))
    models = short_models(entry.model for entry in entries)
    tasks: dict[tuple[str, str], list[list[Record]]] = {}
    for entry in entries:
        if entry.cell in diagnosed:
            on, run = models[entry.model], entry.run
            where = [f" on {on}" if on else "", f" in {run}" if run else ""]
            label = "".join([entry.policy_label, *where])
            tasks.setdefault((entry.policy, label), []).append(diagnosed[entry.cell])
    return [_joined(policy, label, of_policy) for (policy, label), of_policy in tasks.items()]


def _joined(policy: str, label: str, tasks: list[list[Record]]) -> Diagnosed:
    records = [record for of_task in tasks for record in of_task]
    means = [np.mean([[one[name] for name in NUMBERS] for one in of_task], axis=0) for of_task in tasks]
    steps = max(record["steps"] for record in records)
    return Diagnosed(policy, label, len(records), steps, records[0]["layers"], np.mean(means, axis=0))


def show(folder: Path, console: Console) -> None:
    """Print a line for every policy that was diagnosed."""
    found = by_policy(folder)
    if not found:
        return
    table = Table(box=box.SIMPLE, title="beside dense attention", title_justify="left")
    table.add_column("policy")
    for heading in ("mass kept", "recall", "error", "tail"):
        table.add_column(heading, justify="right")
    for one in found:
        table.add_row(one.label, *(f"{number:.3f}" for number in one.numbers.mean((1, 2))))
    console.print(table)
