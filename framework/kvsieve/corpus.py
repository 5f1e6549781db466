"""Text that every machine has: the sources of Python's standard library, split for training and testing.

The split is by file name, so that a newer Python cannot move a file from one side to the other.
"""

import functools
import hashlib
import sysconfig
import zlib
from collections.abc import Iterator
from pathlib import Path

# Skipped: tables of numbers, generated files, tests, and folders that some distributions do not install.
_LEFT_OUT = {"site-packages", "dist-packages", "__pycache__", "config", "test", "tests", "idlelib", "lib2to3",
             "encodings", "pydoc_data", "ensurepip", "turtledemo"}  # fmt: skip
_HELD_OUT_SHARE = 8  # one file in eight


def _sources() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if _LEFT_OUT.isdisjoint(parts[:-1]) and not parts[0].startswith("config-") and len(path.name) > 3:
            text = path.read_text(encoding="utf-8", errors="ignore")
            if len(text) > 2000 and text.isascii():
                yield "/".join(parts), text


def _is_held_out(name: str) -> bool:
    return zlib.crc32(name.encode()) % _HELD_OUT_SHARE == 0


@functools.cache
def held_out_text() -> str:
    """Return about a megabyte of text that the reference model was not trained on.

    Raises:
        FileNotFoundError: this Python was installed without its sources.
    """
    return _joined(held_out=True)


@functools.cache
def training_text() -> str:
    """Return the text that the reference model was trained on."""
    return _joined(held_out=False)


def _joined(held_out: bool) -> str:
    text = "\n".join(text for name, text in _sources() if _is_held_out(name) == held_out)
    if not text:
        root = sysconfig.get_paths()["stdlib"]
        raise FileNotFoundError(
            f"no Python sources under {root}: this Python came without its standard library's text; "
            "give the task a text file of your own (text: path/to/file.txt)"
        )
    return text


def digest(text: str) -> str:
    """Identify a text by the first twelve hexadecimal digits of its SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]
