"""Loki: guess in the leading principal components of the keys (arXiv:2406.02542).

The one idea: keys lie near a subspace of few dimensions, which hardly depends on the text. So its directions
are found once (`kvsieve calibrate loki`); r numbers of every key in them are scored, and the k best tokens
are read whole.

Choices: a `k` of at most 1 is a share of the row's tokens, the current one counted, as in the authors' code;
the mean of the keys is not subtracted when they are projected; nothing recent is forced.

Deviations: the paper stores the keys themselves in the basis, which needs no more memory. Here the r leading
numbers are a column beside the keys. The authors choose tokens per query head; here a query group reads one
set, and `group_score` says how its heads agree: by the largest or mean logit, or the sum of softmax weights.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from kvsieve import KEYS, Column, KVView, NewTokens, Selection, UserError, ops

from . import budgets
from .calibrated import Calibrated


@dataclass(frozen=True)
class Loki(Calibrated):
    """Reads r principal components of all keys, then k tokens whole."""

    r: int = 32  # components
    k: float = 0.25  # tokens read whole; at most 1: that share of the row

    name: ClassVar[str] = "loki"
    paper: ClassVar[str] = "arXiv:2406.02542"
    any_order = True
    _what = "basis"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k <= 0 or (self.k > 1 and self.k != int(self.k)):
            raise UserError(
                f"loki.k must be a number of tokens, or a share above 0 and up to 1, not {self.k}"
            )

    @property
    def columns(self) -> Mapping[str, Column]:
        return {"leading": (KEYS, self.r)}

    def bind(
        self, layer: int, heads: range, head_size: int, device: torch.device
    ) -> Mapping[str, torch.Tensor]:
        basis = self._bound(layer, heads, head_size, device)
        return {"basis": basis.float().transpose(1, 2).contiguous()}  # [K, D, r]

    def on_append(self, kv: KVView, new: NewTokens) -> None:
        kv.write("leading", new, new.keys.float() @ kv.static["basis"])

    def select(self, query: torch.Tensor, kv: KVView) -> Selection | None:
        most = int(self.k * kv.slots_in_use) if self.k <= 1 else int(self.k)
        if kv.slots_in_use <= most:
            return None  # nothing to leave out
        part = (query.float() @ kv.static["basis"]).to(query.dtype)
        if self.k > 1:
            return Selection(*ops.top_by_vectors(part, kv["leading"], kv, most, self.group_score))
        ranking = ops.group_ranking(ops.vector_scores(part, kv["leading"], kv), kv, self.group_score)
        # Each row keeps its own share: the best must come first.
        counts = (kv.lengths.double() * self.k).long().clamp(min=1)  # in the arithmetic of `most`
        return Selection(ranking.topk(max(1, most), 2).indices, counts)

    @classmethod
    def for_compression(
        cls, ratio: float, head_size: int, context: int, r: int | None = None, itemsize: int = 2
    ) -> Self:
        """Spend half of the bytes on the guess, the basis counted apart, and the rest on tokens.

        So r = D * ratio, or fewer where the rest would be less than two tokens. The calibration stands beside
        the compression.
        """

        def beside(r: int) -> int:
            return context * r * itemsize + 4 * head_size * r

        two, whole = budgets.dense(head_size, 2, itemsize), budgets.dense(head_size, context, itemsize)
        r = r or max(1, min(round(head_size * ratio), int((ratio * whole - two) / beside(1))))
        # A k of 1 would be a share.
        given = {"beside": beside(r), "least": beside(1), "fewest": 2}
        return cls(r=r, k=budgets.tokens("loki", ratio, head_size, context, itemsize, **given))

    @classmethod
    def for_tokens(cls, tokens: int, head_size: int, context: int) -> Self:
        """Guess in a quarter of the directions. The calibration stands beside the tokens."""
        if tokens < 2:
            raise UserError("loki reads at least 2 tokens: its k of 1 is a share")
        return cls(r=max(1, head_size // 4), k=tokens)
