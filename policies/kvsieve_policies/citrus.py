"""CItruS: read a long document in chunks, and keep what the instruction attends to (arXiv:2406.12018).

The one idea: after every chunk the instruction is run over the cache, only to see what it looks at, and taken
back. The best `kept` tokens and the chunk itself stay, the rest is dropped before the next but one chunk is
read. So the cache never grows with the document, and what the question needs is not pushed out by what the
text itself attends to. Nothing is dropped while it answers.

Choices, as in the authors' code (ybai-nlp/CItruS):

- A token's score is its attention, averaged over all heads of a layer and all queries of the instruction; all
  heads of a layer keep the same tokens. A new chunk is not scored before the next one is in.
- At the end the instruction runs once more over the cache, `kept` tokens stay, and it is read for good.
- Positions are places in the cache. They rotate all keys anew in every forward, here a key turns when it
  moves up.
- `score="chunk"` is their baseline ("standard"): the last chunk's own queries decide, until the end.
- This is their shared cache ("instruction_aware_single"). Their second cache, one to read and one to answer,
  holds twice the memory and is left out.

The last segment is the instruction; without segments, the last `instruction` tokens of the prompt. A row
holds at most `kept` tokens, two chunks, or one and the instruction, in every layer.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import torch

from kvsieve import KVView, NewTokens, Observe, Pass, Policy, Positions, UserError

from . import budgets


@dataclass(frozen=True)
class CItruS(Policy):
    """Keeps `kept` tokens of a document per layer, chunk by chunk, by the attention of the instruction."""

    kept: int = 768
    chunk: int = 256  # tokens read at once; they stay while the next ones are read
    score: Literal["instruction", "chunk"] = "instruction"
    instruction: int = 64  # tokens at the end of the prompt that are it, where no segments say so

    name: ClassVar[str] = "citrus"
    paper: ClassVar[str] = "arXiv:2406.12018"
    columns = {"score": torch.float32}
    observes = Observe.MASS
    positions = Positions.CACHE

    def __post_init__(self) -> None:
        for field in ("kept", "chunk", "instruction"):
            if getattr(self, field) < 1:
                raise UserError(f"citrus.{field} must be at least 1 token, not {getattr(self, field)}")
        if self.score not in ("instruction", "chunk"):
            raise UserError(f"citrus.score must be 'instruction' or 'chunk', not {self.score!r}")

    def plan(self, segments: Sequence[int]) -> list[Pass]:
        size = sum(segments)
        context = size - min(size, segments[-1] if len(segments) > 1 else self.instruction)
        passes, room = [Pass(0, min(self.chunk, context))], None
        ask = Pass(context, size, stays=False)
        for first in range(self.chunk, context, self.chunk):
            chunk = Pass(first, min(first + self.chunk, context))
            if self.score == "instruction":
                passes += [ask._replace(room=room), chunk]
            else:
                passes += [chunk._replace(room=room)]
            room = self.kept + chunk.last - chunk.first
        if context == 0:
            return [Pass(0, size)]
        return [*passes, ask._replace(room=room), Pass(context, size, room=self.kept)]

    def on_append(self, kv: KVView, new: NewTokens) -> None:
        if self._scores(kv):
            begins = kv.fresh().sum(2) == new.counts[:, None]
            kv["score"] = kv["score"].masked_fill(begins[..., None], 0)

    def on_attend(self, kv: KVView, mass: torch.Tensor) -> None:
        if self._scores(kv):
            kv["score"] += kv.all_heads(mass).mean(1, keepdim=True)

    def _scores(self, kv: KVView) -> bool:
        return kv.probing or self.score == "chunk"

    def priority(self, kv: KVView) -> torch.Tensor:
        return kv["score"].masked_fill(kv.fresh(), torch.inf)

    @classmethod
    def for_compression(
        cls,
        ratio: float,
        head_size: int,
        context: int,
        instruction: int = 64,
        score: Literal["instruction", "chunk"] = "instruction",
    ) -> Self:
        """Hold `ratio * context` tokens, an instruction of so many included; the answer comes on top."""
        kept = round(ratio * context) - instruction
        if kept < 1:
            least = (instruction + 1) * 2 * budgets.vector(head_size)
            raise budgets.too_small("citrus", least, budgets.dense(head_size, context))
        return cls.for_tokens(kept + instruction, head_size, context, instruction, score)

    @classmethod
    def for_memory(
        cls,
        share: float,
        head_size: int,
        context: int,
        instruction: int = 64,
        score: Literal["instruction", "chunk"] = "instruction",
        itemsize: int = 2,
    ) -> Self:
        """Hold so much once the prompt is complete, an instruction of so many tokens included."""
        fewest = instruction + 1
        tokens = budgets.held("citrus", share, head_size, context, itemsize, column=4, fewest=fewest)
        return cls.for_tokens(tokens, head_size, context, instruction, score)

    @classmethod
    def for_tokens(
        cls,
        tokens: int,
        head_size: int,
        context: int,
        instruction: int = 64,
        score: Literal["instruction", "chunk"] = "instruction",
    ) -> Self:
        """Hold so many, an instruction of so many tokens included; the answer comes on top."""
        kept = tokens - instruction
        if kept < 1:
            raise UserError(
                f"citrus counts its instruction of {instruction} tokens: at least {instruction + 1} are "
                "needed"
            )
        return cls(kept, max(1, min(256, kept // 2)), score, instruction)
