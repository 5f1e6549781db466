"""Rows of a data set on the Hugging Face hub, through the package datasets and its cache."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ...errors import UserError

Row = Mapping[str, Any]


class DataSet(NamedTuple):
    """A data set's name on the hub, its configuration, its split and a commit; None: whatever is newest."""

    name: str
    config: str | None
    split: str
    revision: str | None

    def __str__(self) -> str:
        parts = [self.name, self.config and f" ({self.config})", self.revision and f"@{self.revision[:8]}"]
        return "".join(filter(None, parts)) + f", split {self.split}"


@functools.cache
def read(of: DataSet, columns: Sequence[str]) -> list[Row]:
    """All rows, with these columns.

    Raises:
        UserError: datasets is not installed; there is no network, no such data set, configuration, revision
            or split, or no access to it; a column is missing, or there are no rows.
    """
    try:
        import datasets
    except ImportError:
        raise UserError(
            f"{of}: rows from the hub need datasets: pip install 'kvsieve[tasks]', or give a folder of them"
        ) from None
    try:
        found = datasets.load_dataset(of.name, of.config, split=of.split, revision=of.revision)
    except Exception as error:  # of many packages: the hub's client, the reader of the files
        raise UserError(f"{of}: {_why(error)}") from error
    missing = [name for name in columns if name not in found.column_names]
    if missing:
        raise UserError(f"{of}: has no column {missing[0]!r}; needed: {', '.join(columns)}")
    if not len(found):
        raise UserError(f"{of}: holds no rows")
    rows: list[Row] = found.select_columns(list(columns)).to_list()
    return rows


@functools.cache
def digest(of: DataSet, columns: Sequence[str]) -> str:
    """Of all rows: a revision that moved is another text."""
    found = hashlib.sha256()
    for row in read(of, columns):
        found.update(json.dumps(row, sort_keys=True, default=str).encode())
    return found.hexdigest()[:12]


def _why(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = lines[0].rstrip(".") if lines else type(error).__name__
    if "gated" in said.lower():
        return "is gated on the hub: ask for access on its page and `hf auth login`, or give a folder"
    if isinstance(error, ConnectionError):
        return f"the hub cannot be reached ({said}): give a folder of its rows"
    return f"cannot be read from the hub: {said}"
