"""StreamingLLM: attention sinks and the newest tokens, at positions within the cache (arXiv:2309.17453).

The one idea: the first tokens take the attention that heads have no other use for; keep them and a window of
the newest, and count positions within the cache, so that they never exceed what the model was trained on.

`budget` counts the current token and the sinks; the authors hold `sinks + recent` tokens between steps, so
that is `budget - 1`. A prompt is read densely and cut when it is complete, as their evaluation does.

Choice: rotary attention sees differences of positions only. So the tokens of the window keep the positions
of the text, and the sinks are turned towards them by as many positions as were dropped in between, at every
step anew from their first keys (turning in place would drift). Scores are those of the authors, who rotate
all keys anew. In a later turn of a conversation the new tokens are read with the sinks where the last step
put them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from kvsieve import KVView, NewTokens, Policy, Positions, Ranking, Shape, UserError

from . import budgets


@dataclass(frozen=True)
class StreamingLLM(Policy):
    """Keeps the first `sinks` tokens, moved up to the newest `budget - sinks`."""

    budget: int = 1024  # tokens kept per KV head, the current one included
    sinks: int = 4  # of these the first of the row

    name: ClassVar[str] = "streaming_llm"
    paper: ClassVar[str] = "arXiv:2309.17453"
    positions = Positions.OWN

    def __post_init__(self) -> None:
        if self.budget < 1:
            raise UserError(f"streaming_llm.budget must be at least 1 token, not {self.budget}")
        if not 0 <= self.sinks < self.budget:
            raise UserError(
                f"streaming_llm.sinks must be from 0 to budget - 1 = {self.budget - 1}, not {self.sinks}"
            )

    @property
    def keeps(self) -> int:
        return self.budget

    @property
    def summaries(self) -> Mapping[str, Shape]:
        """The keys of the sinks at the positions of the text: a sink stays in the slot of its number."""
        return {f"sink {i}": (torch.float32, "D") for i in range(self.sinks)}

    def priority(self, kv: KVView) -> Ranking:
        return Ranking(kv.positions, oldest=self.sinks)

    def on_append(self, kv: KVView, new: NewTokens) -> None:
        if self.sinks == 0:
            return
        numbers = torch.arange(self.sinks, device=kv.seen.device)
        place = numbers - (kv.seen - new.counts)[:, None]  # [B, sinks], among the new tokens
        came = ((place >= 0) & (place < new.counts[:, None]))[:, None, :, None]
        index = place.clamp(0, new.keys.shape[2] - 1)[:, None, :, None]
        keys = new.keys.gather(2, index.expand(*kv.lengths.shape, -1, kv.head_size)).float()
        first = torch.where(came, keys, torch.stack([kv[name] for name in self.summaries], 2))
        for i, name in enumerate(self.summaries):
            kv[name] = first[:, :, i]
        dropped = (kv.seen[:, None] - kv.lengths)[..., None]
        kv.write_keys(numbers.masked_fill(dropped == 0, -1), kv.turned(first, dropped))

    @classmethod
    def for_compression(cls, ratio: float, head_size: int, context: int) -> Self:
        tokens = budgets.kept("streaming_llm", ratio, head_size, context)
        return cls.for_tokens(tokens, head_size, context)

    @classmethod
    def for_memory(
        cls, share: float, head_size: int, context: int, sinks: int = 4, itemsize: int = 2
    ) -> Self:
        """Hold the first keys of the sinks, too: float32 summaries."""
        first, fewest = sinks * 4 * head_size, sinks + 1
        given = {"beside": first, "fewest": fewest}
        tokens = budgets.held("streaming_llm", share, head_size, context, itemsize, **given)
        return cls.for_tokens(tokens, head_size, context)

    @classmethod
    def for_tokens(cls, tokens: int, head_size: int, context: int) -> Self:
        return cls(budget=tokens, sinks=min(4, tokens - 1))
