"""Double Sparsity: guess with a few calibrated channels of every key, kept apart (arXiv:2408.07092).

The one idea: which channels of a key dominate q.k hardly depends on the text. So they are found once
(`kvsieve calibrate double_sparsity`), and every key's r channels are also kept in a small label cache, in 4
or 16 bits. Score all labels, read the k best tokens whole.

Paper and code differ. The authors' evaluation code quantises the query's channels, too (`quantise_query`),
and takes its statistics before RoPE, though labels are taken after it; ours are taken after it. Nothing
recent is forced. Layers 0 and 1 stay dense there: see `dense_layers`.

Deviations: channels are per KV head, because a query group shares its keys, and one set is read per group:
`group_score` says how the heads agree, by the largest or mean logit, or the sum of softmax weights. With 4
bits a label is quantised for itself, between its smallest and largest number; the lowest and the step are
kept as the keys are. `bits = 0` is ours: no labels, the channels are read in the keys' own storage, which
`layout` orders by channel.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

import torch

from kvsieve import KEYS, Column, KeyLayout, KVView, NewTokens, Selection, UserError, ops

from . import budgets
from .calibrated import Calibrated


@dataclass(frozen=True)
class DoubleSparsity(Calibrated):
    """Reads r calibrated channels of all keys from a label cache, then k tokens whole."""

    r: int = 16  # channels of a label
    k: int = 256  # tokens read whole
    bits: Literal[4, 16, 0] = 4  # of a label's number; 16: as the keys are; 0: no labels
    quantise_query: bool = False  # with 4 bits, the query's channels, too
    # Of the keys, with 0 bits: speed and memory, not results. "auto" is "double" on a CPU, else "blocked".
    layout: Literal["auto", "double", "blocked"] = "auto"
    block: int = 16  # tokens in a block of layout "blocked"

    name: ClassVar[str] = "double_sparsity"
    paper: ClassVar[str] = "arXiv:2408.07092"
    any_order = True
    _what = "channels"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 1:
            raise UserError(f"double_sparsity.k must be at least 1, not {self.k}")
        if self.bits not in (4, 16, 0):
            raise UserError(f"double_sparsity.bits must be 4, 16 or 0, not {self.bits}")
        if self.bits == 4 and self.r % 2:
            raise UserError(f"double_sparsity.r must be even with 4 bits, not {self.r}: two share a byte")
        if self.quantise_query and self.bits != 4:
            raise UserError("double_sparsity.quantise_query goes with bits = 4: 16 bits are not quantised")
        if self.layout not in ("auto", "double", "blocked"):
            raise UserError(
                f"double_sparsity.layout must be 'auto', 'double' or 'blocked', not {self.layout!r}"
            )
        if self.bits and self.layout != "auto":
            raise UserError(
                f"double_sparsity.layout goes with bits = 0, not {self.bits}: labels are read instead"
            )
        KeyLayout(self.layout, self.block)  # raises UserError for a block that is none

    @property
    def columns(self) -> Mapping[str, Column]:
        if self.bits == 4:
            return {"codes": (torch.uint8, self.r // 2), "range": (KEYS, 2)}
        return {"label": (KEYS, self.r)} if self.bits else {}

    @property
    def key_layout(self) -> KeyLayout:
        return KeyLayout() if self.bits else KeyLayout(self.layout, self.block)

    def in_layout(self, layout: KeyLayout) -> Self | None:
        if self.bits or layout.kind == "single":
            return None
        return replace(self, layout=layout.kind, block=layout.block)

    def bind(
        self, layer: int, heads: range, head_size: int, device: torch.device
    ) -> Mapping[str, torch.Tensor]:
        return {"channels": self._bound(layer, heads, head_size, device).long()}

    def on_append(self, kv: KVView, new: NewTokens) -> None:
        if self.bits == 0:
            return
        label = new.keys.gather(3, self._channels(new.keys, kv))
        if self.bits == 16:
            kv.write("label", new, label)
        else:
            codes, span = ops.quantised(label)
            kv.write("codes", new, codes)
            kv.write("range", new, span)

    def select(self, query: torch.Tensor, kv: KVView) -> Selection | None:
        if kv.slots_in_use <= self.k:
            return None  # nothing to leave out
        channels = self._channels(query, kv)
        part = query.gather(3, channels)
        if self.bits == 16:
            return Selection(*ops.top_by_vectors(part, kv["label"], kv, self.k, self.group_score))
        if self.bits == 4:
            if self.quantise_query:
                part = ops.unquantised(*ops.quantised(part)).to(query.dtype)
            scores = ops.code_scores(part, kv, "codes", "range")
            return Selection(*ops.top_slots(ops.group_ranking(scores, kv, self.group_score), kv, self.k))
        # A query that is zero elsewhere lies in its channels wholly: SparQ's temperature is then 1.
        only = torch.zeros_like(query).scatter(3, channels, part)
        how: Literal["max", "logits", "softmax"] = (
            "logits" if self.group_score == "mean" else self.group_score
        )
        slots, counts, _ = ops.top_by_channels(only, kv, channels[:, :, 0], self.k, group_score=how)
        return Selection(slots, counts)

    def _channels(self, vectors: torch.Tensor, kv: KVView) -> torch.Tensor:
        """The label's channels `[B, K, N, r]`, to be gathered from `vectors [B, K, N, D]`."""
        return kv.static["channels"][None, :, None].expand(*vectors.shape[:3], -1)

    @classmethod
    def for_compression(
        cls,
        ratio: float,
        head_size: int,
        context: int,
        r: int | None = None,
        bits: Literal[4, 16, 0] = 4,
        itemsize: int = 2,
    ) -> Self:
        """Spend half of the bytes on labels, or as little as labels can be, and the rest on tokens.

        The calibration stands beside the compression.
        """
        half, fewest = ratio * budgets.vector(head_size, itemsize), 2 if bits == 4 else 1
        if r is None:
            # Bytes of a label are r / 2 and its range with 4 bits, else r numbers.
            r = int(half - 2 * itemsize) * 2 if bits == 4 else int(half / itemsize)
            r = max(fewest, min(r, head_size // fewest * fewest))

        def beside(r: int) -> int:
            label = r // 2 + 2 * itemsize if bits == 4 else r * itemsize
            return context * label + 8 * r

        given = {"beside": beside(r), "least": beside(fewest)}
        k = budgets.tokens("double_sparsity", ratio, head_size, context, itemsize, **given)
        return cls(r=r, k=k, bits=bits)

    @classmethod
    def for_tokens(cls, tokens: int, head_size: int, context: int) -> Self:
        """Guess by an eighth of the channels. The calibration stands beside the tokens."""
        return cls(r=max(2, head_size // 16 * 2), k=tokens)
