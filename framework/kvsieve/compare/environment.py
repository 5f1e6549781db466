"""The machine of a run, and how busy it was: what a reader needs to judge its speeds and to repeat it."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch
from transformers import PreTrainedModel

from .. import __version__, ops, plugins
from ..cache.layouts import KeyLayout
from .cells import Cell
from .identity import Fields


def describe(model: PreTrainedModel, cells: list[Cell], shared: Fields, started: str) -> dict[str, Any]:
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
        "ops": ops.chosen(model.device),
        "layout_auto": KeyLayout("auto").on(model.device).kind,  # of a policy's keys, by default
        "gpu": gpu,
        "device": str(model.device),
        "dtype": shared["dtype"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "revision": shared["revision"],
        "weights": shared["weights digest"],
        "git_commit": git_commit(),
    }


_QUIET = 0.05  # of the cores' time: a speed measured while others had more of it says little


def together(found: Mapping[str, dict[str, Any]], key: str) -> dict[str, Any]:
    """The facts of several environments, by name: those that all share, and under `key` each one's others."""
    first, *others = found.values()
    shared = {fact: value for fact, value in first.items() if all(one.get(fact) == value for one in others)}
    if not others:
        return shared
    own = {name: {k: v for k, v in one.items() if k not in shared} for name, one in found.items()}
    return shared | {key: own}


class Load:
    """The load of this machine since the object was made."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._times = psutil.cpu_times()
        self._own = _own_seconds()

    def now(self) -> dict[str, Any]:
        """The load average over 1, 5 and 15 minutes: processes that want a core."""
        return {"load_average": [round(value, 2) for value in psutil.getloadavg()]}

    def since(self) -> dict[str, Any]:
        """The same, and the shares of the cores' time that others took: processes, virtual machines.

        `not_to_be_quoted` says why a speed that was measured meanwhile is not; None: it is.
        """
        times, seconds = psutil.cpu_times(), time.monotonic() - self._began
        spent = {name: getattr(times, name) - getattr(self._times, name) for name in times._fields}
        stolen = spent.get("steal", 0.0)
        idle = spent["idle"] + spent.get("iowait", 0.0)
        guests = spent.get("guest", 0.0) + spent.get("guest_nice", 0.0)  # in user and nice, too
        whole = max(sum(spent.values()) - guests, 1e-9)
        others = whole - idle - stolen - (_own_seconds() - self._own)
        shares = {
            "other_processes": round(max(0.0, others / whole), 3),
            "stolen": round(max(0.0, stolen / whole), 3),
        }
        return self.now() | {
            "seconds": round(seconds, 1),
            **shares,
            "not_to_be_quoted": _disturbance(**shares),
        }


def _disturbance(other_processes: float, stolen: float) -> str | None:
    if other_processes + stolen <= _QUIET:
        return None
    return (
        f"other processes had {other_processes:.0%} of the cores' time, other guests of the host {stolen:.0%}"
    )


def _own_seconds() -> float:
    """Of this process and those that it started and waited for."""
    spent = psutil.Process().cpu_times()
    return spent.user + spent.system + spent.children_user + spent.children_system


def cpu_name() -> str:
    """The processor's model, such as `AMD EPYC 7B13`."""
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if line.startswith("model name")]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or platform.machine()


def git_commit(folder: Path = Path(__file__).parent) -> str | None:
    """The commit of kvsieve's own code; a `+` behind it: with changes that are not committed. None: it is not
    that of a clone.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", Path(__file__).name)  # the clone is not another project's
        return git("describe", "--always", "--dirty=+", "--abbrev=12", "--exclude=*") or None
    except (OSError, subprocess.SubprocessError):
        return None
