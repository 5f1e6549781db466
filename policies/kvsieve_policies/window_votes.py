"""Votes of the last prompt queries: what SnapKV, PyramidKV and AdaKV have in common.

The window's queries say which earlier tokens they attend to; their weights, averaged or maximised over the
query group and pooled over neighbouring tokens, rank the past of each KV head.
"""

from dataclasses import dataclass
from typing import Literal, Self

import torch
import torch.nn.functional as F

from kvsieve import KVView, Policy, UserError, ops

from . import budgets


@dataclass(frozen=True)
class WindowVotes(Policy):
    """Abstract: the parameters and the votes. A method adds `cut`: how many of the past each head keeps."""

    budget: int = 1024  # tokens kept of the prompt per KV head, the window included
    window: int = 32  # of these the newest, always kept; their queries vote
    kernel: int = 7  # neighbouring tokens pooled
    pooling: Literal["avg", "max"] = "avg"
    group: Literal["mean", "max"] = "mean"  # of the votes of the query heads of a group, before pooling

    overwrites = False

    def __post_init__(self) -> None:
        if self.window < 1:
            raise UserError(f"{self.name}.window must be at least 1 token, not {self.window}")
        if self.budget <= self.window:
            raise UserError(
                f"{self.name}.budget must be larger than the window of {self.window} tokens, which it "
                f"counts, not {self.budget}"
            )
        if self.kernel < 1 or self.kernel % 2 == 0:
            raise UserError(f"{self.name}.kernel must be an odd number of tokens, not {self.kernel}")
        if self.pooling not in ("avg", "max"):
            raise UserError(f"{self.name}.pooling must be 'avg' or 'max', not {self.pooling!r}")
        if self.group not in ("mean", "max"):
            raise UserError(f"{self.name}.group must be 'mean' or 'max', not {self.group!r}")

    @property
    def last_queries(self) -> int:
        return self.window

    @classmethod
    def for_compression(cls, ratio: float, head_size: int, context: int) -> Self:
        """Keep `ratio * context` tokens of the prompt; what is generated comes on top."""
        tokens = budgets.kept(cls.name, ratio, head_size, context, fewest=2)
        return cls.for_tokens(tokens, head_size, context)

    @classmethod
    def for_memory(cls, share: float, head_size: int, context: int, itemsize: int = 2) -> Self:
        tokens = budgets.held(cls.name, share, head_size, context, itemsize, fewest=2)
        return cls.for_tokens(tokens, head_size, context)

    @classmethod
    def for_tokens(cls, tokens: int, head_size: int, context: int) -> Self:
        return cls(budget=tokens, window=max(1, min(32, tokens // 2)))

    def _votes(self, kv: KVView) -> torch.Tensor:
        """`[B, K, T]`: the pooled votes for the tokens before the window; -inf elsewhere."""
        weights = ops.window_weights(kv)
        weights = weights.mean(2) if self.group == "mean" else weights.amax(2)
        before = kv.live() & ~kv.newest(self.window)
        pool = F.avg_pool1d if self.pooling == "avg" else F.max_pool1d
        pooled = pool(weights.masked_fill(~before, 0), self.kernel, stride=1, padding=self.kernel // 2)
        return pooled.masked_fill(~before, -torch.inf)

    def _best(self, kv: KVView, votes: torch.Tensor, counts: torch.Tensor | int) -> torch.Tensor:
        """`[B, K, T]` bool: the window, and the `counts [B, K]` tokens before it with the most votes.

        Of equal ones the oldest.
        """
        order = votes.argsort(dim=2, descending=True, stable=True)
        counts = torch.as_tensor(counts, device=votes.device).expand(kv.lengths.shape)
        among = torch.arange(votes.shape[2], device=votes.device) < counts[..., None]
        best = torch.zeros_like(among).scatter_(2, order, among) & (votes > -torch.inf)
        return best | kv.newest(self.window)
