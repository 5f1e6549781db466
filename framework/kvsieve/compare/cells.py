"""Cells: every task under every policy."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection
from typing import Any

from transformers import PreTrainedModel

from ..entries import Budget
from ..errors import UserError
from ..policy import Policy
from ..specs import PolicySpec
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
    # What the file asks for, where one does: the same at every context.
    asked: PolicySpec | None = dataclasses.field(default=None, compare=False)

    @property
    def budget(self) -> Budget | None:
        """The budget that was asked for, if that is how the policy got its parameters."""
        return None if self.asked is None else self.asked.budget

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
        return f"{self.task.title} {self.task.context}, {self.policy_name} {self.how}".rstrip()

    @property
    def how(self) -> str:
        """The budget that was asked for, or the parameters that are not the defaults: at any context."""
        if self.asked is not None and self.asked.needs_context:
            return describe_asked(self.asked, only=() if self.budget else None)
        return describe_parameters(self.policy, changed=True)

    def record(self) -> dict[str, Any]:
        """The fields of a sample's record that name its cell, as plain data."""
        return {
            "cell": self.id,
            "task": {self.task.name: identity.task_parameters(self.task)},
            "policy": self.policy.spec(),
            "budget": None if self.budget is None else str(self.budget),
        }


def describe_parameters(policy: Policy, *, changed: bool = False) -> str:
    """`r=8 k=64 local=16`: all parameters, or those that are not the defaults."""

    def plain(value: Any) -> str:
        if not isinstance(value, Policy):
            return _plain(value, plain)
        return _nested(next(iter(value.spec())), describe_parameters(value, changed=changed))

    fields = dataclasses.fields(policy)
    if changed:
        fields = tuple(field for field in fields if getattr(policy, field.name) != _default(field))
    return " ".join(f"{field.name}={plain(getattr(policy, field.name))}" for field in fields)


def describe_asked(asked: PolicySpec, *, only: Collection[str] | None = None) -> str:
    """`1/8 layout=double`, `layers=[0] inner=sparq(1/8)`: the budget, and of the parameters beside it those
    that are not the defaults, or those in `only`; not what follows from a budget, and so from the context.
    """

    def plain(value: Any) -> str:
        if isinstance(value, PolicySpec):
            return _nested(value.name, describe_asked(value))
        if isinstance(value, Policy):
            return _nested(next(iter(value.spec())), describe_parameters(value, changed=True))
        return _plain(value, plain)

    given = asked.parameters
    told = [
        f"{field.name}={plain(given[field.name])}"
        for field in dataclasses.fields(asked.cls)
        if field.name in given
        and (given[field.name] != _default(field) if only is None else field.name in only)
    ]
    return " ".join([*([str(asked.budget)] if asked.budget else []), *told])


def _plain(value: Any, plain: Callable[[Any], str]) -> str:
    if isinstance(value, list | tuple):
        return "[" + ",".join(map(plain, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _nested(name: str, how: str) -> str:
    return f"{name}({how})" if how else name


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
            cells.append(Cell(found, task, policy, choice))
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
