"""Rows of a data set in a local folder: files of JSON lines or parquet, in the order of their names."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ... import user_files
from ...errors import UserError

MOST_BYTES = 2**30  # of a file
Row = Mapping[str, Any]


@functools.cache
def read(folder: str, columns: Sequence[str]) -> list[Row]:
    """All rows of a folder's `*.jsonl` and `*.parquet` files.

    Raises:
        UserError: there is no such folder, or no such file in it; a row lacks a column, or is no row.
    """
    found = [row for path in _files(folder) for row in _rows(path, columns)]
    if not found:
        raise UserError(f"{folder}: its files hold no rows")
    return found


@functools.cache
def digest(folder: str) -> str:
    """Of the names and bytes of these files."""
    found = hashlib.sha256()
    for path in _files(folder):
        found.update(path.name.encode() + b"\0")
        with path.open("rb") as file:
            found.update(hashlib.file_digest(file, "sha256").digest())
    return found.hexdigest()[:12]


def _files(folder: str) -> list[Path]:
    path = user_files.user_path(folder)
    if not path.is_dir():
        raise UserError(f"{folder}: no such folder")
    files = sorted(file for file in path.iterdir() if file.suffix in (".jsonl", ".parquet"))
    if not files:
        raise UserError(f"{folder}: holds no .jsonl and no .parquet files")
    for file in files:
        user_files.check_readable(file, MOST_BYTES)
    return files


def _rows(path: Path, columns: Sequence[str]) -> list[Row]:
    rows = _parquet(path) if path.suffix == ".parquet" else _json_lines(path)
    for number, row in enumerate(rows, start=1):
        missing = [name for name in columns if not isinstance(row, dict) or name not in row]
        if missing:
            raise UserError(
                f"{path}: row {number} has no column {missing[0]!r}; needed: {', '.join(columns)}"
            )
    return rows


def _json_lines(path: Path) -> list[Row]:
    rows = []
    for number, line in enumerate(user_files.read_text(path, MOST_BYTES).split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except (ValueError, RecursionError):
                raise UserError(f"{path}:{number}: is not JSON") from None
    return rows


def _parquet(path: Path) -> list[Row]:
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-untyped]
    except ImportError:
        raise UserError(f"{path}: parquet files need pyarrow: pip install 'kvsieve[tasks]'") from None
    try:
        found: list[Row] = parquet.read_table(path).to_pylist()
    except (ArrowException, OSError) as error:
        raise UserError(f"{path}: is no parquet file: {error}") from None
    return found
