"""Read a file that a user names: regular files only, up to a size, as UTF-8 text."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from .errors import UserError


def read_text(path: Path, most: int) -> str:
    """The text of a regular file of at most `most` bytes; a byte order mark is dropped.

    Raises:
        UserError: not there, not readable, not a regular file (pipes, devices and folders are never read),
            too large, or not UTF-8. It begins with the path, and with line and column where they are known.
    """
    try:
        # Without O_NONBLOCK, opening a pipe would wait for its writer.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UserError(f"{path}: cannot be read: it is not a regular file")
            data = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{str(path)!r}: cannot be read: {error}") from None
    if len(data) > most:
        raise UserError(f"{path}: is larger than {_size(most)}, the most that is read")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = data[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        raise UserError(
            f"{path}:{line}:{column}: is not UTF-8 text (byte 0x{data[error.start]:02x}): save it as UTF-8"
        ) from None


def check_readable(path: Path, most: int) -> None:
    """Raise the UserError of `read_text` without reading: not there, not a regular file, or too large."""
    try:
        found = path.stat()
        os.close(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {getattr(error, 'strerror', error)}") from None
    if not stat.S_ISREG(found.st_mode):
        raise UserError(f"{path}: cannot be read: it is not a regular file")
    if found.st_size > most:
        raise UserError(f"{path}: is larger than {_size(most)}, the most that is read")


def user_path(text: str) -> Path:
    """A path that a user wrote, with `~` expanded where that is possible."""
    try:
        return Path(text).expanduser()
    except RuntimeError:
        return Path(text)


def _size(size: int) -> str:
    return f"{size >> 20} MiB" if size >= 1 << 20 else f"{size >> 10} KiB"
