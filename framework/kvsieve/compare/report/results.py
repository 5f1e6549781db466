"""A run folder, read: what the report says is in here and nowhere else."""

import csv
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from ...errors import UserError

DENSE = "dense"
MISSING = "\N{EN DASH}"
_DISPLAY_NAMES = {"sparq": "SparQ", "h2o": "H2O", "local_window": "local window"}


def policy_name(policy: str) -> str:
    """How a policy is written for readers; a plugin's policy keeps its own name."""
    return _DISPLAY_NAMES.get(policy, policy)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of summary.csv: a policy on a task at a context length. None: not measured."""

    model: str
    task: str
    context: str
    policy: str
    parameters: str
    compression: str
    metric: str
    higher_is_better: bool
    score: float | None
    score_low: float | None
    score_high: float | None
    samples: float | None
    bytes_per_step: float | None
    bytes_ratio: float | None
    kv_bytes: float | None
    tokens_per_second: float | None
    ran_eagerly: str  # on a GPU: why its steps were not one CUDA graph each

    @classmethod
    def parse(cls, line: Mapping[str, str | None]) -> Self:
        values: dict[str, Any] = {}
        for field in dataclasses.fields(cls):
            text = (line.get(field.name) or "").strip()
            if field.name == "higher_is_better":
                values[field.name] = text.lower() not in ("false", "0", "no")
            else:
                values[field.name] = text if field.type is str else _number(text)
        return cls(**values)


@dataclasses.dataclass(frozen=True)
class Group:
    """All rows of one task at one context length: what may be compared with each other."""

    rows: list[Row]

    @property
    def task(self) -> str:
        return self.rows[0].task

    @property
    def metric(self) -> str:
        return self.rows[0].metric or "score"

    @property
    def higher_is_better(self) -> bool:
        return self.rows[0].higher_is_better

    @property
    def context(self) -> str:
        context = _number(self.rows[0].context)
        return self.rows[0].context if context is None else f"{context:,.0f}"

    @cached_property
    def dense(self) -> Row | None:
        return next((row for row in self.rows if row.policy == DENSE and row.score is not None), None)

    def quality(self, row: Row) -> float | None:
        """The row's score as a share of the dense score, turned round where lower is better."""
        if self.dense is None or self.dense.score is None or row.score is None:
            return None
        above, below = (
            (row.score, self.dense.score) if self.higher_is_better else (self.dense.score, row.score)
        )
        return above / below if below > 0 else None

    def text(self, score: float | None) -> str:
        """A score with as many decimals as the scores of its group need."""
        if score is None:
            return MISSING
        return f"{score:.{1 if any((row.score or 0) >= 10 for row in self.rows) else 3}f}"

    def interval(self, row: Row) -> str:
        """The 95% interval of a row; empty where there is none."""
        return "" if row.score_low is None else f"{self.text(row.score_low)} to {self.text(row.score_high)}"


@dataclasses.dataclass(frozen=True)
class Results:
    rows: list[Row]
    config: str
    environment: dict[str, Any]
    answers: int
    failures: list[tuple[str, str]]  # what could not be measured, and why

    @cached_property
    def groups(self) -> list[Group]:
        """Tasks in the order of the run, the contexts of each from short to long."""
        groups: dict[tuple[str, str], list[Row]] = {}
        for row in self.rows:
            groups.setdefault((row.task, row.context), []).append(row)
        tasks = list(dict.fromkeys(row.task for row in self.rows))
        order = sorted(groups, key=lambda key: (tasks.index(key[0]), _number(key[1]) or 0))
        return [Group(groups[key]) for key in order]

    @cached_property
    def policies(self) -> list[str]:
        """Dense first, then as they first appear."""
        names = dict.fromkeys(row.policy for row in self.rows)
        return sorted(names, key=lambda name: name != DENSE)


def read(folder: Path) -> Results:
    """Everything a report needs from a run folder; all but summary.csv may be missing.

    Raises:
        UserError: there is no summary.csv, or no line in it.
    """
    summary = folder / "summary.csv"
    try:
        with summary.open(encoding="utf-8", newline="") as file:
            rows = [Row.parse(line) for line in csv.DictReader(file)]
    except OSError as error:
        raise UserError(
            f"{folder} is not the folder of a finished run: cannot read {summary} ({error})"
        ) from None
    if not rows:
        raise UserError(f"{summary} has no line: there is nothing to report yet")
    environment = json.loads(_text(folder / "environment.json") or "{}")
    answers = sum(1 for _ in _samples(_text(folder / "samples.jsonl")))
    cells = json.loads(_text(folder / "cells.json") or "[]")
    failures = [(cell["label"], cell["error"]) for cell in cells if cell.get("error")]
    return Results(rows, _text(folder / "config.yaml"), environment, answers, failures)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _samples(text: str) -> Iterator[dict[str, Any]]:
    """The samples of a run, without the torn last line of one that was killed."""
    for line in text.splitlines():
        try:
            sample = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(sample, dict) and "score" in sample:
            yield sample


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
