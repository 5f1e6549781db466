"""Expected Attention: keep what future queries are expected to attend to (arXiv:2510.00636).

The one idea: queries before RoPE are nearly normally distributed. From the mean and covariance of the
prompt's queries follows, in closed form, the weight that a key can expect from the queries of the next
`future` positions.

The statistics are gathered while the prompt is read, query head by query head; no query is remembered.
Choices, as in the authors' code (kvpress): the rotations of the future positions are averaged before they
are applied, to the mean and to both sides of the covariance; the first `sinks` tokens always stay and
neither their queries nor their keys count; a query group agrees on the mean of its heads' softmaxes; the
norms of the values weigh it. `epsilon` is added to a score before that. `budget` counts the sinks; generated
tokens come on top, for good (the authors compress again while decoding, too). Logits are scaled as the model
does, not by `D ** -0.5`.

In a conversation the statistics are those of the last turn.
"""

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from kvsieve import KVView, NewTokens, Policy, Positions, UserError

from . import budgets

_AT_ONCE = 4096  # queries


@dataclass(frozen=True)
class ExpectedAttention(Policy):
    """Keeps the first `sinks` tokens and those with the highest expected attention; then the cache grows."""

    budget: int = 1024  # tokens kept of the prompt per KV head, the sinks included
    future: int = 512  # positions behind the prompt that are expected
    sinks: int = 4
    covariance: bool = True  # count the spread of the queries, not their mean alone
    value_norm: bool = True
    epsilon: float = 0.0

    name: ClassVar[str] = "expected_attention"
    paper: ClassVar[str] = "arXiv:2510.00636"
    overwrites = False
    positions = Positions.OWN

    def __post_init__(self) -> None:
        if not 0 <= self.sinks < self.budget:
            raise UserError(
                f"expected_attention.sinks must be from 0 to budget - 1 = {self.budget - 1}, not {self.sinks}"
            )
        if self.future < 1:
            raise UserError(f"expected_attention.future must be at least 1 position, not {self.future}")
        if self.epsilon < 0:
            raise UserError(f"expected_attention.epsilon must be 0 or more, not {self.epsilon}")

    @property
    def keeps(self) -> int:
        return self.budget

    def on_queries(self, kv: KVView, queries: torch.Tensor, new: NewTokens) -> None:
        for first in range(0, queries.shape[3], _AT_ONCE):
            part = queries[:, :, :, first : first + _AT_ONCE]
            token = torch.arange(first, first + part.shape[3], device=part.device)
            position = (kv.seen - new.counts)[:, None] + token
            counted = (token < new.counts[:, None]) & (position >= self.sinks)
            before = kv.turned(part, -position[:, None, None])
            self._gather(kv.notes, before, counted)

    def _gather(self, notes: dict[str, torch.Tensor], queries: torch.Tensor, counted: torch.Tensor) -> None:
        """Update count `[B]`, mean `[B, K, G, D]` and the sum of squares around it `[B, K, G, D, D]`."""
        counted = counted[:, None, None, :, None]
        queries = queries.masked_fill(~counted, 0)
        many = counted.sum(3).float()
        mean = queries.sum(3) / many.clamp(min=1)
        centred = (queries - mean[..., None, :]).masked_fill(~counted, 0)
        squares = centred.mT @ centred
        if notes:
            held, apart = notes["count"], mean - notes["mean"]
            total = (held + many).clamp(min=1)
            mean = notes["mean"] + apart * many / total
            outer = apart[..., None] * apart[..., None, :]
            squares = notes["squares"] + squares + outer * (held * many / total)[..., None]
            many = held + many
        notes.update(count=many, mean=mean, squares=squares)

    def cut(self, kv: KVView) -> torch.Tensor:
        sinks = kv.oldest(self.sinks)
        rest = kv.live() & ~sinks
        scores = self._scores(kv, rest).masked_fill(~rest, -torch.inf)
        order = scores.argsort(dim=2, descending=True, stable=True)
        among = (torch.arange(order.shape[2], device=order.device) < self.budget - self.sinks).expand_as(
            order
        )
        return sinks | torch.zeros_like(rest).scatter_(2, order, among) & rest

    def _scores(self, kv: KVView, rest: torch.Tensor) -> torch.Tensor:
        """`[B, K, T]`: the expected attention among `rest`."""
        count, mean, squares = (kv.notes[name] for name in ("count", "mean", "squares"))
        turn = self._mean_turn(kv)
        mean = mean @ turn[:, None]
        spread = turn.mT[:, None, None] @ (squares / count.clamp(min=1)[..., None]) @ turn[:, None, None]
        keys, expected = kv.keys.float(), torch.zeros_like(rest, dtype=torch.float32)
        for g in range(mean.shape[2]):
            logits = (keys @ mean[:, :, g, :, None])[..., 0] * kv.scale
            if self.covariance:
                logits = logits + ((keys @ spread[:, :, g]) * keys).sum(-1) * (kv.scale**2 / 2)
            expected += logits.masked_fill(~rest, torch.finfo(torch.float32).min).softmax(-1) / mean.shape[2]
        if self.value_norm:
            expected = (expected + self.epsilon) * kv.values.float().norm(dim=-1)
        return expected

    def _mean_turn(self, kv: KVView) -> torch.Tensor:
        """The mean rotation `[B, D, D]` to the next `future` positions; row i is the image of channel i."""
        device = kv.seen.device
        channels, ahead = torch.eye(kv.head_size, device=device), torch.arange(self.future, device=device)
        mean = kv.turned(channels, ahead[:, None]).mean(0)
        return kv.turned(mean, kv.seen[:, None])

    @classmethod
    def for_compression(cls, ratio: float, head_size: int, context: int) -> Self:
        """Keep `ratio * context` tokens of the prompt; what is generated comes on top."""
        tokens = budgets.kept("expected_attention", ratio, head_size, context)
        return cls.for_tokens(tokens, head_size, context)

    @classmethod
    def for_memory(cls, share: float, head_size: int, context: int, itemsize: int = 2) -> Self:
        tokens = budgets.held("expected_attention", share, head_size, context, itemsize)
        return cls.for_tokens(tokens, head_size, context)

    @classmethod
    def for_tokens(cls, tokens: int, head_size: int, context: int) -> Self:
        return cls(budget=tokens, sinks=min(4, tokens - 1))
