"""The cells of a comparison with their time and memory, estimated from few batches; nothing is written.

A batch of the shortest task is measured under every policy, and a few samples of every task under one of
them: how much longer these take to read, and how many steps of which length answer them, scales the others.
"""

from __future__ import annotations

import datetime
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..errors import UserError
from . import samples
from .cells import Cell
from .config import Config
from .execute import Began, Executor, Failed, Measured, Unit, cost
from .execute.local import Local
from .markdown import megabytes
from .progress import minutes
from .results import MISSING
from .samples import Record


class Estimate(NamedTuple):
    """A cell of a comparison."""

    model: str
    cell: Cell
    missing: int  # samples that the folder does not hold
    seconds: float | None  # to measure these; None: the cell failed
    kv_bytes: float | None  # that a batch holds once its prompts are read
    error: str = ""  # why it failed
    measured: bool = False  # its time; else it was scaled


_FEW = 8  # samples of every task, at most


class _Rate(NamedTuple):
    """One batch of a cell."""

    seconds: float  # for a sample
    step: float  # of these, for a decode step; 0: its task tells no speed
    steps: int  # of the batch
    kv_bytes: float  # of a sample

    @property
    def reading(self) -> float:
        """Seconds of a sample for all but its steps."""
        return max(self.seconds - self.steps * self.step, 0.0)


def estimate(
    config: Config,
    folder: Path,
    executor: Executor | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Estimate]:
    """Measure a batch of each model's task with the shortest context under every policy, and a few samples of
    every task under the first of them that does not fail; and scale.

    Of two batches, the first of which compiles and captures, the second counts. Times follow those of the few
    samples, reading and steps apart; where these failed, the tokens read and decoded. Memory follows the
    tokens held.

    Raises:
        UserError: what a model cannot do; or the model is to be shared among processes.
    """
    if config.settings.tensor_parallel:
        raise UserError("a dry run is for one process: leave out tensor_parallel")
    executor = executor or Local()
    started = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    known = {(record["cell"], record["sample"]) for record in samples.read(folder / "samples.jsonl")}
    found = []
    for one in config.each():
        prepared = executor.prepare(one, started)
        shortest = min((cell.task for cell in prepared.cells), key=lambda task: task.context)
        base = [cell for cell in prepared.cells if cell.task == shortest]
        rows = prepared.batch_size
        rates, errors = _measured(executor, [base], min(2 * rows, shortest.samples), clock)
        yardstick = next((number for number, cell in enumerate(base) if cell.id in rates), 0)
        alone = [[cell] for cell in prepared.cells[yardstick :: len(base)]]
        few, _ = _measured(executor, alone, min(_FEW, rows, shortest.samples), clock) if rates else ({}, {})
        for number, cell in enumerate(prepared.cells):
            like = base[number % len(base)]  # every task meets the same policies, in their order
            missing = sum((cell.id, sample) not in known for sample in range(cell.task.samples))
            if like.id in rates:
                measured = cell.id in rates
                pair = base[yardstick], prepared.cells[number - number % len(base) + yardstick]
                seconds, held = _scaled(rates[like.id], like, cell, len(base), prepared.new_tokens)
                if measured:
                    seconds = rates[cell.id].seconds
                elif all(each.id in few for each in pair):
                    seconds = _as_the_few(rates[like.id], *(few[each.id] for each in pair))
                estimate = Estimate(
                    one.settings.model, cell, missing, missing * seconds, rows * held, measured=measured
                )
                found.append(estimate)
            else:
                reason = errors.get(like.id, "nothing was measured")
                found.append(Estimate(one.settings.model, cell, missing, None, None, reason))
    return found


def show(estimates: Sequence[Estimate], console: Console) -> None:
    """Print a line for each cell, and the time of all."""
    several = len({one.model for one in estimates}) > 1
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for heading in [*(["model"] if several else []), "cell"]:
        table.add_column(heading, overflow="fold")
    for heading in ("samples", "time", "from", "KV MB of a batch"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in estimates:
        taken = MISSING if one.seconds is None else minutes(one.seconds)
        label = one.cell.label + (f": {one.error}" if one.error else "")
        how = MISSING if one.seconds is None else "measured" if one.measured else "scaled"
        cells = [escape(label), str(one.missing), taken, how, megabytes(one.kv_bytes)]
        table.add_row(*([escape(one.model)] if several else []), *cells)
    console.print(table)
    for task, seconds in _by_task(estimates).items():
        console.print(f"{task}: {minutes(seconds)}", soft_wrap=True, markup=False, highlight=False)
    total = sum(one.seconds or 0 for one in estimates)
    console.print(
        f"about {minutes(total)} in all in one process. "
        "Measured: a batch of the shortest task under every policy, "
        f"and up to {_FEW} samples of every task under the first; the rest is scaled from these. "
        "While a prompt is read, up to as much memory as dense attention holds. Nothing was written.",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


def _by_task(estimates: Sequence[Estimate]) -> dict[str, float]:
    """The seconds of each task, all policies and models together."""
    found: dict[str, float] = {}
    for one in estimates:
        task = f"{one.cell.task.title} {one.cell.task.context}"
        found[task] = found.get(task, 0.0) + (one.seconds or 0)
    return found


def _as_the_few(rate: _Rate, few_like: _Rate, few: _Rate) -> float:
    """Seconds of a sample under the policy of `rate`, as few samples of the two tasks went under another."""
    if not (rate.step and few.step and few_like.step and few_like.reading):
        return rate.seconds * few.seconds / few_like.seconds
    reading = rate.reading * few.reading / few_like.reading
    return reading + few.steps * rate.step * few.step / few_like.step


def _scaled(
    rate: _Rate, like: Cell, cell: Cell, policies: int, new_tokens: Mapping[str, int]
) -> tuple[float, float]:
    """Seconds and bytes of a sample of `cell`, as one of `like` took them under the same policy."""
    new, new_like = new_tokens[cell.id], new_tokens[like.id]
    context, context_like = cell.task.context, like.task.context
    seconds = rate.seconds * cost(context, policies, new) / cost(context_like, policies, new_like)
    if cell.policy == like.policy and cell.policy.keeps is not None:
        return seconds, rate.kv_bytes  # it holds no more of a longer prompt
    return seconds, rate.kv_bytes * (context + new) / (context_like + new_like)


def _measured(
    executor: Executor, tasks: Sequence[Sequence[Cell]], count: int, clock: Callable[[], float]
) -> tuple[dict[str, _Rate], dict[str, str]]:
    """Return by cell id how the last batch of so many samples went, or why the cell failed."""
    rates, errors = dict[str, _Rate](), dict[str, str]()
    began = 0.0
    for cells in tasks:  # one by one: an executor may measure several units at a time
        unit = Unit(list(cells), {cell.id: list(range(min(count, cell.task.samples))) for cell in cells})
        for event in executor.measure([unit]):
            if isinstance(event, Began):
                began = clock()
            elif isinstance(event, Measured):
                rates[event.cell.id] = _rate(event.records, clock() - began)
            elif isinstance(event, Failed):
                errors[event.cell.id] = event.reason
    return rates, errors


def _rate(records: Sequence[Record], seconds: float) -> _Rate:
    """Tell the rate of a batch of a cell that took so long."""
    rows, speeds = len(records), records[0]["tokens_per_second"]
    steps = math.ceil(max(record["steps"] for record in records))
    held = sum(record["kv_bytes"] for record in records)
    return _Rate(seconds / rows, 1 / statistics.median(speeds) if speeds else 0.0, steps, held / rows)
