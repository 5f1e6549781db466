"""The configuration of a comparison: one YAML file, checked whole before anything runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

import pydantic
import yaml

from ..errors import UserError, unknown
from .choices import PolicyChoice, read_policies, read_tasks
from .source import Loc, Mistake, Source
from .tasks import Task


class Settings(pydantic.BaseModel):
    """The top level of the file."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, frozen=True, protected_namespaces=())

    model: str = pydantic.Field(min_length=1, description="`reference`, a Hugging Face id, or a local folder")
    revision: str | None = pydantic.Field(None, description="branch, tag or commit on the hub")
    trust_remote_code: bool = pydantic.Field(
        False, description="run model code that comes with the checkpoint"
    )
    dtype: Literal["float32", "bfloat16", "float16", "auto"] | None = pydantic.Field(
        None, description="none: float32 on a CPU, the checkpoint's own elsewhere"
    )
    device: str | None = pydantic.Field(
        None, description="such as cpu or cuda:1; none: the first GPU, else the CPU"
    )
    tensor_parallel: bool = pydantic.Field(
        False, description="share the model among the processes that torchrun starts"
    )
    seed: int = pydantic.Field(0, ge=0, description="of the samples: which text, which numbers")
    batch_size: int = pydantic.Field(1, ge=1, description="prompts decoded together")
    eager: bool = pydantic.Field(
        False, description="run decode steps from Python, on a GPU too, instead of as one CUDA graph"
    )
    tasks: list[Any] = pydantic.Field(min_length=1)
    policies: list[Any] = pydantic.Field(min_length=1)


@dataclasses.dataclass(frozen=True)
class Config:
    """A checked configuration: every task (one context each) meets every policy."""

    source: Source
    settings: Settings
    tasks: list[tuple[Task, Loc]]
    policies: list[PolicyChoice]

    @property
    def name(self) -> str:
        return self.source.path.stem

    def resolved(self, **facts: Any) -> str:
        """The same comparison as YAML, nothing left to a default; `facts` are settings known better now."""
        settings = self.settings.model_dump(exclude={"tasks", "policies"}) | facts
        tasks = [{task.name: dataclasses.asdict(task)} for task, _ in self.tasks]
        policies = [choice.entry() for choice in self.policies]
        everything = settings | {"tasks": tasks, "policies": policies}
        return yaml.dump(everything, Dumper=_Plain, sort_keys=False, width=110, default_flow_style=None)


class _Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def load(path: Path, overrides: list[str] | None = None) -> Config:
    """Read and check a configuration; `overrides` are `path.to.key=value`.

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
    settings = _settings(source.data, mistakes)
    tasks = [
        task for loc, entry in _entries(source.data, "tasks") for task in read_tasks(entry, loc, mistakes)
    ]
    policies = [
        p for loc, entry in _entries(source.data, "policies") for p in read_policies(entry, loc, mistakes)
    ]
    source.refuse(mistakes)
    assert settings is not None  # else there was a mistake
    return Config(source, settings, tasks, policies)


def _settings(data: dict[Any, Any], mistakes: list[Mistake]) -> Settings | None:
    try:
        return Settings.model_validate({str(key): value for key, value in data.items()})
    except pydantic.ValidationError as error:
        for detail in error.errors():
            loc = detail["loc"]
            if detail["type"] == "extra_forbidden":
                mistakes.append(Mistake(loc[:1], unknown("key", loc[0], Settings.model_fields)))
            elif detail["type"] == "missing":
                mistakes.append(Mistake((), f"{loc[0]} is missing"))
            else:
                mistakes.append(Mistake(loc, detail["msg"], detail["input"]))
        return None


def _entries(data: dict[Any, Any], key: str) -> list[tuple[Loc, Any]]:
    entries = data.get(key)
    return [((key, i), entry) for i, entry in enumerate(entries)] if isinstance(entries, list) else []
