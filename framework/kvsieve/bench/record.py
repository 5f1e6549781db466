"""The record of a benchmark: a JSON file that names the machine, and in which a killed run is continued."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__, ops
from ..compare import files
from ..compare.environment import cpu_name, git_commit
from ..errors import UserError
from ..user_files import user_path

_PACKAGES = ("torch", "transformers", "triton", "numba", "flashinfer-python", "flash-attn")
_MOST_BYTES = 64 * 1024 * 1024
_SIZES = ("batch", "context", "heads")

Cell = dict[str, Any]  # what was measured at one batch and context; plain data
# The cell of these sizes, as far as it was measured before.
Known = Callable[[Mapping[str, Any]], Cell | None]


class Record:
    """The file of one benchmark; seconds, bytes and bytes a second throughout.

    If the folder has one with the same settings, machine and commit that is not complete, the run goes on
    there: `cells` is what it holds.

    Raises:
        UserError: the folder cannot be made.
    """

    def __init__(
        self, folder: Path, benchmark: str, device: torch.device, settings: Mapping[str, Any]
    ) -> None:
        _prepare(folder)
        self.machine = machine(device)
        self._head = {"benchmark": benchmark, "machine": self.machine, "settings": dict(settings)}
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        begin = f"{benchmark}-{re.sub(r'[^a-z0-9]+', '-', name.lower()).strip('-')}"
        self.path = folder / f"{begin}-{time.strftime('%Y%m%d-%H%M%S')}.json"
        self.cells: list[Cell] = []
        for path in sorted(folder.glob(f"{begin}-*.json"), reverse=True):
            if (cells := self._unfinished(path)) is not None:
                self.path, self.cells = path, cells
                break

    def measured(self, sizes: Mapping[str, Any]) -> Cell | None:
        """The cell of these sizes, as far as it was measured before."""
        return next((cell for cell in self.cells if _sizes(cell) == _sizes(sizes)), None)

    def write(self, cell: Cell | None = None, complete: bool = False) -> None:
        """Put a cell in, in place of what there is of it, and replace the file.

        Raises:
            UserError: the file cannot be written.
        """
        if cell is not None:
            places = [i for i, known in enumerate(self.cells) if _sizes(known) == _sizes(cell)]
            self.cells[slice(places[0], places[0] + 1) if places else slice(len(self.cells), None)] = [cell]
        contents = {
            **self._head,
            "complete": complete,
            "not_to_be_quoted": disturbance(self.cells),
            "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "command": command(sys.argv[1:]),
            "cells": self.cells,
        }
        files.write(self.path, json.dumps(contents, indent=1, default=str) + "\n")

    def _unfinished(self, path: Path) -> list[Cell] | None:
        """The cells of a file that this run can go on with."""
        try:
            found = json.loads(files.read(path, _MOST_BYTES))
        except (UserError, ValueError, RecursionError):
            return None
        if not isinstance(found, dict) or found.get("complete") is not False:
            return None
        ours, theirs = (_comparable(each) for each in (json.loads(json.dumps(self._head)), found))
        cells = found.get("cells")
        return cells if ours == theirs and isinstance(cells, list) else None


def _sizes(cell: Mapping[str, Any]) -> list[Any]:
    return [cell.get(name) for name in _SIZES]


def _comparable(contents: dict[str, Any]) -> list[Any]:
    known = contents.get("machine")
    steady = {k: v for k, v in known.items() if k != "load_average"} if isinstance(known, dict) else known
    return [contents.get("benchmark"), contents.get("settings"), steady]


def disturbance(cells: Iterable[Cell]) -> str | None:
    """Why these cells are not to be quoted, from the most disturbed of their measurements; None: they are."""
    loads = [part.get("load") for cell in cells for part in (cell, *cell.get("rows", []))]
    disturbed = [load for load in loads if load and load["not_to_be_quoted"]]
    worst = max(disturbed, key=lambda load: load["stolen"] + load["other_processes"], default=None)
    return worst and str(worst["not_to_be_quoted"])


def machine(device: torch.device) -> dict[str, Any]:
    """Describe the machine: enough to judge the numbers and to measure them again."""
    versions = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    found: dict[str, Any] = {
        "device": str(device),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "ops": ops.chosen(device),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "kvsieve": __version__,
        "git_commit": git_commit(),
        "versions": versions,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": properties.name,
            "gpu_memory": properties.total_memory,
            "driver": _driver(),
            "runtime": torch.version.cuda or torch.version.hip,
        }
    return found


def missing_compiler(machine: Mapping[str, Any]) -> str | None:
    """Say what the lack of a compiler costs, and how to mend it; None: none is lacking."""
    if machine["ops"] == "cpu" and "numba" not in machine["versions"]:
        return "without numba torch's ops are measured; pip install 'kvsieve[cpu]' brings compiled ones"
    if machine["ops"] == "triton" and not (
        os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    ):
        return (
            "there is no C compiler (gcc, clang, or the one that CC names): Triton's kernels and the step "
            "that transformers compiles fail unless they are cached; --ops reference needs none"
        )
    return None


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return match[0] if match else None


def command(arguments: Sequence[str]) -> str:
    """The command that repeats a benchmark, without folders of this machine: no `--out`, a model's name."""
    kept, option = ["kvsieve"], ""
    for argument in arguments:
        if option == "--model":
            kept.append(Path(argument).name if _is_folder(argument) else argument)
        elif option != "--out" and argument != "--out" and not argument.startswith("--out="):
            name, equals, value = argument.partition("=")
            hides = name == "--model" and equals and _is_folder(value)
            kept.append(f"{name}={Path(value).name}" if hides else argument)
        option = argument
    return shlex.join(kept)


def name_of_model(id_or_path: str) -> str:
    """An id, or the name of a folder with a digest of its files' names, sizes and times."""
    if not _is_folder(id_or_path):
        return id_or_path
    folder = user_path(id_or_path)
    known = sorted((file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in folder.iterdir())
    return f"{folder.resolve().name} {hashlib.sha256(repr(known).encode()).hexdigest()[:12]}"


def _is_folder(text: str) -> bool:
    return user_path(text).is_dir()


def _prepare(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror or error}") from error
