"""KVzip: keep what it takes to repeat the context (arXiv:2505.23416).

The one idea: once the context is read, make the model repeat it, chunk by chunk, and take that back. The
highest weight that a cached token gets from any of these queries is its score: whatever will be asked, it is
worth as much. All KV heads of all layers compete for one pool, once; the cut cache answers many questions.

Choices, as in the authors' code (snu-mllab/KVzip):

- Weights are a softmax over the first `sinks` tokens, the chunk and the request with the repetition, up to
  the query itself; not over the rest of the context. Queries of the request vote too. A query group agrees on
  the maximum.
- The first `sinks` tokens, a system prompt, always stay and are not scored; every head so keeps some.
- `ratio` counts the scored pairs of token and head, of n of them `int(n * ratio) - 1` stay: those above the
  threshold. `budget` in its place: the average number of tokens per KV head, the sinks included.
- The request stands between context and repetition, as the authors word it; `answer` is what a chat template
  puts in front of a reply, empty here. Without a tokenizer give token ids.
- kvpress counts the sinks in the ratio, and its second request lacks a space.

Where segments are given, the last one is the question: it is read over the cut cache. Else the whole prompt
is the context, and the first new token comes from it uncut. What was not scored stays: questions, answers.

All layers hold the whole context until it is cut, and a probe beside it; reading costs about three times as
much. The probes' weights are computed apart from attention. A soft cap on logits is not applied to them.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F

from kvsieve import KVView, NewTokens, Pass, Policy, UserError

from . import budgets

_QUERIES = 64  # of a row at once
_WEIGHTS = 2**20  # at once, where those queries of several rows have no more: 4 MiB, which stay in a cache


@dataclass(frozen=True)
class KVzip(Policy):
    """Keeps the part `ratio` of all pairs of token and KV head, those that a repetition needs most."""

    ratio: float = 0.3
    budget: int | None = None  # if given, tokens per KV head on average, the sinks included, instead of ratio
    chunk: int = 2000  # tokens that are repeated at once
    overlap: int = 8  # tokens of the chunk before, with which a request begins
    sinks: int = 4  # the first tokens, always kept: the system prompt
    repeat: str | tuple[int, ...] = "\n\nRepeat the previous context exactly."
    go_on: str | tuple[int, ...] = "\n\nRepeat the part of the previous context exactly, starting with"
    answer: str | tuple[int, ...] = ""

    name: ClassVar[str] = "kvzip"
    paper: ClassVar[str] = "arXiv:2505.23416"
    drops_by = ("ratio", "budget")
    cuts_together = True

    def __post_init__(self) -> None:
        if not 0 < self.ratio <= 1:
            raise UserError(f"kvzip.ratio must be above 0 and at most 1, not {self.ratio}")
        for field, least in (("chunk", 1), ("overlap", 0), ("sinks", 1)):
            if getattr(self, field) < least:
                raise UserError(f"kvzip.{field} must be at least {least}, not {getattr(self, field)}")
        if self.budget is not None and self.budget <= self.sinks:
            raise UserError(
                f"kvzip.budget must be larger than the {self.sinks} sinks, which it counts, not {self.budget}"
            )

    def plan(self, segments: Sequence[int]) -> list[Pass]:
        size = sum(segments)
        context = size - (segments[-1] if len(segments) > 1 else 0)
        passes = [Pass(0, context)]
        for first in range(self.sinks, context, self.chunk):
            request = (self.repeat, range(0), self.answer)
            if first > self.sinks:
                request = (self.go_on, range(first - min(self.overlap, self.chunk), first), self.answer)
            passes.append(Pass(first, min(first + self.chunk, context), stays=False, before=request))
        return [*passes, Pass(context, size, cut=True)] if context < size else passes

    def on_queries(self, kv: KVView, queries: torch.Tensor, new: NewTokens) -> None:
        if not kv.probing:
            return
        # Nothing was dropped yet: a slot is the number of its token.
        first, last = kv.span[:, None, :1], kv.span[:, None, 1:]
        fresh = kv.fresh().sum(2)
        starts, most = (kv.lengths - fresh)[..., None], int(fresh.max())
        device = kv.lengths.device
        sinks = torch.arange(self.sinks, device=device).expand(*kv.lengths.shape, -1)
        chunk = (first + torch.arange(self.chunk, device=device)).expand(*kv.lengths.shape, -1)
        chunk = chunk[..., : int((last - first).max())]
        own = starts + torch.arange(most, device=device)
        slots = torch.cat([sinks, chunk, own], 2)
        keys = kv.at("keys", slots, torch.full_like(kv.lengths, slots.shape[2])).float()
        of_chunk = slice(self.sinks, self.sinks + chunk.shape[2])
        seen = torch.cat([sinks < kv.seen[:, None, None], chunk < last, own < kv.lengths[..., None]], 2)
        score = torch.zeros(chunk.shape, device=device)
        rows = max(1, _WEIGHTS // (slots.shape[2] * _QUERIES * queries[0, :, :, 0, 0].numel()))
        for row, part in itertools.product(
            range(0, len(queries), rows), range(0, queries.shape[3], _QUERIES)
        ):
            these, block = slice(row, row + rows), slice(part, part + _QUERIES)
            reach = slice(of_chunk.stop + min(part + _QUERIES, most))  # no query of the block sees beyond
            query, place = queries[these, :, :, block].float(), new.slots[these, :, block, None]
            logits = (query.flatten(2, 3) @ keys[these, :, reach].mT).mul_(kv.scale)
            logits = logits.unflatten(2, query.shape[2:4])
            hidden = ~seen[these, :, None, reach] | (slots[these, :, None, reach] > place)
            logits.masked_fill_(hidden[:, :, None], torch.finfo(torch.float32).min)
            real = place < kv.lengths[these, :, None, None]
            votes = logits.softmax(-1)[..., of_chunk].masked_fill_(~real[:, :, None], 0)
            score[these] = torch.maximum(score[these], votes.amax((2, 3)))
        self._note(kv, chunk, score.masked_fill(chunk >= last, -1))

    def _note(self, kv: KVView, slots: torch.Tensor, score: torch.Tensor) -> None:
        """Raise the scores of `slots [B, K, S]` to `score`; those that were never scored have -1."""
        held = kv.notes.get("score", score.new_empty(*score.shape[:2], 0))
        held = F.pad(held, (0, max(0, kv.slots_in_use - held.shape[2])), value=-1)
        inside = slots.clamp(max=held.shape[2] - 1)
        kv.notes["score"] = held.scatter_reduce(2, inside, score, "amax")

    def cut_together(self, layers: Sequence[KVView]) -> list[torch.Tensor | None]:
        if any("score" not in kv.notes for kv in layers):
            return [None] * len(layers)
        scores = []
        for kv in layers:
            held = kv.notes["score"][:, :, : kv.slots_in_use]
            scores.append(F.pad(held, (0, kv.slots_in_use - held.shape[2]), value=-1))
        everywhere = [kv.all_heads(score, pad=-1) for kv, score in zip(layers, scores, strict=True)]
        pool = torch.cat([score.flatten(1).to(scores[0].device) for score in everywhere], 1)
        pairs = (pool >= 0).sum(1)
        if self.budget is not None:
            heads = sum(score.shape[1] for score in everywhere)
            counts = torch.full_like(pairs, heads * (self.budget - self.sinks))
            all_stay = counts >= pairs
        else:
            counts = ((pairs.double() * self.ratio).long() - 1).clamp(min=0)
            all_stay = torch.full_like(pairs, self.ratio == 1, dtype=torch.bool)
        last = counts.clamp(max=pool.shape[1] - 1)[:, None]
        threshold = pool.sort(1, descending=True).values.gather(1, last)
        threshold = threshold.masked_fill(all_stay[:, None], -torch.inf)
        return [
            kv.live() & ((score < 0) | (score > threshold[..., None].to(score.device)))
            for kv, score in zip(layers, scores, strict=True)
        ]

    @classmethod
    def for_compression(cls, ratio: float, head_size: int, context: int) -> Self:
        """Keep `ratio` of the context's pairs; the sinks, the question and what is generated come on top."""
        return cls(ratio=ratio)

    @classmethod
    def for_memory(cls, share: float, head_size: int, context: int, itemsize: int = 2) -> Self:
        """Hold so many pairs of a context of `context` tokens, the sinks included."""
        tokens = budgets.held("kvzip", share, head_size, context, itemsize, fewest=cls.sinks + 1)
        return cls.for_tokens(tokens, head_size, context)

    @classmethod
    def for_tokens(cls, tokens: int, head_size: int, context: int) -> Self:
        """Keep so many of the context on average, the sinks included; the question comes on top, too."""
        return cls(budget=tokens)
