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
from typing import ClassVar, Literal, Self

import torch
from transformers import PreTrainedModel

from kvsieve import KEYS, Column, KVView, NewTokens, Policy, Selection, UserError, calibration, ops


@dataclass(frozen=True)
class Loki(Policy):
    """Reads r principal components of all keys, then k tokens whole."""

    calibration: str = ""  # a file of `kvsieve calibrate loki`
    r: int = 32  # components
    k: float = 0.25  # tokens read whole; at most 1: that share of the row
    group_score: Literal["max", "mean", "softmax"] = "max"  # how a query group ranks tokens

    name: ClassVar[str] = "loki"
    paper: ClassVar[str] = "arXiv:2406.02542"

    def __post_init__(self) -> None:
        if self.r < 1:
            raise UserError(f"loki.r must be at least 1, not {self.r}")
        if self.k <= 0 or (self.k > 1 and self.k != int(self.k)):
            raise UserError(
                f"loki.k must be a number of tokens, or a share above 0 and up to 1, not {self.k}"
            )
        if self.group_score not in ("max", "mean", "softmax"):
            raise UserError(f"loki.group_score must be 'max', 'mean' or 'softmax', not {self.group_score!r}")

    @property
    def columns(self) -> Mapping[str, Column]:
        return {"leading": (KEYS, self.r)}

    def check(self, head_size: int) -> None:
        if self.r > head_size:
            raise UserError(f"loki.r is {self.r}, but this model's heads have {head_size} channels")
        calibration.read(self.calibration)

    def files(self) -> Mapping[str, str]:
        return {"calibration": self.calibration} if self.calibration else {}

    def check_model(self, model: PreTrainedModel) -> None:
        calibration.read(self.calibration).check(model)

    def bind(
        self, layer: int, heads: range, head_size: int, device: torch.device
    ) -> Mapping[str, torch.Tensor]:
        found = calibration.read(self.calibration)
        basis = found.take("basis", layer, heads, head_size, self.r, device)
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
        scores = ops.vector_scores(part, kv["leading"], kv)
        ranking = self._ranking(scores, kv)
        # Each row keeps its own share: the best must come first.
        counts = (kv.lengths * self.k).long().clamp(min=1)
        return Selection(ranking.topk(max(1, most), 2).indices, counts)

    def _ranking(self, scores: torch.Tensor, kv: KVView) -> torch.Tensor:
        """`[B, K, T]` from the logits `[B, K, G, T]` of a group."""
        if self.group_score == "softmax":
            weights = ops.slot_weights(scores, kv).sum(2)
            return weights.masked_fill(~kv.live(), -torch.inf)
        return scores.amax(2) if self.group_score == "max" else scores.mean(2)

    @classmethod
    def for_compression(cls, ratio: float, head_size: int, context: int) -> Self:
        """Spend half of the bytes on the guess and half on the tokens: r = D * ratio, k = T * ratio / 2.

        The calibration stands beside the compression.
        """
        return cls(r=max(1, round(head_size * ratio)), k=max(2, round(context * ratio / 2)))
