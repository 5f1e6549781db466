"""Layers with a sliding window, or with chunks: what a token sees of them, and a policy inside.

A window is the rule of a local window: the newest `size` tokens stay, and a new one overwrites the oldest.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch

from ..errors import UserError
from ..policy import Paged, Policy, Positions, Ranking
from ..wrapper import Wrapper

if TYPE_CHECKING:
    from .kv import KVView


class Window(NamedTuple):
    """A token sees itself and the `size - 1` before it; or, of `chunks` of `size`, its own up to itself."""

    size: int
    chunks: bool = False

    def first(self, tokens: torch.Tensor) -> torch.Tensor:
        """The first token that each of these sees, all counted within their row from 0."""
        if self.chunks:
            return tokens - tokens % self.size
        return (tokens - (self.size - 1)).clamp(min=0)


@dataclass(frozen=True)
class Windowed(Wrapper):
    """`inner` in a layer with a window: what no token to come sees does not stay, whatever `inner` says.

    Raises:
        UserError: `inner` needs the tokens in their order, or decides at the end of a prompt who stays for
            good: neither goes with a window that moves on.
    """

    inner: Policy
    window: Window

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.inner.name)  # by which messages name it
        if why := next(_unfit(self.inner), None):
            raise UserError(
                f"{why}, and cannot act inside a sliding window, where every new token overwrites one: leave "
                "the windows dense, or use a policy that selects in any order of slots (such as sparq), or "
                "one that keeps a budget by `priority` (such as h2o)"
            )

    @property
    def keeps(self) -> int:
        """The window, or fewer where `inner` keeps fewer."""
        return min(self.window.size, self.inner.keeps or self.window.size)

    def priority(self, kv: KVView) -> torch.Tensor | Ranking:
        """Rank lowest the token that no token to come sees."""
        if self.inner.keeps is None:
            return Ranking(kv.positions)
        ranks = self.inner.priority(kv)
        if isinstance(ranks, Ranking):
            ranks = ranks.priority(kv)
        return ranks.masked_fill(~self._seen(kv), -torch.inf)

    def cut(self, kv: KVView) -> torch.Tensor | None:
        """Choose the `keeps` best by priority of those that the last token sees; None: it sees them all."""
        if self.inner.keeps is None and not self.window.chunks:
            return None
        ranking = self.priority(kv)
        ranks = ranking.priority(kv) if isinstance(ranking, Ranking) else ranking
        best = ranks.masked_fill(~kv.live(), -torch.inf).topk(min(self.keeps, ranks.shape[2]), dim=2).indices
        return self._seen(kv) & torch.zeros_like(ranks, dtype=torch.bool).scatter_(2, best, True)

    def _seen(self, kv: KVView) -> torch.Tensor:
        """`[B, K, T]` bool: slots that the newest token sees."""
        return kv.live() & (kv.positions >= self.window.first(kv.seen - 1)[:, None, None])


def _unfit(policy: Policy) -> Iterator[str]:
    """Why a policy cannot act inside a window."""
    own = {"cut", "cut_together", "keeps_per_head", "plan"}
    if isinstance(policy, Wrapper):
        yield from _unfit(policy.inner)
    for name in sorted(own):
        if getattr(type(policy), name) not in (getattr(Policy, name), getattr(Wrapper, name)):
            yield f"policy {policy.name} has a `{name}` of its own"
    if policy.positions is not Positions.TEXT:
        yield f"policy {policy.name} goes by positions of its own"
    if policy.keeps is not None and not policy.overwrites:
        yield f"policy {policy.name} keeps tokens of a prompt and overwrites none"
    if any(isinstance(column, Paged) for column in policy.columns.values()) or not policy.any_order:
        yield f"policy {policy.name} goes by the order of slots (it does not declare `any_order`)"
