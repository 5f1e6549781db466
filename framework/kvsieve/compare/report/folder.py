"""A run folder as the report reads it."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...errors import UserError
from .. import files, manifest
from ..results import Results, read_csv


@dataclasses.dataclass(frozen=True)
class RunFolder:
    """The results of a run, and what it says about itself."""

    results: Results
    config: str
    environment: dict[str, Any]
    answers: int  # samples decoded
    failures: list[tuple[str, str]]  # what could not be measured, and why


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
    try:
        environment = json.loads(_text(folder / "environment.json") or "{}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / 'environment.json'} is not JSON: {error}") from None
    if not isinstance(environment, dict):
        raise UserError(f"{folder / 'environment.json'} is not a JSON object")
    answers = sum(1 for _ in _samples(_text(folder / "samples.jsonl")))
    return RunFolder(
        Results(rows), _text(folder / "config.yaml"), environment, answers, manifest.failures(folder)
    )


def _text(path: Path) -> str:
    return files.read(path).decode("utf-8", "replace") if path.exists() else ""


def _samples(text: str) -> Iterator[dict[str, Any]]:
    """The samples of a run, without the torn last line of one that was killed."""
    for line in text.split("\n"):
        try:
            sample = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(sample, dict) and "score" in sample:
            yield sample
