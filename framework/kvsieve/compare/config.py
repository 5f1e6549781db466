"""The configuration of a comparison: one YAML file, checked whole before anything runs."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import pydantic
import yaml

from .. import user_files
from ..errors import UserError, unknown
from ..specs import PolicySpec, read_policies, read_tasks
from ..values import NOTHING, Loc, Mistake, read_value, shortened
from .sweep import printed_policy, read_section, without_repetitions
from .tasks import Task
from .tasks.base import MOST_SAMPLES
from .tasks.text import MOST_BYTES_OF_TEXT
from .yaml_source import Source, unquoted

MOST_CELLS = 10_000
# Of one name in a path, on nearly every file system.
MOST_BYTES_OF_NAME = 255
_SECTIONS = ("tasks", "policies")
_MODEL = "`reference`, a Hugging Face id, or a local folder"


class _Section(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())


class Diagnose(_Section):
    """Samples of every cell whose first decode steps are compared with dense attention."""

    steps: int = pydantic.Field(8, ge=1, le=65_536, description="decode steps of a sample, at most")
    samples: int = pydantic.Field(4, ge=1, le=MOST_SAMPLES, description="of each cell, the first ones")


class Until(_Section):
    """Samples of a task in place of their number: so many that every interval is narrow enough."""

    width: float = pydantic.Field(
        gt=0, description="of the widest 95 % interval of a difference from dense, in units of the score"
    )
    at_most: int = pydantic.Field(ge=1, le=MOST_SAMPLES, description="samples")


class Settings(_Section):
    """The top level of the file; of several models, for one of them."""

    model: str = pydantic.Field(min_length=1, description=_MODEL)
    revision: str | None = pydantic.Field(None, description="branch, tag or commit on the hub")
    trust_remote_code: bool = pydantic.Field(
        False,
        description="run model code that comes with the checkpoint; needs the flag --trust-remote-code, too",
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = pydantic.Field(
        None, description="null: float32 on a CPU, the checkpoint's own elsewhere"
    )
    device: str | None = pydantic.Field(
        None, description="such as cpu or cuda:1; null: the first GPU, else the CPU"
    )
    tensor_parallel: bool = pydantic.Field(
        False, description="share the model among the processes that torchrun starts"
    )
    seed: int = pydantic.Field(0, ge=0, le=2**63 - 1, description="of the samples: which text, which numbers")
    batch_size: Annotated[int, pydantic.Field(ge=1, le=65_536)] | Literal["auto"] = pydantic.Field(
        1, description="prompts decoded together; auto: as many as the free memory has room for"
    )
    eager: bool = pydantic.Field(
        False, description="run decode steps from Python, on a GPU too, instead of as one CUDA graph"
    )
    diagnose: Diagnose | None = pydantic.Field(
        None, description="compare decode steps with dense attention, per layer and head"
    )
    tasks: list[Any] = pydantic.Field(min_length=1)
    policies: list[Any] = pydantic.Field(min_length=1)

    @property
    def rows(self) -> int:
        """The size of a batch, which the model and the memory have decided where it was left to them."""
        assert isinstance(self.batch_size, int), "settings are those of a prepared comparison from here on"
        return self.batch_size


class Found(NamedTuple):
    """The parts of a configuration that are right; what is not is a mistake already, and left out."""

    models: list[str]
    revision: str | None
    tasks: list[tuple[Task, Loc]]
    policies: list[PolicySpec]


# Finds more that is wrong.
Check = Callable[[Found], list[Mistake]]


@dataclasses.dataclass(frozen=True)
class Config:
    """A checked configuration: every task (one context each) meets every policy, on every model."""

    source: Source
    # With the first of the models.
    settings: Settings
    tasks: list[tuple[Task, Loc]]
    policies: list[PolicySpec]
    models: list[str]
    # Of the tasks that are measured in rounds, by `without_samples`; their `samples` are the most.
    rounds: dict[str, Until] = dataclasses.field(default_factory=dict)
    # What is worth saying although it is no mistake, a line each, with its place.
    remarks: list[str] = dataclasses.field(default_factory=list)

    @property
    def name(self) -> str:
        return self.source.path.stem

    @property
    def found(self) -> Found:
        """All that there is to check."""
        return Found(self.models, self.settings.revision, self.tasks, self.policies)

    def each(self) -> list[Config]:
        """This comparison on each of its models alone."""
        return [
            dataclasses.replace(
                self, settings=self.settings.model_copy(update={"model": model}), models=[model]
            )
            for model in self.models
        ]

    def resolved(self, **facts: Any) -> str:
        """The same comparison as YAML, nothing left to a default; `facts` are settings known better now."""
        settings = self.settings.model_dump(exclude={"tasks", "policies"}) | facts
        if len(self.models) > 1:
            settings["model"] = self.models
        tasks = [{task.name: dataclasses.asdict(task) | self._until(task)} for task, _ in self.tasks]
        policies = [spec.entry() for spec in self.policies]
        everything = settings | {"tasks": tasks, "policies": policies}
        return dump(everything)

    def _until(self, task: Task) -> dict[str, Any]:
        until = self.rounds.get(without_samples(task))
        return {} if until is None else {"samples": until.model_dump()}

    def check_output(self, folder: Path) -> None:
        """Refuse to read texts from the folder that the run writes to.

        Raises:
            UserError: with the place of every such text.
        """
        own = folder.resolve()
        self.source.refuse(
            [
                Mistake((*loc, parameter), f"lies in the run's own folder {folder}", str(path))
                for task, loc in self.tasks
                for parameter, path in task.files().items()
                if path.resolve().is_relative_to(own)
            ]
        )


def dump(data: Any) -> str:
    """Plain data as YAML that `yaml_source` reads as the same."""
    return yaml.dump(
        data, Dumper=_Plain, sort_keys=False, width=110, default_flow_style=None, allow_unicode=True
    )


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """In quotes where yaml_source would read something else."""
        style = None if unquoted(data) == data else "'"
        return self.represent_scalar("tag:yaml.org,2002:str", data, style)


_Plain.add_representer(str, _Plain.represent_str)


def load(
    path: Path,
    overrides: list[str] | None = None,
    *,
    also: Check | None = None,
    trust_remote_code: bool = False,
    trust_task_code: bool = False,
) -> Config:
    """Read and check a configuration.

    Args:
        path: of the YAML file.
        overrides: `path.to.key=value`, which replace or add one value each.
        also: what else is checked, of the parts that are right by themselves, so that all mistakes are shown
            at once: such as `fit.mistakes`.
        trust_remote_code: the file may ask for code that comes with the checkpoint.
        trust_task_code: the file may name folders with tasks, whose code runs (lm_eval's include_path).

    Raises:
        UserError: with every mistake there is, a line each: `file.yaml:line:column: path: message (got ...)`.
    """
    source = Source(path, overrides)
    if not isinstance(source.data, dict):
        found = "is empty" if source.data is None else "is not a mapping"
        raise UserError(
            f"{path}: {found}; a comparison names a model, tasks and policies: see configs/quickstart.yaml"
        )
    mistakes = source.mistakes
    models, twice = _models(source.data, mistakes)
    # Where a list holds none, that is a mistake already.
    first = {"model": models[0] if models else "none"} if isinstance(source.data.get("model"), list) else {}
    settings = _settings(source.data | first, mistakes, trust_remote_code=trust_remote_code)
    sections = {_meant(key, source.data): key for key in source.data}
    rounds: dict[str, Until] = {}
    read = functools.partial(_read_tasks, rounds=rounds)
    tasks, remarks = without_repetitions(
        read_section(source.data, sections.get("tasks", "tasks"), read, mistakes), repr
    )
    policies, more = without_repetitions(
        read_section(source.data, sections.get("policies", "policies"), _read_policies, mistakes),
        printed_policy,
    )
    if len(tasks) * len(policies) * len(models) > MOST_CELLS:
        on = f" on {len(models)} models" if len(models) > 1 else ""
        what = f"{len(tasks)} tasks x {len(policies)} policies{on} are more than {MOST_CELLS} cells"
        mistakes.append(Mistake((), what))
    for task, loc in tasks:
        mistakes += _files(task, loc, trust_task_code=trust_task_code)
    if also is not None:
        revision = source.data.get("revision")
        named = [name for name in models if wrong_name(name) is None]
        right = Found(named, revision if isinstance(revision, str) else None, tasks, [s for s, _ in policies])
        mistakes += also(right)
    source.refuse(mistakes)
    # Without them there was a mistake.
    assert settings is not None
    lines = [source.describe(remark) for remark in [*twice, *remarks, *more]]
    return Config(source, settings, tasks, [spec for spec, _ in policies], models, rounds, lines)


def without_samples(task: Task) -> str:
    """Equal for tasks that are the same but for the number of their samples."""
    given = {f.name: getattr(task, f.name) for f in dataclasses.fields(task) if f.name != "samples"}
    return repr((task.name, given))


def _read_tasks(
    entry: Any, loc: Loc, mistakes: list[Mistake], rounds: dict[str, Until]
) -> list[tuple[Task, Loc]]:
    """The tasks of an entry; those with a width in place of a number of samples go to `rounds`, too."""
    until = None
    if isinstance(entry, dict) and len(entry) == 1:
        ((name, given),) = entry.items()
        if isinstance(given, dict) and isinstance(given.get("samples"), dict):
            before = len(mistakes)
            values = _values(Until, given["samples"], (*loc, str(name), "samples"), mistakes)
            until = Until(**values) if len(mistakes) == before else None
            entry = {name: given | {"samples": until.at_most if until else 1}}
    found = read_tasks(entry, loc, mistakes)
    if until is not None:
        rounds |= {without_samples(task): until for task, _ in found}
    return found


def _read_policies(entry: Any, loc: Loc, mistakes: list[Mistake]) -> list[tuple[PolicySpec, Loc]]:
    return [(spec, spec.loc) for spec in read_policies(entry, loc, mistakes)]


def _models(data: dict[str, Any], mistakes: list[Mistake]) -> tuple[list[str], list[Mistake]]:
    """The models of a file, each once, and a remark for every one that is named twice."""
    given = data.get("model")
    if not isinstance(given, list):
        if isinstance(given, str) and (why := wrong_name(given)):
            mistakes.append(Mistake(("model",), why, given))
        return [given] if isinstance(given, str) else [], []
    if not given:
        mistakes.append(Mistake(("model",), "an empty list names no model", given))
    places: dict[str, int] = {}
    remarks = []
    for i, one in enumerate(given):
        name = read_value(Annotated[str, pydantic.Field(min_length=1)], one, ("model", i), mistakes)
        if name is NOTHING:
            continue
        if why := wrong_name(name):
            mistakes.append(Mistake(("model", i), why, name))
        if (before := places.setdefault(name, i)) != i:
            remarks.append(Mistake(("model", i), f"the same as model.{before}; it is measured once"))
    models = list(places)
    if len(models) > 1 and data.get("revision") is not None:
        mistakes.append(
            Mistake(("revision",), "is one model's, and there are several: leave it out, or run them apart")
        )
    return models, remarks


def _settings(data: dict[str, Any], mistakes: list[Mistake], *, trust_remote_code: bool) -> Settings | None:
    before = len(mistakes)
    values = _values(Settings, data, (), mistakes)
    if values.get("trust_remote_code") is True and not trust_remote_code:
        message = (
            "runs code that comes with the checkpoint, which a file alone cannot ask for: if you trust it, "
            "give --trust-remote-code on the command line, too"
        )
        mistakes.append(Mistake(("trust_remote_code",), message))
    if values.get("diagnose") and values.get("tensor_parallel") is True:
        message = "needs all heads of the model in one process: leave out tensor_parallel, or diagnose"
        mistakes.append(Mistake(("diagnose",), message))
    return Settings(**values) if len(mistakes) == before else None


def _values(kind: type[_Section], data: dict[str, Any], loc: Loc, mistakes: list[Mistake]) -> dict[str, Any]:
    """The values of a section's fields; NOTHING, and the reason in `mistakes`, for what is wrong."""
    values: dict[str, Any] = {}
    for name, field in kind.model_fields.items():
        if name not in data:
            if field.is_required():
                mistakes.append(Mistake(loc, f"{name} is missing"))
            continue
        given, here = data[name], (*loc, name)
        if field.annotation == Diagnose | None and isinstance(given, dict):
            before = len(mistakes)
            found = _values(Diagnose, given, here, mistakes)
            values[name] = Diagnose(**found) if len(mistakes) == before else NOTHING
        elif name in _SECTIONS and isinstance(given, list) and given:
            values[name] = given
        else:
            limited = Annotated[(field.annotation, *field.metadata)] if field.metadata else field.annotation
            values[name] = read_value(limited, given, here, mistakes)
    for key in data:
        if key not in kind.model_fields:
            mistakes.append(Mistake((*loc, key), unknown("key", shortened(key), kind.model_fields)))
    return values


def wrong_name(path: str) -> str | None:
    """Why no file system takes this path; None if one may."""
    if "\0" in path:
        return "holds the character U+0000"
    if any(len(os.fsencode(part)) > MOST_BYTES_OF_NAME for part in path.split("/")):
        return f"has a name of more than {MOST_BYTES_OF_NAME} bytes"
    return None


def _meant(key: str, data: dict[str, Any]) -> str:
    """The section that a misspelt key means, so that the entries beneath it are checked as well."""
    missing = [name for name in _SECTIONS if name not in data]
    return (difflib.get_close_matches(key[:80], missing, n=1) or [key])[0]


def _files(task: Task, loc: Loc, *, trust_task_code: bool) -> list[Mistake]:
    mistakes = []
    for parameter, path in task.files().items():
        try:
            user_files.check_readable(path, MOST_BYTES_OF_TEXT)
        except UserError as error:
            mistakes.append(Mistake((*loc, parameter), str(error)))
    for parameter, folder in task.code().items():
        if not trust_task_code:
            message = (
                "tasks in a folder of their own run code, which a file alone cannot ask for: if you trust "
                "them, give --trust-task-code on the command line, too"
            )
            mistakes.append(Mistake((*loc, parameter), message, str(folder)))
    return mistakes
