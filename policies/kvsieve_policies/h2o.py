"""H2O, heavy-hitter oracle: keep what attention keeps coming back to (arXiv:2306.14048).

The one idea: a few tokens gather most of the attention mass; keep those and the newest, drop the rest for
good.

Mass is summed over all prompt queries and all decode steps. Deviation, as in the SparQ authors' code: with
grouped queries it is averaged over the group and a KV head evicts for all its query heads (the paper has no
groups), and the budget is a number of tokens, not a share of the prompt.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from kvsieve import KVView, Observe, Policy, Ranking, UserError

from . import budgets


@dataclass(frozen=True)
class H2O(Policy):
    """Keeps `budget` tokens per KV head: the newest `recent`, and those with the most attention so far."""

    budget: int = 1024  # tokens kept per KV head, the current one included
    recent: int = 256  # of these the newest, always kept

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "arXiv:2306.14048"
    columns = {"mass": torch.float32}
    observes = Observe.MASS
    adds_mass_to = "mass"

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise UserError(f"h2o.budget must be at least 1 token, not {self.budget}")
        if not 1 <= self.recent <= self.budget:
            raise UserError(f"h2o.recent must be from 1 to budget = {self.budget}, not {self.recent}")

    @property
    def keeps(self) -> int:
        return self.budget

    def priority(self, kv: KVView) -> Ranking:
        return Ranking(kv["mass"], newest=self.recent)

    @classmethod
    def for_compression(cls, ratio: float, head_size: int, context: int) -> Self:
        tokens = budgets.kept("h2o", ratio, head_size, context)
        return cls.for_tokens(tokens, head_size, context)

    @classmethod
    def for_memory(cls, share: float, head_size: int, context: int, itemsize: int = 2) -> Self:
        tokens = budgets.held("h2o", share, head_size, context, itemsize, column=4)
        return cls.for_tokens(tokens, head_size, context)

    @classmethod
    def for_tokens(cls, tokens: int, head_size: int, context: int) -> Self:
        return cls(budget=tokens, recent=max(1, tokens // 4))
