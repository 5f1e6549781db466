"""TOVA, token omission via attention: drop what the last query looks at least (arXiv:2401.06104).

The one idea: a transformer is an RNN whose state is its cache; keep the state small by dropping, at every
step, the token with the lowest attention weight from the newest query, averaged over all heads of the layer.

As in the authors' code, all KV heads of a layer hold the same tokens, neither the first nor the newest one
is protected, and a prompt is cut once, when it is complete, by its last query. Choice: `budget` counts the
current token; the authors hold C tokens between steps and read C + 1, so their C is `budget - 1`.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from kvsieve import KVView, Observe, Policy, UserError, ops

from . import budgets


@dataclass(frozen=True)
class TOVA(Policy):
    """Keeps the `budget` tokens that the last query attends to most."""

    budget: int = 1024  # tokens kept per KV head, the current one included

    name: ClassVar[str] = "tova"
    paper: ClassVar[str] = "arXiv:2401.06104"
    columns = {"weight": torch.float32}  # of the last query
    observes = Observe.STEP_MASS
    last_queries = 1

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise UserError(f"tova.budget must be at least 1 token, not {self.budget}")

    @property
    def keeps(self) -> int:
        return self.budget

    def on_prefill(self, kv: KVView) -> None:
        self.on_attend(kv, ops.window_weights(kv).mean(2))

    def on_attend(self, kv: KVView, mass: torch.Tensor) -> None:
        kv["weight"] = kv.all_heads(mass).mean(1, keepdim=True).expand_as(mass)

    def priority(self, kv: KVView) -> torch.Tensor:
        return kv["weight"]

    @classmethod
    def for_compression(cls, ratio: float, head_size: int, context: int) -> Self:
        tokens = budgets.kept("tova", ratio, head_size, context)
        return cls.for_tokens(tokens, head_size, context)

    @classmethod
    def for_memory(cls, share: float, head_size: int, context: int, itemsize: int = 2) -> Self:
        tokens = budgets.held("tova", share, head_size, context, itemsize, column=4)
        return cls.for_tokens(tokens, head_size, context)

    @classmethod
    def for_tokens(cls, tokens: int, head_size: int, context: int) -> Self:
        return cls(budget=tokens)
