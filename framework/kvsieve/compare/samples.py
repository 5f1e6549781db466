"""samples.jsonl: a line per measured sample, appended as it comes, so that a run goes on where it stopped."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Self

from ..errors import UserError

try:
    import fcntl
except ImportError:  # not on this system: nothing stops two runs in one folder
    fcntl = None  # type: ignore[assignment]

Record = dict[str, Any]


def read(path: Path) -> list[Record]:
    """Every whole line; what a killed run or a full disk left half written is passed over."""
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().split(b"\n")[:-1]:
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and {"cell", "sample", "score"} <= record.keys():
            records.append(record)
    return records


class Store:
    """The samples of a run folder, open for appending; one run at a time.

    Raises:
        UserError: another run writes into the folder, or it cannot be written to.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None
        if fcntl is not None:
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(self._file)
                raise UserError(
                    f"{path.parent}: another run is writing here; give --out another folder"
                ) from None
        self._size = self._drop_torn_line()
        self.records: dict[tuple[str, int], Record] = {}
        for record in read(path):
            self.records.setdefault((record["cell"], record["sample"]), record)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._file)

    def missing(self, cell: str, samples: int) -> list[int]:
        """Which of the first `samples` samples of a cell are not there yet."""
        return [i for i in range(samples) if (cell, i) not in self.records]

    def append(self, records: list[Record]) -> None:
        """Add records and wait until the disk has them; either all of them are there afterwards, or none.

        Raises:
            UserError: the disk is full, or the file cannot be written.
        """
        data = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records).encode(
            "utf-8", "replace"
        )
        try:
            written = 0
            while written < len(data):
                written += os.write(self._file, data[written:])
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._size)
            raise UserError(
                f"{self.path}: cannot write: {error.strerror}. The {len(self.records)} samples measured so "
                "far are safe; make room and run the same command again to continue"
            ) from None
        self._size += len(data)
        self.records |= {(record["cell"], record["sample"]): record for record in records}

    def _drop_torn_line(self) -> int:
        """Cut off what follows the last line break; returns the file's size."""
        data = self.path.read_bytes()
        size = data.rfind(b"\n") + 1
        if size < len(data):
            os.ftruncate(self._file, size)
        return size
