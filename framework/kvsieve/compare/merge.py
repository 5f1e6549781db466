"""Runs joined into one folder: other policies, samples or machines, under one protocol; or shown apart."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import UserError
from . import diagnostics, environment, files, identity, manifest, samples
from .identity import Fields
from .manifest import Entry
from .results import group_key
from .samples import Record

_OF_TASK = ("task", "text of the task", "code of the task")
_OF_POLICY = ("policy", "code of the policy", "files of the policy")
_BATCH = ("rows", "tokens_per_second")  # of a record: how fast it was
_RUNS = "runs"  # in environment.json: those that were joined


class _Run(NamedTuple):
    name: str  # unlike those of the others
    folder: Path
    entries: list[Entry]
    records: list[Record]
    diagnosed: list[Record]
    protocol: dict[str, Fields]  # by cell id
    environment: dict[str, Any]


def merge(folders: Sequence[Path], out: Path, apart: bool = False) -> list[str]:
    """Write the runs in these folders into `out`, as the folder of one run; its tables are still to be made.

    Cells of equal ids are joined; of a sample that several runs have, the first one's counts. Speeds stay
    those of each machine. `apart`: nothing is joined, and every task is told of each run.

    Returns: what is worth saying, a line each.

    Raises:
        UserError: a folder is not one of a run; runs differ in what results depend on, with all of it; `out`
            holds a run, or cannot be written.
    """
    if (out / "samples.jsonl").exists() and _RUNS not in files.read_object(out / "environment.json"):
        raise UserError(f"--out {out} holds a run of its own: give another folder")
    runs = [_read(folder, name) for folder, name in zip(folders, names(folders), strict=True)]
    if apart:
        runs = [_told_apart(run) for run in runs]
    else:
        _check(runs)
    entries, records, notes = _joined(runs)
    diagnosed, more = _diagnosed(runs, apart)
    environments = environment.together({run.name: run.environment for run in runs}, _RUNS)
    manifest.write(out, entries)
    samples.write(out / "samples.jsonl", records)
    if diagnosed or (out / diagnostics.NAME).exists():  # of an earlier merge
        samples.write(out / diagnostics.NAME, diagnosed)
    identity.write(out, {cell: fields for run in runs for cell, fields in run.protocol.items()})
    files.write(out / "environment.json", json.dumps(environments, indent=2, ensure_ascii=False) + "\n")
    return [*notes, *more]


def names(folders: Sequence[Path]) -> list[str]:
    """The folders' own names; whole paths where two are alike.

    Raises:
        UserError: a folder is named twice.
    """
    paths = [folder.resolve() for folder in folders]
    if len({*paths}) < len(paths):
        raise UserError(f"a run is named twice: {', '.join(map(str, folders))}")
    short = [path.name for path in paths]
    return short if len({*short}) == len(short) else [str(folder) for folder in folders]


def _read(folder: Path, name: str) -> _Run:
    records = samples.read(folder / "samples.jsonl")
    entries = manifest.read(folder, records)
    machine = files.read_object(folder / "environment.json")
    diagnosed = [record for of_cell in diagnostics.read(folder).values() for record in of_cell]
    return _Run(name, folder, entries, records, diagnosed, identity.read(folder), machine)


def _told_apart(run: _Run) -> _Run:
    """With its name in every cell and id."""

    def id(cell: str) -> str:
        return f"{run.name}:{cell}"

    return run._replace(
        entries=[dataclasses.replace(one, cell=id(one.cell), run=run.name) for one in run.entries],
        records=[record | {"cell": id(record["cell"])} for record in run.records],
        diagnosed=[record | {"cell": id(record["cell"])} for record in run.diagnosed],
        protocol={id(cell): fields for cell, fields in run.protocol.items()},
    )


def _check(runs: Sequence[_Run]) -> None:
    """Refuse runs whose results cannot stand beside each other: every field that differs is named."""
    first: dict[str, tuple[str, Fields]] = {}
    found: dict[tuple[str, str], dict[str, None]] = {}
    for run in runs:
        for entry in run.entries:
            fields = run.protocol.get(entry.cell)
            if fields is None:
                raise UserError(
                    f"{run.folder} does not say how {entry.label} was measured ({identity.PROTOCOL}): it can "
                    "only be shown apart (--apart)"
                )
            for about, part in _parts(entry, fields):
                before, old = first.setdefault(about, (run.name, part))
                for difference in identity.differences(old, part):
                    found.setdefault((before, run.name), {})[difference] = None
    if found:
        lines = [f"{one} and {other} differ in {', '.join(how)}" for (one, other), how in found.items()]
        raise UserError("\n".join([*lines, "such results are not mixed; --apart shows them side by side"]))


def _parts(entry: Entry, fields: Fields) -> Iterable[tuple[str, Fields]]:
    """The fields that all cells of a model, of a task and of a policy must share."""
    own = {*_OF_TASK, *_OF_POLICY}
    yield entry.model, {name: value for name, value in fields.items() if name not in own}
    for names in (_OF_TASK, _OF_POLICY):
        about, *rest = names
        yield (
            json.dumps([about, fields.get(about)], sort_keys=True),
            {name: fields.get(name) for name in rest},
        )


def _joined(runs: Sequence[_Run]) -> tuple[list[Entry], list[Record], list[str]]:
    """Each cell and each sample once, and notes about samples that several runs have."""
    machines = _machines(runs)
    several = len({*machines}) > 1 or any("machines" in record for run in runs for record in run.records)
    entries: dict[str, Entry] = {}
    owners: dict[tuple[str, int], int] = {}  # of samples: the number of their run
    kept: dict[tuple[str, int], Record] = {}
    twice = Counter[tuple[str, str]]()
    for number, run in enumerate(runs):
        for entry in run.entries:
            known = entries.setdefault(entry.cell, entry)
            most = max(known.samples, entry.samples)
            error = known.error and entry.error
            entries[entry.cell] = dataclasses.replace(known, samples=most, error=error)
        for record in run.records:
            place = record["cell"], record["sample"]
            owner = owners.setdefault(place, number)
            if place in kept:
                twice[runs[owner].name, run.name] += 1
            else:
                kept[place] = record | ({"machines": {}} if several else {})
            if several:  # where another machine measured it, too, that is a speed more
                batch = {name: record[name] for name in _BATCH if name in record}
                kept[place]["machines"] |= record.get("machines", {machines[number]: batch})
    notes = [
        f"{count} samples are in {one} and in {other}: those of {one} count"
        for (one, other), count in twice.items()
    ]
    return _labelled(entries.values()), list(kept.values()), notes


def _diagnosed(runs: Sequence[_Run], apart: bool) -> tuple[list[Record], list[str]]:
    """The diagnostics of each sample once; none, and a note, where they were not all made in one way."""
    records = [record for run in runs for record in run.diagnosed]
    methods = list(dict.fromkeys(record["method"] for record in records))
    if len(methods) > 1 and not apart:
        return [], [f"diagnostics were made in several ways ({'; '.join(methods)}) and are left out"]
    return list({(record["cell"], record["sample"]): record for record in reversed(records)}.values())[
        ::-1
    ], []


def _machines(runs: Sequence[_Run]) -> list[str]:
    """The machine of each run, by its GPU or CPU; with the first run's name where two such are not alike."""
    alike: dict[str, dict[str, str]] = {}  # by name and facts: the first such run
    found = []
    for run in runs:
        name = str(run.environment.get("gpu") or run.environment.get("cpu") or "unknown")
        facts = json.dumps([run.environment.get(fact) for fact in ("cpu", "cores", "threads", "ops")])
        first = alike.setdefault(name, {}).setdefault(facts, run.name)
        found.append((name, first))
    return [name if len(alike[name]) == 1 else f"{name} ({first})" for name, first in found]


def _labelled(entries: Iterable[Entry]) -> list[Entry]:
    """With labels that tell policies of a group apart, whichever run they came from."""
    taken: set[tuple[object, ...]] = set()
    found = []
    for entry in entries:
        label = entry.policy_label
        if (group_key(entry), label) in taken:
            label = f"{label} ({entry.parameters})"
        taken.add((group_key(entry), label))
        found.append(dataclasses.replace(entry, policy_label=label))
    return found
