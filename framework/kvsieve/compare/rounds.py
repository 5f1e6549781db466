"""Samples in rounds: as many as the widest interval of a task needs, and no more than are allowed.

The size of a round follows from the scores of the rounds before it, whatever else a folder holds: a run that
was stopped, or is repeated, asks for the same samples.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence

from .cells import Cell
from .config import Until, without_samples
from .manifest import Entry, Record
from .results import GroupKey, Row, group_key
from .summary import summarize

FIRST = 16  # samples of the first round


def begin(cells: Sequence[Cell], rounds: Mapping[str, Until]) -> list[Cell]:
    """The cells with the samples of the first round, where their task is measured in rounds."""
    return [
        _asked(cell, min(FIRST, cell.task.samples)) if without_samples(cell.task) in rounds else cell
        for cell in cells
    ]


def go_on(
    cells: Sequence[Cell], entries: Sequence[Entry], records: Iterable[Record], rounds: Mapping[str, Until]
) -> tuple[list[Cell], list[str]]:
    """The cells with the samples of the next round; and a line for each task that needs more.

    `entries`: of the cells, in their order. Those that failed ask for nothing.
    """
    if not rounds:
        return list(cells), []
    widths = widest(summarize([entry for entry in entries if entry.error is None], records))
    found, notes = [], {}
    for cell, entry in zip(cells, entries, strict=True):
        until, key, samples = rounds.get(without_samples(cell.task)), group_key(entry), cell.task.samples
        needed = samples if until is None else more(samples, widths.get(key, 0.0), until)
        if until is not None and needed > samples:
            notes[key] = (
                f"{cell.task.title} {cell.task.context}: the widest interval is {widths[key]:.3g}, and "
                f"{until.width:g} is asked for: {needed - samples} samples more"
            )
        found.append(_asked(cell, needed))
    return found, list(notes.values())


def widest(rows: Sequence[Row]) -> dict[GroupKey, float]:
    """By group: the width of the widest interval of a difference from dense; without dense, of a score.

    Samples that are all equal say nothing about their spread: it counts as 0.
    """
    found: dict[GroupKey, float] = {}
    compared = {group_key(row) for row in rows if row.difference is not None}
    for row in rows:
        key = group_key(row)
        low, high = row.score_low, row.score_high
        if key in compared:
            low, high = row.difference_low, row.difference_high
        width = 0.0 if low is None or high is None else high - low
        found[key] = max(found.get(key, 0.0), width)
    return found


def more(samples: int, width: float, until: Until) -> int:
    """Samples of the next round, those so far included; the same number if they are enough.

    An interval shrinks with the root of their number: as many as that asks for, and at most twice as many.
    """
    if width <= until.width or samples >= until.at_most:
        return samples
    return min(math.ceil(samples * (width / until.width) ** 2), 2 * samples, until.at_most)


def _asked(cell: Cell, samples: int) -> Cell:
    if samples == cell.task.samples:
        return cell
    return dataclasses.replace(cell, task=dataclasses.replace(cell.task, samples=samples))
