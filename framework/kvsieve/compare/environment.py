"""Where a run took place: what a reader needs to judge its speeds and to repeat it."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from typing import Any

import torch
from transformers import PreTrainedModel

from .. import __version__, plugins
from .cells import Cell


def describe(
    model: PreTrainedModel, cells: list[Cell], protocol: dict[str, Any], started: str
) -> dict[str, Any]:
    """The contents of environment.json."""
    registered = plugins.policies()
    origins = {registered[cell.policy_name] for cell in cells if cell.policy_name in registered}
    packages = {o.distribution: o.version for o in origins if o.distribution != "kvsieve"}
    versions = {name: metadata.version(name) for name in ("torch", "transformers", "numpy")}
    gpu = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None
    return {
        "started": started,
        "kvsieve": __version__,
        "plugins": packages,
        "python": platform.python_version(),
        **versions,
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "device": str(model.device),
        "dtype": protocol["dtype"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "revision": protocol["revision"],
        "weights": protocol["weights"],
        "git_commit": git_commit(),
    }


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def git_commit() -> str | None:
    """Of the folder that the run was started in; `+` behind it: with changes that are not committed."""
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*"],
            capture_output=True, text=True, timeout=5, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return commit.stdout.strip() or None
