"""DuoAttention: some heads retrieve and keep everything, the others need little (arXiv:2410.10819).

The one idea: which KV heads retrieve from far back is a property of the model, not of the text. So it is
found once; these heads are full, and all others hold the first `sinks` and the newest `recent` tokens only.

`full_heads` lists the KV heads of every layer, or names a file of a score for each: those above `threshold`
are full (0.5 in the authors' code), or the best `share` of all heads of the model. The authors train their
scores, by distillation on synthetic passkeys. `kvsieve calibrate duo_attention` measures ours instead: the
attention that a passage repeated at the end of a text pays to where it stood first.

Choices: `sinks` and `recent` do not count the current token, as in the authors' code, so a streaming head
reads and has room for `sinks + recent + 1`. A prompt is read densely, and cut when it is complete. The
authors' one-shot prefill is dense too, but in pieces their streaming heads see sinks, recent tokens and the
piece; here pieces change nothing. In a later turn of a conversation streaming heads read the new tokens with
what they hold: what the authors' do, and up to one token more.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from transformers import PreTrainedModel

from kvsieve import KVView, Policy, Ranking, UserError, calibration

from . import budgets

_FEWEST = 2  # tokens in a head, where a budget says so: the current one, and one before it


@dataclass(frozen=True)
class DuoAttention(Policy):
    """Keeps everything in full heads; in the others the first `sinks` tokens and the newest `recent`."""

    # The full KV heads of each layer; or a file of `kvsieve calibrate duo_attention`.
    full_heads: tuple[tuple[int, ...], ...] | str = ""
    sinks: int = 128
    recent: int = 256
    threshold: float = 0.5  # of a file: heads with a higher score are full
    share: float | None = None  # of a file: instead, this share of the model's heads, the highest scores

    name: ClassVar[str] = "duo_attention"
    paper: ClassVar[str] = "arXiv:2410.10819"

    def __post_init__(self) -> None:
        for field, least in (("sinks", 0), ("recent", 1)):
            if getattr(self, field) < least:
                raise UserError(
                    f"duo_attention.{field} must be at least {least} tokens, not {getattr(self, field)}"
                )
        if self.share is not None and not 0 <= self.share <= 1:
            raise UserError(f"duo_attention.share must be from 0 to 1, not {self.share}")
        if isinstance(self.full_heads, str):
            return
        if self.share is not None:
            raise UserError(
                "duo_attention.share (which a compression sets) chooses among the scores of a file, and "
                "full_heads is a list: give the file, or sinks and recent"
            )
        for layer, heads in enumerate(self.full_heads):
            if len(set(heads)) < len(heads) or min(heads, default=0) < 0:
                raise UserError(
                    f"duo_attention.full_heads of layer {layer} must be KV heads from 0 on, each once, not "
                    f"{list(heads)}"
                )

    def keeps_per_head(self, layer: int, heads: range) -> list[int | None]:
        return [None if full else self.sinks + self.recent + 1 for full in self._full(layer, heads)]

    def cut(self, kv: KVView) -> torch.Tensor:
        full = kv.static["full"][:, None]
        return (full | kv.oldest(self.sinks) | kv.newest(self.recent)) & kv.live()

    def priority(self, kv: KVView) -> Ranking:
        return Ranking(kv.positions, oldest=self.sinks)

    def bind(
        self, layer: int, heads: range, head_size: int, device: torch.device
    ) -> Mapping[str, torch.Tensor]:
        return {"full": torch.tensor(self._full(layer, heads), device=device)}

    def check(self, head_size: int) -> None:
        if self.full_heads == "":
            raise UserError(
                "duo_attention.full_heads is needed: the KV heads of each layer that keep everything, as "
                "[[0], [], [1, 3]], or a file of scores: make one with kvsieve calibrate duo_attention"
            )
        if isinstance(self.full_heads, str):
            calibration.read(self._path).check_contents("retrieval", head_size, 1)

    def check_model(self, model: PreTrainedModel) -> None:
        if isinstance(self.full_heads, str):
            calibration.read(self._path).check(model, "retrieval", 1)
            return
        config = model.config.get_text_config(decoder=True)
        layers = config.num_hidden_layers
        if len(self.full_heads) != layers:
            raise UserError(
                f"duo_attention.full_heads is for {len(self.full_heads)} layers, and this model has {layers}"
            )
        many = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        for layer, heads in enumerate(self.full_heads):
            if max(heads, default=0) >= many:
                raise UserError(
                    f"duo_attention.full_heads of layer {layer} are {list(heads)}, and this model's KV heads "
                    f"are 0 to {many - 1}"
                )

    def files(self) -> Mapping[str, str]:
        return {"full_heads": self._path} if isinstance(self.full_heads, str) and self.full_heads else {}

    @property
    def _path(self) -> str:
        return calibration.path(str(self.full_heads), self.name)

    def _full(self, layer: int, heads: range) -> list[bool]:
        """Whether each of these KV heads of a layer is full."""
        if not isinstance(self.full_heads, str):
            if layer >= len(self.full_heads):
                raise UserError(
                    f"duo_attention.full_heads is for {len(self.full_heads)} layers; here is layer {layer}"
                )
            return [head in self.full_heads[layer] for head in heads]
        found = calibration.read(self._path)
        scores = found.take("retrieval", layer, heads, 0, 1, torch.device("cpu"))[:, 0]
        if self.share is None:
            return list((scores > self.threshold).tolist())
        ranked = (
            torch.cat([tensor.flatten() for tensor in found.tensors.values()]).sort(descending=True).values
        )
        many = round(self.share * len(ranked))
        return list((scores >= ranked[many - 1]).tolist()) if many else [False] * len(scores)

    @classmethod
    def for_compression(cls, ratio: float, head_size: int, context: int) -> Self:
        """Spend an eighth of the bytes on sinks and recent tokens in all heads, and the rest on full heads.

        That is rounded to whole heads of the model. A file of scores stands beside the compression.
        """
        budgets.kept("duo_attention", ratio, head_size, context, fewest=_FEWEST)
        window = max(_FEWEST, round(ratio * context / 8))  # the current token counted
        sinks = min(64, window // 4)
        rest = 1 - window / context
        share = min(1.0, max(0.0, (ratio - window / context) / rest)) if rest > 0 else 1.0
        return cls(sinks=sinks, recent=window - 1 - sinks, share=round(share, 6))

    @classmethod
    def for_memory(cls, share: float, head_size: int, context: int) -> Self:
        """Hold what is read: see for_compression."""
        budgets.kept("duo_attention", share, head_size, context, fewest=_FEWEST, budget="memory")
        return cls.for_compression(share, head_size, context)
