"""Progress of a run: in a terminal a bar with the time left and the table so far, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .cells import Cell
from .execute import Work, cost


class RunProgress:
    """Counts work: see cost."""

    def __init__(
        self,
        console: Console,
        work: Work,
        new_tokens: dict[str, int],
        so_far: Callable[[], Iterable[RenderableType]] = tuple,
    ) -> None:
        """`new_tokens`: that a sample decodes at most, by cell id; `so_far` makes the tables to show."""
        self.console, self.so_far = console, so_far
        self.cost = {
            cell.id: cost(cell.task.context, len(unit.cells), new_tokens[cell.id])
            for unit in work
            for cell in unit.cells
        }
        missing = {name: len(indexes) for unit in work for name, indexes in unit.missing.items()}
        self.samples = sum(missing.values())
        self.total = sum(count * self.cost[name] for name, count in missing.items())
        self.done, self.measured = 0.0, 0
        self.started = time.monotonic()
        self.bar: Progress | None = None
        self.live: Live | None = None
        self.next_table = 0.0
        self.task = TaskID(0)
        if console.is_terminal:
            columns = [
                TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[count]} samples"),
                TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn(elapsed_when_finished=True),
            ]  # fmt: skip
            self.bar = Progress(*columns, console=console, speed_estimate_period=60)
            self.task = self.bar.add_task("", total=self.total, count=self._count())
            self.live = Live(self.bar, console=console, transient=True)

    def __enter__(self) -> Self:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self.live:
            self.live.stop()

    def begin(self, cell: Cell) -> None:
        """Show which cell is being measured."""
        if self.bar:
            self.bar.update(self.task, description=cell.label)

    def advance(self, cell: Cell, samples: int, measured: bool = True) -> None:
        """Count `samples` as done; not `measured`: their cell failed."""
        self.done += samples * self.cost[cell.id]
        self.measured += samples if measured else 0
        if self.bar:
            self.bar.update(self.task, completed=self.done, count=self._count())
            self._show_tables()

    def _show_tables(self) -> None:
        """Show what the samples so far say; at most a tenth of the time goes into that."""
        began = time.monotonic()
        if self.live and self.bar and began >= self.next_table:
            self.live.update(Group(self.bar, *self.so_far()), refresh=True)
            now = time.monotonic()
            self.next_table = now + max(1.0, 9 * (now - began))

    def finish(self, cell: Cell) -> None:
        """Print a line for a finished cell, outside a terminal."""
        if self.bar is None:
            elapsed = time.monotonic() - self.started
            left = elapsed * (self.total - self.done) / self.done if self.done else 0.0
            self.console.print(
                f"{self._count()} samples, {minutes(elapsed)}, {minutes(left)} left: {cell.label}",
                soft_wrap=True,
            )

    def again(self, cell: Cell, reason: str) -> None:
        """Say that a cell continues where it stopped."""
        self.console.print(
            f"{reason}, goes on where it stopped: {cell.label}", style="yellow", soft_wrap=True, markup=False,
            highlight=False,
        )  # fmt: skip

    def fail(self, cell: Cell, reason: str) -> None:
        """Say that a cell failed."""
        self.console.print(
            f"failed: {cell.label}: {reason}", style="red", soft_wrap=True, markup=False, highlight=False
        )

    def _count(self) -> str:
        return f"{self.measured}/{self.samples}"


def minutes(seconds: float) -> str:
    """`12:05`."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes}:{seconds:02d}"
