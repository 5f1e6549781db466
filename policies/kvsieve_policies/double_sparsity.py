"""Double Sparsity: guess with a few calibrated channels of every key, kept apart (arXiv:2408.07092).

The one idea: which channels of a key dominate q.k hardly depends on the text. So they are found once
(`kvsieve calibrate double_sparsity`), and every key's r channels are also kept in a small label cache, in 16
or 4 bits. Score all labels, read the k best tokens whole.

Paper and code differ. The authors' evaluation code quantises the query's channels, too (`quantise_query`),
and takes its statistics before RoPE, though labels are taken after it; ours are taken after it. Nothing
recent is forced. Layers 0 and 1 stay dense there: see `dense_layers`.

Deviations: channels are per KV head, because a query group shares its keys, and one set is read per group:
`group_score` says how the heads agree, by the largest or mean logit, or the sum of softmax weights. With 4
bits a label is quantised for itself, between its smallest and largest number; the lowest and the step are
kept in float32.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch
from transformers import PreTrainedModel

from kvsieve import KEYS, Column, KVView, NewTokens, Policy, Selection, UserError, calibration, ops

from .four_bits import exact, packed, quantised, unpacked


@dataclass(frozen=True)
class DoubleSparsity(Policy):
    """Reads r calibrated channels of all keys from a label cache, then k tokens whole."""

    calibration: str = ""  # a file of `kvsieve calibrate double_sparsity`
    r: int = 16  # channels of a label
    k: int = 256  # tokens read whole
    bits: Literal[16, 4] = 16  # of a label's number; 16: as the keys are
    group_score: Literal["max", "mean", "softmax"] = "max"  # how a query group ranks tokens
    quantise_query: bool = False  # with 4 bits, the query's channels, too

    name: ClassVar[str] = "double_sparsity"
    paper: ClassVar[str] = "arXiv:2408.07092"

    def __post_init__(self) -> None:
        for field in ("r", "k"):
            if getattr(self, field) < 1:
                raise UserError(f"double_sparsity.{field} must be at least 1, not {getattr(self, field)}")
        if self.bits not in (4, 16):
            raise UserError(f"double_sparsity.bits must be 16 or 4, not {self.bits}")
        if self.bits == 4 and self.r % 2:
            raise UserError(f"double_sparsity.r must be even with 4 bits, not {self.r}: two share a byte")
        if self.quantise_query and self.bits != 4:
            raise UserError("double_sparsity.quantise_query goes with bits = 4: 16 bits are not quantised")
        if self.group_score not in ("max", "mean", "softmax"):
            raise UserError(
                f"double_sparsity.group_score must be 'max', 'mean' or 'softmax', not {self.group_score!r}"
            )

    @property
    def columns(self) -> Mapping[str, Column]:
        if self.bits == 16:
            return {"label": (KEYS, self.r)}
        return {"label": (torch.uint8, self.r // 2), "range": (torch.float32, 2)}

    def check(self, head_size: int) -> None:
        if self.r > head_size:
            raise UserError(
                f"double_sparsity.r is {self.r}, but this model's heads have {head_size} channels"
            )
        calibration.read(self.calibration)

    def files(self) -> Mapping[str, str]:
        return {"calibration": self.calibration} if self.calibration else {}

    def check_model(self, model: PreTrainedModel) -> None:
        calibration.read(self.calibration).check(model)

    def bind(
        self, layer: int, heads: range, head_size: int, device: torch.device
    ) -> Mapping[str, torch.Tensor]:
        found = calibration.read(self.calibration)
        return {"channels": found.take("channels", layer, heads, head_size, self.r, device).long()}

    def on_append(self, kv: KVView, new: NewTokens) -> None:
        label = self._channels(new.keys, kv)
        if self.bits == 16:
            kv.write("label", new, label)
            return
        codes, span = quantised(label)
        kv.write("label", new, packed(codes))
        kv.write("range", new, span)

    def select(self, query: torch.Tensor, kv: KVView) -> Selection | None:
        if kv.slots_in_use <= self.k:
            return None  # nothing to leave out
        part, labels = self._channels(query, kv), kv["label"]
        if self.bits == 4:
            labels = exact(unpacked(labels), kv["range"]).to(query.dtype)
            if self.quantise_query:
                part = exact(*quantised(part)).to(query.dtype)
        return Selection(*ops.top_by_vectors(part, labels, kv, self.k, self.group_score))

    def _channels(self, vectors: torch.Tensor, kv: KVView) -> torch.Tensor:
        """The label's channels `[B, K, N, r]` of `vectors [B, K, N, D]`."""
        channels = kv.static["channels"][None, :, None]
        return vectors.gather(3, channels.expand(*vectors.shape[:3], self.r))

    @classmethod
    def for_compression(cls, ratio: float, head_size: int, context: int) -> Self:
        """Spend half of the bytes on labels of 16 bits, half on tokens: r = D * ratio, k = T * ratio / 2.

        The calibration stands beside the compression. With 4 bits beside it, less is read than asked for.
        """
        return cls(r=max(1, round(head_size * ratio)), k=max(1, round(context * ratio / 2)))
