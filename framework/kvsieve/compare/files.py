"""Files of a run folder: each is replaced as a whole or left as it was, and only regular files are read."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import stat
from pathlib import Path
from typing import Any

from ..errors import UserError


def write(path: Path, content: str | bytes) -> None:
    """Replace `path` by a file with this content, in one move; its folder is made if it is missing.

    A reader, a crash or a full disk sees the old file or the new one, never a part. A symbolic link at `path`
    is replaced and never followed. The file's mode follows the umask; a lone surrogate is written as `?`.

    Raises:
        UserError: the file cannot be written; what stood there still does.
    """
    data = content.encode("utf-8", "replace") if isinstance(content, str) else content
    beside = path.with_name(f".{path.name[:200]}.{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            _write_new(beside, data)
            os.replace(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                beside.unlink()
            raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be written: {_why(error)}") from None


def read(path: Path, limit: int | None = None) -> bytes:
    """The content of a regular file, or of one that a symbolic link leads to.

    Raises:
        UserError: there is none, it cannot be read, it is a pipe, a device or a folder, or it has more than
            `limit` bytes.
    """
    try:
        # A pipe without a writer would block the opening.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise UserError(f"{path}: cannot be read: it is not a regular file")
            if limit is not None and found.st_size > limit:
                raise UserError(
                    f"{path}: cannot be read: it has {found.st_size} bytes, and {limit} are allowed"
                )
            return file.read()
    except UserError:
        raise
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {_why(error)}") from None


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty where there is none.

    Raises:
        UserError: the file cannot be read, or is no JSON object.
    """
    try:
        found = json.loads(read(path)) if path.exists() else {}
    except (ValueError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is not a JSON object")
    return found


def _write_new(path: Path, data: bytes) -> None:
    """Create a file that does not exist yet, and wait until the disk has it."""
    with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _why(error: Exception) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
