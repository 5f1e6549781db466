"""The commands that repeat a run, and the protocol that all of its cells share."""

import re
import shlex
from typing import Any

from .folder import RunFolder

_PACKAGES = ["torch", "transformers"]


def commands(run: RunFolder) -> str:
    """The lines of a shell in a clone of kvsieve: its commit, the versions installed, the comparison.

    Of joined runs, which have a configuration each, the line that joins them.
    """
    known = run.environment
    if not run.config:
        joined = known.get("runs")
        return (
            shlex.join(["kvsieve", "report", *joined, "--out", "joined"]) if isinstance(joined, dict) else ""
        )
    versions = {name: known[name] for name in _PACKAGES if isinstance(known.get(name), str)}
    versions |= {str(name): str(version) for name, version in known.get("plugins", {}).items()}
    pinned = [f"{name}=={re.sub('[+].*', '', version)}" for name, version in versions.items()]
    return "\n".join(
        [
            *_checkout(known.get("git_commit")),
            shlex.join(["pip", "install", ".", *pinned]),
            "kvsieve compare config.yaml --out again",
        ]
    )


def _checkout(commit: Any) -> list[str]:
    if not isinstance(commit, str) or not re.fullmatch(r"[0-9a-f]+[+]?", commit):
        return []
    changed = "  # and changes that were not committed" if commit.endswith("+") else ""
    return [f"git checkout {commit.rstrip('+')}{changed}"]


def protocol(run: RunFolder) -> list[tuple[str, str]]:
    """The fields of protocol.json that are the same in all cells of this run, and no dictionaries."""
    cells = {entry.cell for entry, _ in run.measured}
    known: list[dict[str, Any]] = [fields for cell, fields in run.protocol.items() if cell in cells]
    if not known:
        return []
    return [
        (name, str(value))
        for name, value in known[0].items()
        if value is not None
        and not isinstance(value, dict | list)
        and all(fields.get(name) == value for fields in known)
    ]
