"""The numbers of the SparQ paper (arXiv:2312.04985), beside those that were measured for the same model.

`paper_tables.csv` holds Table 2, Table 3 with the whole grid behind it, and what Figure 6 plots, from the
paper's version 6 and the authors' notebooks. `settings` and `moved` say what a column really was, where that
is known: recomputed from the mean prompts of the authors' runs.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterable, Sequence
from fractions import Fraction
from importlib import resources
from typing import NamedTuple

from .results import MISSING, Row

MEANING = (
    "The paper's columns are targets: of each method's sweep it shows the point that comes closest, and so "
    "does this table of what was measured. SparQ's 1/2 is r=64 with k=128, which moves about a third of the "
    "bytes; its 1/8 is r=8 or r=16, which move 0.11 to 0.14. The paper counts elements by formula, for the "
    "mean prompt; here bytes are counted as they are read."
)
HEADINGS = ["table", "task", "policy", "paper's column", "moved", "paper's score", "measured",
            "bytes read / dense", "policy measured"]  # fmt: skip
_PERCENT = ("squad", "triviaqa", "cnn_dailymail", "sparq_needle")


class Published(NamedTuple):
    """A number of the paper. Scores of questions, summaries and needles are in percent."""

    table: str
    model: str  # on the hub
    task: str
    confusion_contexts: int | None
    policy: str
    column: Fraction
    above: int | None  # contexts, in tokens, that its mean is over
    up_to: int | None
    score: float
    standard_error: float | None
    settings: str
    moved: str


class Beside(NamedTuple):
    """A number of the paper and what was measured; the paper's unit."""

    published: Published
    policy: str  # with the parameters or the budget that tell it from others
    score: float
    interval: tuple[float, float] | None
    bytes_ratio: float | None

    def cells(self) -> list[str]:
        """One for each of HEADINGS."""
        paper = self.published
        digits = 2 if paper.task == "wikitext" else 1
        error = "" if paper.standard_error is None else f" ± {paper.standard_error:g}"
        interval = "" if self.interval is None else " [{:.{d}f}, {:.{d}f}]".format(*self.interval, d=digits)
        contexts = "" if paper.confusion_contexts in (None, 7) else f", {paper.confusion_contexts} others"
        band = "" if paper.up_to is None else f", {paper.above:,} to {paper.up_to:,} tokens"
        return [
            paper.table,
            paper.task + contexts + band,
            paper.policy,
            str(paper.column),
            " ".join(filter(None, [paper.moved, paper.settings and f"({paper.settings})"])) or MISSING,
            f"{paper.score:g}{error}",
            f"{self.score:.{digits}f}{interval}",
            MISSING if self.bytes_ratio is None else f"{self.bytes_ratio:.3f}",
            self.policy,
        ]


@functools.cache
def published() -> tuple[Published, ...]:
    """All numbers of the paper that ship."""
    text = resources.files(__package__).joinpath("paper_tables.csv").read_text("utf-8")

    def number(cell: str) -> int | None:
        return int(cell) if cell else None

    return tuple(
        Published(
            table=line["table"],
            model=line["model"],
            task=line["task"],
            confusion_contexts=number(line["confusion_contexts"]),
            policy=line["policy"],
            column=Fraction(line["column"]),
            above=number(line["above"]),
            up_to=number(line["up_to"]),
            score=float(line["score"]),
            standard_error=float(line["standard_error"]) if line["standard_error"] else None,
            settings=line["settings"],
            moved=line["moved"],
        )
        for line in csv.DictReader(text.splitlines())
    )


def beside(rows: Sequence[Row]) -> list[Beside]:
    """The paper's numbers for models, tasks and policies of these rows, in the paper's order.

    Of a policy's several settings the one counts whose bytes are closest to the column's target. A number
    over a band of contexts stands beside the mean over those measured in it; else the longest context counts.
    """
    return [found for number in published() if (found := _closest(number, rows)) is not None]


def _closest(number: Published, rows: Sequence[Row]) -> Beside | None:
    ways: dict[str, list[Row]] = {}
    for row in rows:
        if row.score is not None and _is_of(row, number):
            ways.setdefault(row.policy_label, []).append(row)
    if not ways:
        return None

    def distance(label: str) -> float:
        return abs((_mean_ratio(ways[label]) or 1.0) - float(number.column))

    label = min(ways, key=distance)
    chosen = ways[label] if number.up_to else [max(ways[label], key=lambda row: row.context)]
    unit = 100 if number.task in _PERCENT else 1
    low, high = chosen[0].score_low, chosen[0].score_high
    several = len(chosen) > 1 or low is None or high is None
    return Beside(
        number,
        label,
        unit * sum(row.score or 0.0 for row in chosen) / len(chosen),
        None if several else (unit * (low or 0.0), unit * (high or 0.0)),
        _mean_ratio(chosen),
    )


def _is_of(row: Row, number: Published) -> bool:
    if (row.task, row.policy, _short(row.model)) != (number.task, number.policy, _short(number.model)):
        return False
    others = row.task_parameters.get("confusion_contexts")
    if number.confusion_contexts is not None and others != number.confusion_contexts:
        return False
    return number.up_to is None or (number.above or 0) < row.context <= number.up_to


def _mean_ratio(rows: Iterable[Row]) -> float | None:
    ratios = [row.bytes_ratio for row in rows if row.bytes_ratio is not None]
    return sum(ratios) / len(ratios) if ratios else None


def _short(model: str) -> str:
    """A folder with the model's name is the model."""
    return model.rstrip("/").rpartition("/")[2].lower()
