"""Cells: every task under every policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

from transformers import PreTrainedModel

from ..entries import Budget
from ..errors import UserError
from ..policy import Policy
from ..values import Mistake
from . import identity
from .config import Config
from .tasks import Task


@dataclasses.dataclass(frozen=True)
class Cell:
    """One task under one policy. Samples of equal `id` may be mixed, whoever asked for them."""

    id: str
    task: Task
    policy: Policy
    budget: Budget | None  # what was asked for, if that is how the policy got its parameters

    @property
    def policy_name(self) -> str:
        return next(iter(self.policy.spec()))

    @property
    def parameters(self) -> str:
        """`r=8 k=64 local=16 ...`"""
        return describe_parameters(self.policy)

    @property
    def label(self) -> str:
        """A name that tells it from its neighbours: `needle 512, sparq 1/8`."""
        how = str(self.budget or describe_parameters(self.policy, changed=True))
        return f"{self.task.title} {self.task.context}, {self.policy_name} {how}".rstrip()

    def record(self) -> dict[str, Any]:
        """The fields of a sample's record that name its cell, as plain data."""
        return {
            "cell": self.id,
            "task": {self.task.name: identity.task_parameters(self.task)},
            "policy": self.policy.spec(),
            "budget": None if self.budget is None else str(self.budget),
        }


def describe_parameters(policy: Policy, *, changed: bool = False, only: Iterable[str] | None = None) -> str:
    """`r=8 k=64 local=16`: all parameters, those that are not the defaults, or those in `only`."""

    def plain(value: Any) -> str:
        if isinstance(value, Policy):
            inner = describe_parameters(value, changed=changed)
            return f"{next(iter(value.spec()))}({inner})" if inner else next(iter(value.spec()))
        if isinstance(value, list | tuple):
            return "[" + ",".join(map(plain, value)) + "]"
        return str(value).lower() if isinstance(value, bool) else str(value)

    fields = dataclasses.fields(policy)
    if only is not None:
        fields = tuple(field for field in fields if field.name in set(only))
    if changed:
        fields = tuple(field for field in fields if getattr(policy, field.name) != _default(field))
    return " ".join(f"{field.name}={plain(getattr(policy, field.name))}" for field in fields)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def expand(config: Config, model: PreTrainedModel, shared: identity.Fields | None = None) -> list[Cell]:
    """The cells of a comparison, in the order of its file.

    Args:
        shared: `identity.shared_fields(config, model)`, where they are known.

    Raises:
        UserError: with every mistake that only the model could show: a context beyond its positions, a policy
            that its head size does not allow, a compression that cannot be had.
    """
    mistakes: list[Mistake] = []
    text = model.config.get_text_config(decoder=True)
    size = head_size(model)
    shared = identity.shared_fields(config, model) if shared is None else shared
    tasks = []
    for task, loc in config.tasks:
        try:
            sample = task.sample(model.tokenizer, config.settings.seed, 0)
            _check_positions(task, len(sample.prompt) + sample.limit, text)
            tasks.append(task)
        except UserError as error:
            mistakes.append(Mistake(loc, str(error)))
    cells = []
    for task in tasks:
        for choice in config.policies:
            try:
                policy = choice.build(size, task.context, model.dtype.itemsize)
                policy.check(size)
            except UserError as error:
                mistakes.append(Mistake(choice.loc, str(error)))
                continue
            found = identity.identify(identity.fields(task, policy, shared))
            cells.append(Cell(found, task, policy, choice.budget))
    config.source.refuse(mistakes)
    return cells


def head_size(model: PreTrainedModel) -> int:
    """Channels per head."""
    text = model.config.get_text_config(decoder=True)
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def _check_positions(task: Task, needed: int, text_config: Any) -> None:
    limit = getattr(text_config, "max_position_embeddings", None)
    if limit is not None and needed > limit:
        raise UserError(
            f"context {task.context} needs {needed} positions with its answer, and the model has {limit}: "
            f"the longest context here is {limit - (needed - task.context)}"
        )
