"""Cells: every task under every policy; each is named by a hash of all that its results depend on."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import sys
from collections.abc import Iterable
from fractions import Fraction
from typing import Any

from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from .. import __version__, processes
from ..errors import UserError
from ..hf import parallel
from ..policy import Policy
from ..values import Mistake
from .config import Config
from .tasks import Task


@dataclasses.dataclass(frozen=True)
class Cell:
    """One task under one policy. Samples of equal `id` may be mixed, whoever asked for them."""

    id: str
    task: Task
    policy: Policy
    compression: Fraction | None  # what was asked for, if that is how the policy got its parameters

    @property
    def policy_name(self) -> str:
        return next(iter(self.policy.spec()))

    @property
    def parameters(self) -> str:
        """`r=8 k=64 local=16 ...`"""
        return describe_parameters(self.policy)

    @property
    def label(self) -> str:
        """How a person tells it from its neighbours: `needle 512, sparq 1/8`."""
        how = str(self.compression or describe_parameters(self.policy, changed=True))
        return f"{self.task.title} {self.task.context}, {self.policy_name} {how}".rstrip()

    def record(self) -> dict[str, Any]:
        """What it is, as plain data."""
        return {
            "cell": self.id,
            "task": {self.task.name: _asked(self.task)},
            "policy": self.policy.spec(),
            "compression": None if self.compression is None else str(self.compression),
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


def expand(config: Config, model: PreTrainedModel) -> list[Cell]:
    """The cells of a comparison, in the order of its file.

    Raises:
        UserError: with every mistake that only the model could show: a context beyond its positions, a policy
            that its head size does not allow, a compression that cannot be had.
    """
    mistakes: list[Mistake] = []
    text = model.config.get_text_config(decoder=True)
    size = head_size(model)
    shared = protocol(config, model)
    tasks = []
    for task, loc in config.tasks:
        try:
            sample = task.sample(model.tokenizer, config.settings.seed, 0)
            _check_positions(task, len(sample.prompt) + new_tokens_at_most(sample), text)
            tasks.append(task)
        except UserError as error:
            mistakes.append(Mistake(loc, str(error)))
    cells = []
    for task in tasks:
        for choice in config.policies:
            try:
                policy = choice.build(size, task.context)
                policy.check(size)
            except UserError as error:
                mistakes.append(Mistake(choice.loc, str(error)))
                continue
            cells.append(Cell(_id(task, policy, shared), task, policy, choice.compression))
    config.source.refuse(mistakes)
    return cells


def head_size(model: PreTrainedModel) -> int:
    """Numbers in a key."""
    text = model.config.get_text_config(decoder=True)
    return int(getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)


def new_tokens_at_most(sample: Any) -> int:
    """No tokenizer takes more tokens than bytes."""
    return len(sample.forced) or max(1, len(sample.reference.encode()))


def protocol(config: Config, model: PreTrainedModel) -> dict[str, Any]:
    """What the results of all cells depend on."""
    rare: dict[str, Any] = {"processes": len(processes.gather(0))} if parallel.is_split(model) else {}
    if config.settings.eager:
        rare["eager"] = True  # so does it on this
    return {
        "kvsieve": __version__,
        "model": config.settings.model,
        "revision": getattr(model.config, "_commit_hash", None),
        "weights": weights_digest(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "device": model.device.type,
        "seed": config.settings.seed,
        "batch_size": config.settings.batch_size,  # the speed depends on it
        **rare,
    }


def weights_digest(model: PreTrainedModel) -> str:
    """Twelve hexadecimal digits that tell weights apart; looks at some 64 numbers of each tensor.

    Processes that share a model look at their own shares, and agree.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        if isinstance(tensor, DTensor):
            tensor = tensor.to_local()  # noqa: PLW2901
        some = tensor.detach().flatten()[:: max(1, tensor.numel() // 64)].double().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {some.tolist()}".encode())
    if parallel.is_split(model):
        digest = hashlib.sha256("".join(processes.gather(digest.hexdigest())).encode())
    return digest.hexdigest()[:12]


def _id(task: Task, policy: Policy, shared: dict[str, Any]) -> str:
    parts = {
        "protocol": shared,
        "task": {task.name: _asked(task), "source": task.source(), "code": _code(type(task))},
        "policy": policy.spec(),
        "code": sorted({_code(kind) for kind in _policy_classes(policy)}),
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _asked(task: Task) -> dict[str, Any]:
    """The parameters that a sample depends on; how many there are is none of them."""
    return {name: value for name, value in dataclasses.asdict(task).items() if name != "samples"}


def _policy_classes(policy: Policy) -> list[type]:
    nested = [getattr(policy, field.name) for field in dataclasses.fields(policy)]
    return [type(policy), *(kind for p in nested if isinstance(p, Policy) for kind in _policy_classes(p))]


def _code(cls: type) -> str:
    """A digest of the file that a class is written in: an edited policy gets new results, not old ones."""
    try:
        source = inspect.getsource(sys.modules[cls.__module__])
    except (OSError, TypeError, KeyError):
        source = cls.__qualname__  # typed into an interpreter
    return hashlib.sha256(source.encode()).hexdigest()[:12]


def _check_positions(task: Task, needed: int, text_config: Any) -> None:
    limit = getattr(text_config, "max_position_embeddings", None)
    if limit is not None and needed > limit:
        raise UserError(
            f"context {task.context} needs {needed} positions with its answer, and the model has {limit}: "
            f"the longest context here is {limit - (needed - task.context)}"
        )
