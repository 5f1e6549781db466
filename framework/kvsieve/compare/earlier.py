"""Rows of an earlier run in the same folder that a comparison does not ask for."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path

from ..errors import UserError
from . import manifest
from .manifest import Entry, Record


def left_out(folder: Path, records: Sequence[Record], asked: Sequence[Entry], models: Collection[str]) -> str:
    """Say which measured rows of the folder are none of those `asked` for, which each of the models has.

    Their samples stay in the folder; its tables are made anew, and have them no more. Empty: there are none.

    Raises:
        UserError: none of the rows is asked for: it is another comparison's folder.
    """
    if not records or not (folder / manifest.NAME).exists():
        return ""
    try:
        known = manifest.read(folder, records)
    except UserError:  # an older version's, or of a policy that is no longer installed
        return ""
    measured = {record["cell"] for record in records}
    earlier = [entry for entry in known if entry.cell in measured]
    wanted = {_row(entry) for entry in asked}
    gone = [entry for entry in earlier if entry.model not in models or _row(entry) not in wanted]
    if not gone:
        return ""
    if len(gone) == len(earlier):
        raise UserError(
            f"{folder} holds another comparison, of which nothing is asked for here: {len(gone)} rows, such "
            f"as {gone[0].label}. Give a folder of its own (--out), or remove this one"
        )
    return (
        f"{len(gone)} of the {len(earlier)} rows that {folder} has are not asked for now, such as "
        f"{gone[0].label}: their samples are kept, and the tables leave them out"
    )


def _row(entry: Entry) -> tuple[str, ...]:
    """The task and the policy as they were asked for; the parameters behind a budget depend on the model."""
    parameters = json.dumps(dict(entry.task_parameters), sort_keys=True)
    how = entry.budget or entry.parameters
    return entry.task, parameters, str(entry.context), entry.policy, how
