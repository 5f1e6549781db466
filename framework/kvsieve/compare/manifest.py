"""cells.json: what the rows of a run are about, in their order, and what of it failed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import UserError
from . import files
from .results import Subject
from .statistics import Limits

if TYPE_CHECKING:
    from ..specs import PolicySpec
    from .cells import Cell

NAME = "cells.json"
Record = Mapping[str, Any]  # of samples.jsonl


@dataclasses.dataclass(frozen=True, kw_only=True)
class Entry(Subject):
    """One cell of a run."""

    cell: str  # its id, as in samples.jsonl
    label: str  # `needle 512, sparq 1/8`
    limits: Limits  # the lowest and the highest score of the task
    samples: int  # asked for
    error: str | None = None  # why it failed


def write(folder: Path, cells: Sequence[Entry]) -> None:
    """Write cells.json.

    Raises:
        UserError: it cannot be written.
    """
    plain = [dataclasses.asdict(entry) for entry in cells]
    files.write(folder / NAME, json.dumps(plain, indent=1, ensure_ascii=False) + "\n")


def entries(cells: Sequence[Cell], model: str, failures: Mapping[str, str]) -> list[Entry]:
    """The entries of cells.json for the cells of one model; `failures`: why a cell failed, by its id."""
    from .cells import describe_parameters

    labels = policy_labels(cells)
    return [
        Entry(
            model=model,
            task=cell.task.title,
            task_parameters=_task_parameters(cell),
            context=cell.task.context,
            policy=cell.policy_name,
            policy_label=label,
            parameters=cell.parameters,
            not_default=describe_parameters(cell.policy, changed=True),
            budget=_text(cell.budget),
            metric=cell.task.metric,
            higher_is_better=cell.task.higher_is_better,
            chance=cell.task.chance,
            cell=cell.id,
            label=cell.label,
            limits=cell.task.limits,
            samples=cell.task.samples,
            error=failures.get(cell.id),
        )
        for cell, label in zip(cells, labels, strict=True)
    ]


def policy_labels(cells: Sequence[Cell]) -> list[str]:
    """A short name for the policy of each cell, unlike those of the others, and the same on every task.

    The budget that was asked for, or the parameters that are not the defaults; policies of the same budget
    get those parameters in which they differ, as far as they were given.
    """
    from .cells import describe_asked

    rivals: dict[tuple[object, ...], list[PolicySpec]] = {}
    for cell in cells:
        if cell.asked is not None and cell.budget is not None:
            rivals.setdefault((cell.policy_name, cell.budget), []).append(cell.asked)
    labels = []
    for cell in cells:
        how = cell.how
        if cell.asked is not None and cell.budget is not None:
            same = [asked.parameters for asked in rivals[cell.policy_name, cell.budget]]
            names = dict.fromkeys(name for given in same for name in given)
            differ = [n for n in names if any(given.get(n, ...) != same[0].get(n, ...) for given in same[1:])]
            how = describe_asked(cell.asked, only=differ)
        labels.append(f"{cell.policy_name} {how}".strip())
    return labels


def read(folder: Path, records: Sequence[Record]) -> list[Entry]:
    """The entries of a run folder. What version 0.1.0 did not write is made from the samples.

    Raises:
        UserError: the folder is not one of a run, or its samples need a policy or a task that is not
            installed.
    """
    if not (folder / NAME).exists():
        if not records:
            raise UserError(f"{folder} is not the folder of a run: it has no {NAME}, and no samples")
        return list(_recovered(folder, records).values())
    try:
        given = json.loads(files.read(folder / NAME))
        for one in given:
            one.setdefault("budget", one.pop("compression", ""))  # its name at first
            one.setdefault("not_default", one["parameters"])  # not told apart at first
            one.setdefault("run", "")
            _check_known(folder, one)
        if all(field.name in one for one in given for field in dataclasses.fields(Entry)):
            return [Entry(**one) for one in given]
        recovered = _recovered(folder, records)
        return [
            dataclasses.replace(recovered[one["cell"]], samples=one["samples"], error=one["error"])
            for one in given
            if one["cell"] in recovered
        ]
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{folder} is not the folder of a run: {NAME} cannot be read ({error!r})") from None


def _check_known(folder: Path, entry: Mapping[str, Any]) -> None:
    known = {field.name for field in dataclasses.fields(Entry)}
    if unknown := [name for name in entry if name not in known]:
        version = files.read_object(folder / "environment.json").get("kvsieve", "unknown")
        raise UserError(
            f"{folder} was written by another version of kvsieve ({version}; this is {__version__}): its "
            f"{NAME} tells of {', '.join(unknown)}"
        )


def failures(folder: Path) -> list[tuple[str, str]]:
    """Label and reason of the cells that failed, as far as cells.json tells."""
    if not (folder / NAME).exists():
        return []
    try:
        found = json.loads(files.read(folder / NAME))
        return [(str(one["label"]), str(one["error"])) for one in found if one.get("error")]
    except (TypeError, KeyError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder / NAME} cannot be read: {error!r}") from None


def _recovered(folder: Path, records: Sequence[Record]) -> dict[str, Entry]:
    """An entry for every cell that has samples."""
    import yaml

    from .. import plugins
    from ..entries import Budget
    from ..specs import PolicySpec, make_policy
    from .cells import Cell

    by_cell: dict[str, list[Record]] = {}
    for record in records:
        by_cell.setdefault(record["cell"], []).append(record)
    cells, recorded = [], {}
    for id, (first, *others) in by_cell.items():
        try:
            ((name, parameters),) = first["task"].items()
            if name not in plugins.tasks():
                raise UserError(f"unknown task {name!r}")
            samples = 1 + max(record["sample"] for record in (first, *others))
            task = plugins.tasks()[name].cls(**parameters, samples=samples)
            asked = first.get("budget") or first.get("compression")  # its name in version 0.1
            policy = make_policy(first["policy"])
            budget = None if asked is None else Budget.parse(asked)
            given = {field.name: getattr(policy, field.name) for field in dataclasses.fields(policy)}
            cells.append(Cell(id, task, policy, PolicySpec(type(policy), given, budget)))
            recorded[id] = parameters
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{folder}: {NAME} is missing or of an older version, and cannot be made from the samples: "
                f"{error}"
            ) from None
    try:
        model = str(yaml.safe_load(files.read(folder / "config.yaml"))["model"])
    except (UserError, yaml.YAMLError, TypeError, KeyError):
        model = ""
    tasks = dict.fromkeys(cell.task for cell in cells)
    # What was given beside a budget is not known, and what follows from it differs from task to task.
    found = [one for task in tasks for one in entries([c for c in cells if c.task == task], model, {})]
    # The parameters that a task had then.
    return {
        entry.cell: dataclasses.replace(
            entry,
            task_parameters={k: v for k, v in entry.task_parameters.items() if k in recorded[entry.cell]},
        )
        for entry in found
    }


def _task_parameters(cell: Cell) -> dict[str, Any]:
    return {k: v for k, v in dataclasses.asdict(cell.task).items() if k not in ("context", "samples")}


def _text(value: object) -> str:
    return "" if value is None else str(value)
