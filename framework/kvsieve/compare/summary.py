"""From samples to rows: summary.csv and summary.md of a run folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from . import files, manifest, samples, statistics
from .manifest import Entry, Record
from .markdown import markdown
from .results import DENSE, Results, Row, Subject, group_key, load_notes, speed, write_csv


def write(folder: Path, records: Iterable[Record] | None = None) -> list[Row]:
    """Make both summaries of a run folder anew from its cells.json and samples.jsonl; returns the rows.

    `records`: instead of those in samples.jsonl.

    Raises:
        UserError: the folder is not one of a run, or cannot be written to.
    """
    found = list(samples.read(folder / "samples.jsonl") if records is None else records)
    entries = manifest.read(folder, found)
    rows = summarize(entries, found)
    failures = [f"{entry.label}: {entry.error}" for entry in entries if entry.error]
    loads = load_notes(files.read_object(folder / "environment.json"))
    try:
        write_csv(folder / "summary.csv", rows)
        files.write(folder / "summary.md", markdown(Results(rows), failures, loads))
    except UserError as error:
        raise UserError(f"{error}; the samples are safe") from None
    return rows


def summarize(entries: Sequence[Entry], records: Iterable[Record]) -> list[Row]:
    """A row for each entry that has samples, compared with the dense row of its group; or that has failed."""
    by_cell: dict[str, dict[int, Record]] = {}
    for record in records:
        by_cell.setdefault(record["cell"], {}).setdefault(record["sample"], record)
    found = [
        (entry, [r for i, r in sorted(by_cell.get(entry.cell, {}).items()) if i < entry.samples])
        for entry in entries
    ]
    measured = [(entry, of_cell) for entry, of_cell in found if of_cell or entry.error]
    dense = {
        group_key(entry): of_cell
        for entry, of_cell in reversed(measured)
        if entry.policy == DENSE and of_cell
    }
    rows = []
    for entry, of_cell in measured:
        row = _row(entry, of_cell) if of_cell else Row(**_subject(entry), error=_first_line(entry))
        if of_cell and entry.policy != DENSE and group_key(entry) in dense:
            row = _compared(row, entry, of_cell, dense[group_key(entry)])
        rows.append(row)
    return _marked(rows)


def _row(entry: Entry, records: Sequence[Record]) -> Row:
    scores = [record["score"] for record in records]
    interval = statistics.score_interval(scores, _limits(entry))
    total = {
        name: sum(record[name] for record in records)
        for name in ("steps", "bytes_read", "bytes_written", "bytes_dense")
    }
    steps = total["steps"]
    slots = [record["slots"] for record in records if record.get("slots") is not None]
    low, high = interval or (None, None)
    return Row(
        **_subject(entry),
        score=float(np.mean(scores)),
        score_low=low,
        score_high=high,
        chance_p=statistics.chance_p(scores, entry.chance, _limits(entry)),
        samples=len(records),
        bytes_per_step=total["bytes_read"] / steps if steps else None,
        bytes_ratio=total["bytes_read"] / total["bytes_dense"] if total["bytes_dense"] else None,
        bytes_written_per_step=total["bytes_written"] / steps if steps else None,
        kv_bytes=float(np.mean([record["kv_bytes"] for record in records])),
        slots_per_head=float(np.mean(slots)) if slots else None,
        **_speeds(records),
        ran_eagerly="; ".join(sorted({why for record in records if (why := _eager_because(record))})),
        error=_first_line(entry),
    )


def _subject(entry: Entry) -> dict[str, Any]:
    return {field.name: getattr(entry, field.name) for field in dataclasses.fields(Subject)}


def _first_line(entry: Entry) -> str:
    """Of why it failed; empty: it did not."""
    return next(iter((entry.error or "").strip().splitlines()), "")


def _compared(row: Row, entry: Entry, own: Sequence[Record], dense: Sequence[Record]) -> Row:
    """With its difference from dense on the samples that both have."""
    dense_scores = {record["sample"]: record["score"] for record in dense}
    both = [(r["score"], dense_scores[r["sample"]]) for r in own if r["sample"] in dense_scores]
    if not both:
        return row
    scores, limits = np.array(both, dtype=float), _limits(entry)
    found = statistics.difference(scores[:, 0], scores[:, 1], limits, entry.higher_is_better)
    binary = limits in (None, (0, 1)) and statistics.is_binary(scores)
    return dataclasses.replace(
        row,
        difference=float(found.mean),
        difference_low=_known(found.low),
        difference_high=_known(found.high),
        pairs=len(both),
        lost=int(found.lost) if binary else None,
        won=int(found.won) if binary else None,
        p_value=_known(found.p),
    )


def _marked(rows: Sequence[Row]) -> list[Row]:
    """With the marks, for which all rows of the run count but those of tasks where dense is at chance."""
    unjudged = {id(row) for group in Results(list(rows)).groups if group.at_chance for row in group.rows}
    compared = [row for row in rows if row.difference is not None and id(row) not in unjudged]
    marks = statistics.marks(
        [np.nan if row.p_value is None else row.p_value for row in compared],
        [row.difference for row in compared],
        [row.higher_is_better for row in compared],
        [row.policy_label for row in compared],
    )
    by_row = {id(row): mark for row, mark in zip(compared, marks, strict=True)}
    by_row |= {
        id(row): statistics.CHANCE for row in rows if id(row) in unjudged and row.difference is not None
    }
    return [dataclasses.replace(row, mark=by_row.get(id(row), "")) for row in rows]


def _speeds(records: Sequence[Record]) -> dict[str, Any]:
    """The fields of a row about tokens per second: of its full batches; of several machines, each one's, and
    of the batches that are full there.
    """
    # A sample was measured once on this machine, or as `merge` has it.
    measured = [
        (machine, batch)
        for record in records
        for machine, batch in record.get("machines", {"": record}).items()
    ]
    full: dict[str, int] = {}
    for machine, batch in measured:
        full[machine] = max(full.get(machine, 1), batch.get("rows", 1))
    found: dict[str, list[float]] = {}
    for machine, batch in measured:
        if batch.get("rows", 1) == full[machine]:
            found.setdefault(machine, []).extend(_repetitions(batch))
    here = found.pop("", [])
    medians = {machine: float(np.median(speeds)) for machine, speeds in found.items() if speeds}
    return {
        "tokens_per_second": float(np.median(here)) if here else None,
        "tokens_per_second_min": min(here, default=None),
        "tokens_per_second_max": max(here, default=None),
        "machine": "; ".join(f"{machine}: {speed(median)}" for machine, median in medians.items()),
    }


def _repetitions(batch: Record) -> list[float]:
    """Tokens a second of the sample's batch; of all its repetitions, if there were several."""
    found = batch.get("tokens_per_second")
    return [float(one) for one in (found if isinstance(found, list) else [found]) if one is not None]


def _eager_because(record: Record) -> str | None:
    """Its name was `ran_eagerly` in version 0.1."""
    return record.get("eager_because") or record.get("ran_eagerly")


def _limits(entry: Entry) -> statistics.Limits:
    return None if entry.limits is None else (entry.limits[0], entry.limits[1])


def _known(value: Any) -> float | None:
    return float(value) if np.isfinite(value) else None
