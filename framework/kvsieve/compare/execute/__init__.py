"""Measure the cells of a comparison: `local` in this process, `ray` on a cluster.

`unit` measures the cells of one task together, `cell` the batches of one of them.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ..cells import Cell
from ..config import Config, Diagnose
from ..identity import Fields
from ..samples import Record

_STEP = 8  # prompt tokens that a decoded token counts as: it reads all weights


def cost(context: int, policies: int, new_tokens: int) -> float:
    """The work of a sample under one of the policies that share its prompt, in prompt tokens."""
    return context / policies + _STEP * new_tokens


class Unit(NamedTuple):
    """Work that is done together: samples of one task, under all policies that have not answered them yet."""

    cells: list[Cell]  # of one task
    missing: dict[str, list[int]]  # by cell id: which of the samples are to be measured

    @property
    def samples(self) -> list[int]:
        """All that some cell has not measured, in order."""
        return sorted(set().union(*self.missing.values()))


Work = Sequence[Unit]


def units(cells: Sequence[Cell], missing: Mapping[str, list[int]]) -> list[Unit]:
    """Gather the cells that have samples to measure by their tasks, in their order."""
    found: list[Unit] = []
    for cell in cells:
        if not missing[cell.id]:
            continue
        if not found or found[-1].cells[0].task != cell.task:
            found.append(Unit([], {}))
        found[-1].cells.append(cell)
        found[-1].missing[cell.id] = missing[cell.id]
    return found


class Prepared(NamedTuple):
    """A comparison whose model is loaded."""

    cells: list[Cell]
    new_tokens: dict[str, int]  # that a sample decodes at most, by cell id
    fields: dict[str, Fields]  # behind each cell id: `identity.fields`
    facts: dict[str, Any]  # settings that only the model could tell
    environment: dict[str, Any]  # the machine that measures
    batch_size: int


class Measured(NamedTuple):
    """A batch of a cell."""

    cell: Cell
    records: list[Record]


class Failed(NamedTuple):
    """The cell failed: no further samples of it are measured here."""

    cell: Cell
    reason: str
    details: str


class Began(NamedTuple):
    """A batch of the cell is measured next."""

    cell: Cell


class Restarted(NamedTuple):
    """The worker died while it measured the cell; its unit goes on after the last stored batch."""

    cell: Cell
    reason: str


Event = Began | Measured | Failed | Restarted
Events = Generator[Event, None, None]


class Executor(Protocol):
    """Measures cells and hands back their batches; the caller stores them."""

    def prepare(self, config: Config, started: str) -> Prepared:
        """Load the model and expand the cells. Raises UserError for what the model cannot do."""

    def measure(self, work: Work) -> Events:
        """Measure unit by unit: batches of the cells, each begun before it is measured, and those that fail.

        Units may be mixed.
        """

    def diagnose(self, asked: Diagnose, cells: Sequence[Cell], missing: Mapping[str, list[int]]) -> Events:
        """Compare the `missing` samples, by cell id, with dense attention: a record for each."""
