"""Digests of the source files that a number depends on: edited code gets new results, not old ones."""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

_Stamp = tuple[int, int]  # of a file: when it was changed, and its size

# What these import, directly or not, computes answers and counts bytes. Implementations of the ops are
# imported by name.
_ROOTS = (
    "kvsieve.loop",
    "kvsieve.scoring",
    "kvsieve.attention",
    "kvsieve.recording",
    "kvsieve.calibration",
    "kvsieve.hf.interface",
    "kvsieve.hf.models",
    "kvsieve.ops.reference",
    "kvsieve.ops.cpu",
    "kvsieve.ops.numba",
    "kvsieve.ops.triton",
)
# These, without what they import.
_ALONE = (
    "kvsieve.compare.execute.unit",
    "kvsieve.compare.execute.cell",
    "kvsieve.compare.execute.said",
    "kvsieve.compare.tasks.base",
)
_IRRELEVANT = {
    "kvsieve",
    "kvsieve.errors",
    "kvsieve.hooks",
    "kvsieve.plugins",
    "kvsieve.processes",
    "kvsieve.specs",
}
# All policies and tasks have them.
_BASES = {
    "builtins",
    "abc",
    "typing",
    "kvsieve.policy",
    "kvsieve.wrapper",
    "kvsieve.compare.tasks.base",
}


def framework_digest() -> str:
    """Of all files of kvsieve that take part in a decode step."""
    files = framework_files()
    return _digest(f"{name} {digest}" for name, digest in sorted(files.items()))


def framework_files() -> dict[str, str]:
    """A digest for each of these files, by the name of its module."""
    files: dict[str, str] = {}
    for root in _ROOTS:
        files |= _files(root)
    return files | {name: _files(name)[name] for name in _ALONE}


def digest_of(*modules: str) -> str:
    """Of the files of these modules, without what they import."""
    return _digest(_files(name)[name] for name in modules)


def remote_digest(model: type) -> str:
    """Of the code that came with a checkpoint, whatever its folder; empty where that is transformers'."""
    files = _files(model.__module__) if model.__module__.startswith("transformers_modules.") else {}
    return _digest(sorted(files.values())) if files else ""


def class_files(*classes: type) -> dict[str, str]:
    """A digest for each file that these classes are written in, and for each that it imports from its package
    or, where that is another one, from kvsieve; but for those of `framework_files`.

    A class that was typed into an interpreter has no file: its name stands for it.
    """
    files: dict[str, str] = {}
    for cls in classes:
        for base in cls.__mro__:
            if base.__module__ not in _BASES:
                files |= _files(base.__module__) or {base.__qualname__: ""}
    return dict(sorted(files.items()))


def _files(root: str) -> dict[str, str]:
    """A digest for the file of a module, and for each that it imports in turn from its top-level package.

    A package that is not kvsieve may import from kvsieve, too: what all results depend on is left out there.
    """
    package = root.partition(".")[0]
    known = frozenset() if package == "kvsieve" else _framework()
    found: dict[str, str] = {}
    waiting = [root]
    while waiting:
        name = waiting.pop()
        if name in found or name in _IRRELEVANT or name in known:
            continue
        path = _path(name)
        if path is None:
            continue
        try:
            found[name] = _digest([path.read_bytes()])
            stat = path.stat()
            imported = _imports(name, path, (stat.st_mtime_ns, stat.st_size))
        except (OSError, SyntaxError, ValueError):
            continue
        waiting += [other for other in imported if other.partition(".")[0] in (package, "kvsieve")]
    return found


@functools.cache
def _framework() -> frozenset[str]:
    return frozenset(framework_files())


@functools.lru_cache(maxsize=1024)
def _imports(name: str, path: Path, stamp: _Stamp) -> tuple[str, ...]:
    """Absolute names of the modules that a file imports, inside functions too.

    `from package import module` is an import of the module, not of all that the package's `__init__` imports.
    """
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    found: dict[str, None] = {}
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            found |= dict.fromkeys(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                found[inner if _path(inner) else module] = None
    return tuple(found)


def _path(name: str) -> Path | None:
    """The source file of a module; None if it has none, or there is no such module."""
    origin = getattr(sys.modules.get(name), "__file__", None)
    if origin is None:
        try:
            spec = importlib.util.find_spec(name)
        except (ImportError, ValueError, AttributeError):
            return None
        origin = spec.origin if spec is not None else None
    path = Path(origin) if origin else None
    return path if path is not None and path.suffix == ".py" and path.is_file() else None


def _digest(parts: Iterable[str | bytes]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part.encode() if isinstance(part, str) else part)
    return digest.hexdigest()[:12]
