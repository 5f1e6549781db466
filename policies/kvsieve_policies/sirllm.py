"""SirLLM: through a conversation without end, remember what came unexpected (arXiv:2405.12528).

The one idea: a token is worth keeping if the model did not see it coming, by -log P(token | those before it).
Before a turn is read the cache is cut, so that it holds `sinks + surprising + recent` tokens with the turn:
the first ones, the most surprising ones, and, in the places that are left, the newest. Old surprise fades by
`decay` with every turn. Positions are places in the cache, as in StreamingLLM.

A segment is a turn (`decode(..., segments=...)`): text in one segment is kept whole. Within a turn, and while
generating, nothing is dropped.

Choices: surprise is the paper's. The authors' code is one off: it gives every token the surprise of its
predecessor coming twice, and a turn's first token the largest of the turn. Here a turn's first token has its
own, from the last logits of the turn before; the first token of all has the largest of its turn. As in the
code, what a turn takes is taken from the surprising ones, and the sinks are among the tokens that are ranked.
Where a turn leaves no room at all, the sinks stay, or one token. Generated tokens have their surprise, too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from kvsieve import KVView, NewTokens, Pass, Policy, Positions, UserError, Wants

from . import budgets


@dataclass(frozen=True)
class SirLLM(Policy):
    """Holds `sinks + surprising + recent` tokens of a conversation, a coming turn included."""

    sinks: int = 4  # the first of the row, always kept
    surprising: int = 1020  # those with the largest -log P
    recent: int = 0  # the newest
    decay: float = 1.0  # of the surprise of what is held, at every turn

    name: ClassVar[str] = "sirllm"
    paper: ClassVar[str] = "arXiv:2405.12528"
    drops_by = ("sinks", "surprising", "recent")
    columns = {"surprise": torch.float32}
    positions = Positions.CACHE
    wants = Wants.SURPRISE

    def __post_init__(self) -> None:
        for field, least in (("sinks", 0), ("surprising", 1), ("recent", 0)):
            if getattr(self, field) < least:
                raise UserError(f"sirllm.{field} must be at least {least}, not {getattr(self, field)}")
        if not 0 < self.decay <= 1:
            raise UserError(f"sirllm.decay must be above 0 and at most 1, not {self.decay:g}")

    def plan(self, segments: Sequence[int]) -> Sequence[Pass]:
        size, passes, first = self.sinks + self.surprising + self.recent, [], 0
        for turn in segments:
            room = None if first == 0 else max(size - turn, self.sinks, 1)
            passes.append(Pass(first, first + turn, room=room))
            first += turn
        return passes

    def on_surprise(self, kv: KVView, surprise: torch.Tensor, new: NewTokens) -> None:
        if kv.steps == 0:  # a prompt
            token = kv.seen - new.counts  # a turn may come in pieces
            turn, end = kv.span.unbind(1)
            fade = torch.where((token == turn) & (new.counts > 0), self.decay, 1.0)
            kv["surprise"] = kv["surprise"] * fade[:, None, None]
        kv.write("surprise", new, surprise.nan_to_num(0.0)[:, None].expand(new.slots.shape))
        if kv.steps == 0:
            most = surprise.nan_to_num(0.0).amax(1).masked_fill((turn > 0) | (token >= end), 0)
            held = kv["surprise"]
            held[:, :, 0] = torch.maximum(held[:, :, 0], most[:, None])

    def priority(self, kv: KVView) -> torch.Tensor:
        surprise = kv["surprise"].masked_fill(~kv.live(), -torch.inf)
        rank = surprise.argsort(dim=2, descending=True, stable=True).argsort(dim=2)
        chosen = rank < (kv.room - self.sinks - self.recent)[:, None, None]
        newest_first = kv.positions.float()
        return newest_first.masked_fill(chosen, 1e30).masked_fill(kv.oldest(self.sinks), torch.inf)

    @classmethod
    def for_compression(cls, ratio: float, head_size: int, context: int) -> Self:
        """Hold `ratio * context` tokens of a conversation; what is generated comes on top."""
        tokens = budgets.kept("sirllm", ratio, head_size, context, fewest=2)
        return cls.for_tokens(tokens, head_size, context)

    @classmethod
    def for_memory(cls, share: float, head_size: int, context: int, itemsize: int = 2) -> Self:
        tokens = budgets.held("sirllm", share, head_size, context, itemsize, column=4)
        return cls.for_tokens(tokens, head_size, context)

    @classmethod
    def for_tokens(cls, tokens: int, head_size: int, context: int) -> Self:
        sinks = min(4, tokens - 1)
        return cls(sinks=sinks, surprising=tokens - sinks)
