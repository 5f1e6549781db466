"""Local window with attention sinks: StreamingLLM (arXiv:2309.17453), LM-Infinite (arXiv:2308.16137).

The one idea: the newest tokens and the very first ones carry most of the attention, so keep only those.

Deviation: tokens keep the positions they had in the text, as in the SparQ paper's comparison; the papers
re-index them (StreamingLLM) or clamp distances (LM-Infinite), which matters beyond the trained context only.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

from kvsieve import KVView, Policy, Ranking, UserError

from . import budgets


@dataclass(frozen=True)
class LocalWindow(Policy):
    """Keeps the first `sinks` tokens and the newest `budget - sinks`, for good."""

    budget: int = 1024  # tokens kept per KV head, the current one included
    sinks: int = 16  # of these the first of the row

    name: ClassVar[str] = "local_window"
    paper: ClassVar[str] = "arXiv:2308.16137"

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise UserError(f"local_window.budget must be at least 1 token, not {self.budget}")
        if not 0 <= self.sinks < self.budget:
            raise UserError(
                f"local_window.sinks must be from 0 to budget - 1 = {self.budget - 1}, not {self.sinks}"
            )

    @property
    def keeps(self) -> int:
        return self.budget

    def priority(self, kv: KVView) -> Ranking:
        return Ranking(kv.positions, oldest=self.sinks)

    @classmethod
    def for_compression(cls, ratio: float, head_size: int, context: int) -> Self:
        tokens = budgets.kept("local_window", ratio, head_size, context)
        return cls.for_tokens(tokens, head_size, context)

    @classmethod
    def for_memory(cls, share: float, head_size: int, context: int, itemsize: int = 2) -> Self:
        tokens = budgets.held("local_window", share, head_size, context, itemsize)
        return cls.for_tokens(tokens, head_size, context)

    @classmethod
    def for_tokens(cls, tokens: int, head_size: int, context: int) -> Self:
        return cls(budget=tokens, sinks=min(16, tokens // 4))
