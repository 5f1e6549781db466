"""AdaKV: heads share one pool, and take from it what they need (arXiv:2407.11550).

The one idea: some heads attend to few tokens, others to many. Rank the tokens of all KV heads of a layer
together, by SnapKV's votes; a head's share of the winners is its budget, blended with a floor so that none
starves.

Choices, after the authors' code (FFY0/AdaKV with `gqa_support`):

- `budget` is the average per KV head, the window included; the window is kept in every head on top of its
  share.
- The floor is a blend: share = round((1 - floor) * winners + floor * (budget - window)), head by head;
  rounding loses or gains single tokens of the pool. kvpress' safeguard is a minimum instead.
- `normalize` weighs a head's votes by how many of them its own best `budget - window` tokens hold.
- A prompt that fits into the budget is kept whole.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvsieve import KVView, UserError

from .window_votes import WindowVotes


@dataclass(frozen=True)
class AdaKV(WindowVotes):
    """Keeps, on average over the KV heads of a layer, `budget` tokens; then the cache grows."""

    floor: float = 0.2  # the part of the budget that is shared out evenly
    normalize: bool = False

    name: ClassVar[str] = "adakv"
    paper: ClassVar[str] = "arXiv:2407.11550"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.floor <= 1:
            raise UserError(f"adakv.floor must be from 0 to 1, not {self.floor}")

    def cut(self, kv: KVView) -> torch.Tensor:
        votes = self._votes(kv)
        shares = self._shares(kv.all_heads(votes, pad=-torch.inf))
        return self._best(kv, votes, shares[:, kv.heads.start : kv.heads.stop])

    def _shares(self, votes: torch.Tensor) -> torch.Tensor:
        """Tokens before the window that each head keeps, `[B, K]`."""
        (_, heads, slots), average = votes.shape, self.budget - self.window
        before = (votes > -torch.inf).sum(2)
        if self.normalize:
            ordered = votes.clamp(min=0).sort(2, descending=True).values
            tiny = torch.finfo(votes.dtype).tiny
            held = ordered[..., :average].sum(2) / ordered.sum(2).clamp(min=tiny)
            votes = votes.masked_fill(votes == -torch.inf, -1) * held[..., None]
        winners = votes.flatten(1).topk(heads * min(average, slots), dim=1).indices // slots
        won = torch.zeros_like(before).scatter_add_(1, winners, torch.ones_like(winners))
        shares = torch.round(won * (1 - self.floor) + int(average * self.floor)).long()
        all_fit = before.sum(1, keepdim=True) < heads * average
        return torch.where(all_fit, before, shares)
