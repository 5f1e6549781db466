"""samples.jsonl: a line per measured sample, appended as it comes, so that a run continues where it stopped.
diagnostics.jsonl is kept in the same way.

Every line ends with a checksum of the rest of it. A line that is torn, damaged or no whole record is skipped:
its sample is missing then, and is measured again.
"""

from __future__ import annotations

import json
import os
import re
import stat
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self

import filelock
import pydantic

from ..errors import UserError
from . import files

Record = dict[str, Any]  # the fields of `Fields`, and more

_CHECKED = re.compile(rb'(.*), "crc32": "([0-9a-f]{8})"\}', re.DOTALL)


class Fields(pydantic.BaseModel):
    """The fields that every line of a file has; `KEY` names those that tell it from the others."""

    model_config = pydantic.ConfigDict(strict=True)
    KEY: ClassVar[tuple[str, ...]] = ("cell", "sample")

    cell: str
    sample: pydantic.NonNegativeInt


class SampleFields(Fields):
    """The fields of a line of samples.jsonl."""

    score: pydantic.FiniteFloat
    answer: str
    # Before version 0.2 there was one.
    references: list[str] | str = pydantic.Field(
        validation_alias=pydantic.AliasChoices("references", "reference")
    )
    steps: pydantic.FiniteFloat
    bytes_read: pydantic.FiniteFloat
    bytes_written: pydantic.FiniteFloat
    bytes_dense: pydantic.FiniteFloat
    kv_bytes: pydantic.FiniteFloat
    slots: pydantic.FiniteFloat | None = None  # not in version 0.1
    tokens_per_second: list[pydantic.FiniteFloat] | pydantic.FiniteFloat | None  # one number in version 0.1


def read(path: Path, fields: type[Fields] = SampleFields) -> list[Record]:
    """Complete, undamaged lines only; no file is no lines.

    Raises:
        UserError: the file cannot be read, or is no regular file.
    """
    lines = files.read(path).split(b"\n")[:-1] if path.exists() else []
    return [record for line in lines if (record := _decode(line, fields)) is not None]


def write(path: Path, records: Iterable[Record]) -> None:
    """Replace a file by these records.

    Raises:
        UserError: it cannot be written.
    """
    files.write(path, b"".join(map(_encode, records)))


def _encode(record: Record) -> bytes:
    line = json.dumps(record, ensure_ascii=False).encode("utf-8", "replace")
    return line[:-1] + b', "crc32": "%08x"}\n' % zlib.crc32(line)


def _decode(line: bytes, fields: type[Fields]) -> Record | None:
    """The record in a line; None if it is damaged. Lines of version 0.1 have no checksum."""
    if checked := _CHECKED.fullmatch(line):
        line = checked[1] + b"}"
        if zlib.crc32(line) != int(checked[2], 16):
            return None
    try:
        record: Record = json.loads(line)
        fields.model_validate(record)
    except (ValueError, RecursionError):  # pydantic's errors are ValueErrors
        return None
    return record


class Store:
    """The samples of a run folder, open for appending; one run at a time.

    Everything that is in it stays in memory too: what another program takes out of the file is written again.

    Args:
        fields: of its lines.

    Raises:
        UserError: another run writes into the folder, or it cannot be written to.
    """

    def __init__(self, path: Path, fields: type[Fields] = SampleFields) -> None:
        self.path, self.fields = path, fields
        self.restored = 0  # lines that had vanished from the file, and were written again
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._lock = filelock.FileLock(f"{path}.lock", timeout=0)
            self._lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"{path.parent}: another run is writing here; give --out another folder"
            ) from None
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be written: {_why(error)}") from None
        try:
            self._open()
            self.records: dict[tuple[Any, ...], Record] = {}
            for record in read(path, fields):
                self.records.setdefault(self._key(record), record)
        except BaseException:
            self._lock.release()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        os.close(self._file)
        self._lock.release()

    def missing(self, cell: str, samples: int) -> list[int]:
        """Which of the first `samples` samples of a cell are not there yet."""
        return [i for i in range(samples) if (cell, i) not in self.records]

    def append(self, records: list[Record]) -> None:
        """Add records and wait until the disk has them; either all of them are there afterwards, or none.

        Raises:
            UserError: the disk is full, or the file cannot be written.
        """
        self.restore()
        self._append(records)
        self.records |= {self._key(record): record for record in records}

    def restore(self) -> int:
        """Write again what another program took out of the file; returns how many samples.

        Raises:
            UserError: as `append`.
        """
        if self._is_as_we_left_it():
            return 0
        before = self._file
        self._open()
        os.close(before)
        present = {self._key(record) for record in read(self.path, self.fields)}
        lost = [record for key, record in self.records.items() if key not in present]
        self._append(lost)
        self.restored += len(lost)
        return len(lost)

    def _open(self) -> None:
        """Open the file, or make it, and cut off a torn last line."""
        flags = os.O_RDWR | os.O_CREAT | os.O_APPEND | getattr(os, "O_BINARY", 0)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A link is not followed, and a pipe is not waited for.
            self._file = os.open(
                self.path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0), 0o666
            )
            try:
                if not stat.S_ISREG(os.fstat(self._file).st_mode):
                    raise UserError(f"{self.path}: cannot be written: it is not a regular file")
                data = files.read(self.path)
                self._size = data.rfind(b"\n") + 1
                if self._size < len(data):
                    os.ftruncate(self._file, self._size)
                self._seen = self._state()
            except BaseException:
                os.close(self._file)
                raise
        except OSError as error:
            reason = "it is a symbolic link" if self.path.is_symlink() else error.strerror
            raise UserError(f"{self.path}: cannot be written: {reason}") from None

    def _append(self, records: list[Record]) -> None:
        data = b"".join(map(_encode, records))
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
        self._seen = self._state()

    def _is_as_we_left_it(self) -> bool:
        try:
            return self._state() == self._seen
        except OSError:
            return False

    def _key(self, record: Record) -> tuple[Any, ...]:
        return tuple(record[name] for name in self.fields.KEY)

    def _state(self) -> tuple[int, ...]:
        """Which file it is, and the marks that any change of it leaves."""
        found = os.stat(self.path)
        return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
