"""summary.csv and summary.md: one line per cell, from its samples."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from . import samples

COLUMNS = [
    "model", "task", "context", "policy", "parameters", "compression", "metric", "higher_is_better", "score",
    "score_low", "score_high", "samples", "bytes_per_step", "bytes_ratio", "bytes_written_per_step",
    "kv_bytes", "tokens_per_second", "ran_eagerly",
]  # fmt: skip
CELLS = "cells.json"


def write(folder: Path, records: Iterable[samples.Record] | None = None) -> list[dict[str, Any]]:
    """Make both summaries of a run folder anew from its cells.json and samples.jsonl; returns the lines.

    `records`: instead of those in samples.jsonl.

    Raises:
        UserError: the folder is not one of a run, or cannot be written to.
    """
    try:
        cells = json.loads((folder / CELLS).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{folder} is not the folder of a run: cannot read {folder / CELLS} ({error})"
        ) from None
    rows, failures = summarize(cells, samples.read(folder / "samples.jsonl") if records is None else records)
    try:
        with (folder / "summary.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows({name: _exact(value) for name, value in row.items()} for row in rows)
        (folder / "summary.md").write_text(markdown(rows, failures), encoding="utf-8")
    except OSError as error:
        raise UserError(
            f"{folder}: cannot write the summary: {error.strerror}; the samples are safe"
        ) from None
    return rows


def summarize(
    cells: Iterable[Mapping[str, Any]], records: Iterable[samples.Record]
) -> tuple[list[dict[str, Any]], list[str]]:
    """A line for each cell that has samples, and what failed."""
    by_cell: dict[str, dict[int, samples.Record]] = {}
    for record in records:
        by_cell.setdefault(record["cell"], {}).setdefault(record["sample"], record)
    rows, failures = [], []
    for cell in cells:
        found = [r for i, r in sorted(by_cell.get(cell["cell"], {}).items()) if i < cell["samples"]]
        if found:
            rows.append(_row(cell, found))
        if cell.get("error"):
            failures.append(f"{cell['label']}: {cell['error']}")
    return rows, failures


def _row(cell: Mapping[str, Any], records: list[samples.Record]) -> dict[str, Any]:
    scores = np.array([record["score"] for record in records])
    low, high = interval(scores)
    total = {
        name: sum(r[name] for r in records)
        for name in ("steps", "bytes_read", "bytes_written", "bytes_dense")
    }
    rows = max(r.get("rows", 1) for r in records)  # the speed of full batches
    speeds = [speed for r in records if r.get("rows", 1) == rows for speed in _speeds(r)]
    named = {name: cell[name] for name in ("model", "task", "context", "policy", "parameters", "compression")}
    steps = total["steps"]
    return named | {
        "metric": cell["metric"],
        "higher_is_better": cell["higher_is_better"],
        "score": float(scores.mean()),
        "score_low": low,
        "score_high": high,
        "samples": len(records),
        "bytes_per_step": total["bytes_read"] / steps if steps else None,
        "bytes_ratio": total["bytes_read"] / total["bytes_dense"] if total["bytes_dense"] else None,
        "bytes_written_per_step": total["bytes_written"] / steps if steps else None,
        "kv_bytes": float(np.mean([r["kv_bytes"] for r in records])),
        "tokens_per_second": float(np.median(speeds)) if speeds else None,
        "ran_eagerly": "; ".join(sorted({r["eager_because"] for r in records if r.get("eager_because")})),
    }


def _speeds(record: samples.Record) -> list[float]:
    """Tokens per second of the sample's batch, for each repetition."""
    found = record["tokens_per_second"]
    return found if isinstance(found, list) else [] if found is None else [found]


def interval(scores: np.ndarray, resamples: int = 2000) -> tuple[float, float]:
    """The 95 % bootstrap interval of the mean; of scores that are all equal, that score twice."""
    rng = np.random.default_rng(0)
    means = scores[rng.integers(0, len(scores), size=(resamples, len(scores)))].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    return float(low), float(high)


def markdown(rows: list[dict[str, Any]], failures: list[str]) -> str:
    """A table for every task, ready to paste."""
    lines = []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = [row for row in rows if row["task"] == task]
        digits = score_digits(of_task)
        better = "higher" if of_task[0]["higher_is_better"] else "lower"
        lines += [f"## {task}: {of_task[0]['metric']} ({better} is better)", ""]
        lines += ["| context | policy | score | 95 % interval | bytes read / dense | KV MB | tokens/s |"]
        lines += ["|---:|---|---:|---:|---:|---:|---:|"]
        for row in of_task:
            policy = policy_label(row)
            score, low, high = (number(row[name], digits) for name in ("score", "score_low", "score_high"))
            cells = [row["context"], policy, score, f"{low} to {high}", number(row["bytes_ratio"])]
            cells += [megabytes(row["kv_bytes"]), number(row["tokens_per_second"], 0)]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        lines.append("")
    if notes := eager_notes(rows):
        lines += [*notes, ""]
    if failures:
        lines += ["## Failed", "", *(f"- {failure}" for failure in failures), ""]
    return "\n".join(lines)


def eager_notes(rows: Iterable[Mapping[str, Any]]) -> list[str]:
    """Which policies ran from Python on a GPU, and why: their speed is not that of one CUDA graph a step."""
    labels: dict[str, dict[str, None]] = {}
    for row in rows:
        if row["ran_eagerly"]:
            labels.setdefault(row["ran_eagerly"], {})[policy_label(row)] = None
    return [f"Not as one CUDA graph a step: {', '.join(who)} ({why})." for why, who in labels.items()]


def policy_label(row: Mapping[str, Any]) -> str:
    """`sparq 1/8`, or `sparq r=8 k=64 ...` if it was asked for by its parameters."""
    return f"{row['policy']} {row['compression'] or row['parameters']}".strip()


def number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def score_digits(rows: Iterable[Mapping[str, Any]]) -> int:
    """Digits behind the point that the scores of one task are shown with."""
    return 1 if max(row["score_high"] for row in rows) >= 10 else 3


def megabytes(value: float) -> str:
    return f"{value / 1e6:.2f}" if value < 1e8 else f"{value / 1e6:.0f}"


def _exact(value: Any) -> Any:
    """Numbers without the tail of digits that nothing stands behind."""
    if isinstance(value, bool):
        return str(value).lower()
    return (
        f"{value:.6g}"
        if isinstance(value, float) and abs(value) < 1e5
        else round(value)
        if isinstance(value, float)
        else value
    )
