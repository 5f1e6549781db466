"""A run folder as the report reads it."""

import dataclasses
from pathlib import Path
from typing import Any

from ...errors import UserError
from .. import files, manifest, samples
from ..diagnostics import Diagnosed, by_policy
from ..manifest import Entry, Record
from ..results import Results, read_csv


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The results of a run, and what it says about itself."""

    results: Results
    config: str
    environment: dict[str, Any]
    answers: int  # samples decoded
    failures: list[tuple[str, str]]  # what could not be measured, and why
    measured: list[tuple[Entry, list[Record]]]  # the cells with their samples; empty: not told by cells.json
    protocol: dict[str, Any]  # by cell id, the fields behind it
    diagnosed: list[Diagnosed]  # on request


def read(folder: Path) -> RunFolder:
    """Everything a report needs from a run folder; all but summary.csv may be missing.

    Raises:
        UserError: there is no summary.csv, or no line in it, or a file is not what a run writes.
    """
    summary = folder / "summary.csv"
    if not summary.exists():
        raise UserError(f"{folder} is not the folder of a finished run: it has no summary.csv")
    rows = read_csv(summary)
    if not rows:
        raise UserError(f"{summary} has no line: there is nothing to report yet")
    records = samples.read(folder / "samples.jsonl")
    by_cell: dict[str, list[Record]] = {}
    for record in records:
        by_cell.setdefault(record["cell"], []).append(record)
    entries = manifest.read(folder, records) if (folder / manifest.NAME).exists() else []
    return RunFolder(
        Results(rows),
        _text(folder / "config.yaml"),
        files.read_object(folder / "environment.json"),
        len(records),
        manifest.failures(folder),
        [(entry, by_cell[entry.cell]) for entry in entries if entry.cell in by_cell],
        files.read_object(folder / "protocol.json"),
        by_policy(folder),
    )


def _text(path: Path) -> str:
    return files.read(path).decode("utf-8", "replace") if path.exists() else ""
