"""Measure the cells of a comparison: `local` in this process, `ray` on a cluster; `cell` measures one."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from ..cells import Cell
from ..config import Config, Diagnose
from ..identity import Fields
from ..samples import Record

Work = Sequence[tuple[Cell, list[int]]]  # cells, and which of their samples are to be measured


class Prepared(NamedTuple):
    """A comparison whose model is loaded."""

    cells: list[Cell]
    new_tokens: dict[str, int]  # that a sample decodes at most, by cell id
    fields: dict[str, Fields]  # behind each cell id: `identity.fields`
    facts: dict[str, Any]  # settings that only the model could tell
    environment: dict[str, Any]  # the machine that measures


class Measured(NamedTuple):
    """A batch of a cell."""

    cell: Cell
    records: list[Record]


class Failed(NamedTuple):
    """The cell failed: it measures no further samples."""

    cell: Cell
    reason: str
    details: str


class Finished(NamedTuple):
    """The cell has measured all of its samples."""

    cell: Cell


class Restarted(NamedTuple):
    """The worker died; the cell restarts after its last stored batch."""

    cell: Cell
    reason: str


Event = Measured | Failed | Finished | Restarted
Events = Generator[Event, None, None]


class Executor(Protocol):
    """Measures cells and hands back their batches; the caller stores them."""

    def prepare(self, config: Config, started: str) -> Prepared:
        """Load the model and expand the cells. Raises UserError for what the model cannot do."""

    def measure(self, work: Work) -> Events:
        """For each cell its batches and then how it ended; cells may be mixed."""

    def diagnose(self, asked: Diagnose, cells: Sequence[Cell], missing: Mapping[str, list[int]]) -> Events:
        """Compare the `missing` samples, by cell id, with dense attention: a record for each."""
