"""The record of a benchmark: a JSON file that names the machine."""

from __future__ import annotations

import json
import os
import platform
import re
import shlex
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from .. import __version__, ops
from ..compare.environment import cpu_name, git_commit
from ..errors import UserError

_PACKAGES = ("torch", "transformers", "triton", "numba", "flashinfer-python", "flash-attn")


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


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="ascii")
    except OSError:
        return None
    match = re.search(r"\b\d{3}\.\d+(\.\d+)?\b", text)
    return match[0] if match else None


def command(arguments: Sequence[str]) -> str:
    """The command that repeats a benchmark: without `--out`, a folder of this machine."""
    kept, skip = ["kvsieve"], False
    for argument in arguments:
        if not skip and argument != "--out" and not argument.startswith("--out="):
            kept.append(argument)
        skip = argument == "--out"
    return shlex.join(kept)


def prepare_folder(folder: Path) -> None:
    """Make it before hours are spent. Raises UserError if that cannot be done."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {folder}: {error.strerror or error}") from error


def new_file(folder: Path, benchmark: str, device: torch.device) -> Path:
    """`<benchmark>-<device>-<time>.json` in the folder."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    device_name = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return folder / f"{benchmark}-{device_name}-{time.strftime('%Y%m%d-%H%M%S')}.json"


def write(
    path: Path,
    benchmark: str,
    device: torch.device,
    settings: dict[str, Any],
    cells: Sequence[dict[str, Any]],
) -> None:
    """All cells so far; seconds, bytes and bytes a second throughout."""
    record = {
        "benchmark": benchmark,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": command(sys.argv[1:]),
        "machine": machine(device),
        "settings": settings,
        "cells": list(cells),
    }
    beside = path.with_name(path.name + ".tmp")
    try:
        beside.write_text(json.dumps(record, indent=1, default=str) + "\n", encoding="utf-8")
        beside.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
