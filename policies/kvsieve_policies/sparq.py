"""SparQ Attention: guess which tokens matter from a few channels of the keys, read those whole
(arXiv:2312.04985).

The one idea: the largest |q| components dominate q.k. Read only those r channels of every key, take the k
tokens with the highest approximate scores, attend to them exactly, and let the mean value stand for all the
others, weighted with the approximate attention that they hold.

Deviations: k and local count the current token (in the authors' code it comes on top of both). `group_score`
says how
the approximate scores of the query heads in a group are added up to rank tokens: "softmax", as the paper
writes, or "logits", as the authors' code does. `mean_value_limit` is ours: with small k the approximate
attention can miss so much that the mean value drowns the tokens read, and the model repeats itself; 1 is the
paper's, less guards against that.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch

from kvsieve import KeyLayout, KVView, NewTokens, Policy, Selection, Shape, Tail, UserError, ops

from . import budgets


@dataclass(frozen=True)
class SparQ(Policy):
    """Reads r channels of all keys, then k tokens whole."""

    r: int = 32  # key channels read to guess
    k: int = 128  # tokens read whole, the current one included
    local: int = 32  # of these the newest, always read
    mean_value: bool = True  # let the mean value stand for the tokens not read
    group_score: Literal["softmax", "logits"] = "softmax"
    mean_value_limit: float = 1.0  # the mean value's largest weight
    # Of the keys: speed and memory, not results. "auto" is "double" on a CPU, else "blocked".
    layout: Literal["auto", "single", "double", "blocked"] = "auto"
    block: int = 16  # tokens in a block of layout "blocked"

    name: ClassVar[str] = "sparq"
    paper: ClassVar[str] = "arXiv:2312.04985"
    any_order = True

    def __post_init__(self) -> None:
        for field in ("r", "k"):
            if getattr(self, field) < 1:
                raise UserError(f"sparq.{field} must be at least 1, not {getattr(self, field)}")
        if not 0 <= self.local <= self.k:
            raise UserError(f"sparq.local must be from 0 to k = {self.k}, not {self.local}")
        if not 0 <= self.mean_value_limit <= 1:
            raise UserError(f"sparq.mean_value_limit must be from 0 to 1, not {self.mean_value_limit}")
        if self.group_score not in ("softmax", "logits"):
            raise UserError(f"sparq.group_score must be 'softmax' or 'logits', not {self.group_score!r}")
        KeyLayout(self.layout, self.block)  # raises UserError for what is none

    @property
    def summaries(self) -> Mapping[str, Shape]:
        return {"mean_value": (torch.float32, "D")} if self.mean_value else {}

    @property
    def key_layout(self) -> KeyLayout:
        return KeyLayout(self.layout, self.block)

    def in_layout(self, layout: KeyLayout) -> Self:
        return replace(self, layout=layout.kind, block=layout.block)

    def check(self, head_size: int) -> None:
        if self.r > head_size:
            raise UserError(f"sparq.r is {self.r}, but this model's heads have only {head_size} channels")

    def on_append(self, kv: KVView, new: NewTokens) -> None:
        if self.mean_value:
            ops.running_mean(kv, "mean_value", new)

    def select(self, query: torch.Tensor, kv: KVView) -> Selection | None:
        if kv.slots_in_use <= self.k:
            return None  # nothing to leave out
        channels = ops.top_channels(query, self.r)
        slots, counts, missed = ops.top_by_channels(
            query, kv, channels, self.k, newest=self.local, group_score=self.group_score
        )
        if not self.mean_value:
            return Selection(slots, counts)
        if self.mean_value_limit < 1:
            missed = missed.clamp(max=self.mean_value_limit)
        return Selection(slots, counts, Tail(missed, kv["mean_value"]))

    @classmethod
    def for_compression(cls, ratio: float, head_size: int, context: int) -> Self:
        """Spend half of the bytes on the guess and half on the tokens, as the authors do.

        So r = D * ratio and k = T * ratio / 2. Where a channel or a token is more than its half, the other
        half is what that leaves.
        """
        r, k = round(head_size * ratio), round(context * ratio / 2)
        if min(head_size * ratio, context * ratio / 2) < 1:
            whole, channel = budgets.dense(head_size, context), budgets.vector(context)
            r = max(1, min(r, int((ratio * whole - budgets.dense(head_size, 1)) / channel)))
            k = budgets.tokens("sparq", ratio, head_size, context, beside=r * channel, least=channel)
        return cls(r=r, k=k, local=k // 4)

    @classmethod
    def for_tokens(cls, tokens: int, head_size: int, context: int) -> Self:
        """Guess by a quarter of the channels, as the paper's r of 32 is of its models' 128."""
        return cls(r=max(1, head_size // 4), k=tokens, local=tokens // 4)
