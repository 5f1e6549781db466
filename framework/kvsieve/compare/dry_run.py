"""The cells of a comparison with their time and memory, estimated from one batch; nothing is written."""

from __future__ import annotations

import datetime
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
from .execute import Began, Executor, Failed, Measured, Unit
from .execute.local import Local
from .markdown import megabytes
from .progress import cost, minutes
from .results import MISSING


class Estimate(NamedTuple):
    """A cell of a comparison."""

    model: str
    cell: Cell
    missing: int  # samples that the folder does not hold
    seconds: float | None  # to measure these; None: the cell failed
    kv_bytes: float | None  # that a batch holds once its prompts are read
    error: str = ""  # why it failed


class _Rate(NamedTuple):
    """One batch of a cell."""

    seconds: float  # for a sample
    kv_bytes: float  # of a sample


def estimate(
    config: Config,
    folder: Path,
    executor: Executor | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> list[Estimate]:
    """Measure a batch of each model's task with the shortest context under every policy, and scale.

    Of two batches, the first of which compiles and captures, the second counts. Times follow the tokens read
    and decoded, memory follows the tokens held.

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
        rates, errors = _measured(executor, base, min(2 * rows, shortest.samples), clock)
        for number, cell in enumerate(prepared.cells):
            like = base[number % len(base)]  # every task meets the same policies, in their order
            missing = sum((cell.id, sample) not in known for sample in range(cell.task.samples))
            if like.id in rates:
                seconds, held = _scaled(rates[like.id], like, cell, len(base), prepared.new_tokens)
                found.append(Estimate(one.settings.model, cell, missing, missing * seconds, rows * held))
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
    for heading in ("samples", "time", "KV MB of a batch"):
        table.add_column(heading, justify="right", no_wrap=True)
    for one in estimates:
        taken = MISSING if one.seconds is None else minutes(one.seconds)
        label = one.cell.label + (f": {one.error}" if one.error else "")
        cells = [escape(label), str(one.missing), taken, megabytes(one.kv_bytes)]
        table.add_row(*([escape(one.model)] if several else []), *cells)
    console.print(table)
    total = sum(one.seconds or 0 for one in estimates)
    console.print(
        f"about {minutes(total)} in all, estimated from one batch of the shortest task under every policy; "
        "while a prompt is read, up to as much memory as dense attention holds. Nothing was written.",
        soft_wrap=True, highlight=False,
    )  # fmt: skip


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
    executor: Executor, cells: Sequence[Cell], count: int, clock: Callable[[], float]
) -> tuple[dict[str, _Rate], dict[str, str]]:
    """By cell id, how the last batch of so many samples went, or why the cell failed."""
    rates, errors, began = {}, {}, 0.0
    unit = Unit(list(cells), {cell.id: list(range(count)) for cell in cells})
    for event in executor.measure([unit]):
        if isinstance(event, Began):
            began = clock()
        elif isinstance(event, Measured):
            batch = len(event.records)
            held = sum(record["kv_bytes"] for record in event.records)
            rates[event.cell.id] = _Rate((clock() - began) / batch, held / batch)
        elif isinstance(event, Failed):
            errors[event.cell.id] = event.reason
    return rates, errors
