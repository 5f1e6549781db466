"""The decode loop: prefill the prompts, then one token a row per step.

    for token_ids in kvsieve.decode(model, prompts, policy, max_new_tokens=256): ...

A generator: streaming, timing and progress wrap the loop instead of entering it. Prefill is dense; the first new token
comes from it, and the policy acts from the second on, as in the SparQ paper.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from . import graph, parallel
from .cache import KVCache, LayerCache
from .errors import UserError
from .policy import Policy
from .prompts import Prompts, check_lengths, end_tokens, pad_token, token_lists
from .sampling import Sampler


def decode(
    model: PreTrainedModel,
    prompts: Prompts,
    policy: Policy | None = None,
    *,
    max_new_tokens: int,
    temperature: float | None = None,
    top_k: int | None = None,
    top_p: float | None = None,
    seed: int = 0,
    logits_processor: LogitsProcessorList | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    prefill_chunk: int | None = None,
    cache: KVCache | None = None,
    eager: bool = False,
) -> Iterator[torch.Tensor]:
    """Decode `prompts` together, yielding the next token ids `[B]` of all rows at every step.

    Rows do not influence each other. A row that has ended repeats the pad token; when all have, the loop stops.

    Args:
        model: from `kvsieve.load` or `kvsieve.prepare`.
        prompts: one text or several, or token ids: lists of different lengths, or a tensor `[B, P]` without padding.
        policy: None is dense.
        max_new_tokens: at most this many per row.
        temperature, top_k, top_p: given any of these, sample; else take the most likely token.
        seed: of the sampling; row b draws from a stream of its own, `seed + b`.
        logits_processor: transformers' processors, applied before sampling.
        eos_token_id: what ends a row. None: what the model says; an empty sequence: nothing.
        prefill_chunk: read the prompt in pieces of this many tokens (less memory, same result).
        cache: a fresh `KVCache` for this model, to look into afterwards; None makes one.
        eager: on a GPU, run every step from Python instead of capturing it as one CUDA graph (`graph.why_not` says what
            cannot be captured; neither can a step with `logits_processor`).

    Raises:
        UserError: before anything is computed, for a prompt that is empty or too long, or parameters out of range;
            during decoding, if the model's logits are NaN.
    """
    rows = token_lists(model, prompts)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    check_lengths(model, rows, max_new_tokens)
    ends = end_tokens(model, eos_token_id)
    sampler = Sampler(temperature, top_k, top_p, seed, logits_processor, rows, model.device)
    decoder = Decoder(model, rows, policy, max_new_tokens, prefill_chunk, cache)
    return _decode(_Generation(decoder, sampler, ends, pad_token(model, ends), eager), max_new_tokens)


def _decode(generation: _Generation, max_new_tokens: int) -> Iterator[torch.Tensor]:
    generation.begin()
    for step in range(max_new_tokens):
        broken, all_ended = generation.status.tolist()  # the one look at the device in a step
        if broken:
            model = generation.decoder.model
            raise UserError(
                f"the model's logits are NaN at new token {step + 1}: its weights or its dtype ({model.dtype}) are at "
                "fault, or a custom policy is; try dtype float32 and policy dense"
            )
        yield generation.tokens.clone()
        if all_ended or step + 1 == max_new_tokens:
            return
        generation.advance()


class _Generation:
    """The state of a decode, in tensors that stay where they are, and the step that moves it on."""

    def __init__(self, decoder: Decoder, sampler: Sampler, ends: list[int], pad: int, eager: bool) -> None:
        self.decoder, self.sampler, self.pad = decoder, sampler, pad
        rows, device = len(decoder.rows), decoder.model.device
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.status = torch.zeros(2, dtype=torch.bool, device=device)  # a NaN was seen; every row has ended
        self.ends = torch.tensor(ends, device=device)
        self.captured = (
            not eager
            and sampler.ids is None
            and not parallel.is_split(decoder.model)  # what the processes send each other is not captured
            and graph.why_not(decoder.cache, device) is None
        )
        self.advance: Callable[[], None] = self.step

    def begin(self) -> None:
        """Prefill, and choose the first token."""
        logits = self.decoder.prefill()
        if self.captured:
            self.decoder.cache.fix_shapes(self.decoder.room)
            replay = graph.StepGraph(self.step, self.sampler.streams)

            def advance() -> None:
                replay()
                self.decoder.cache.count_fed()

            self.advance = advance
        self.choose(logits)

    def step(self) -> None:
        """Feed the tokens, choose the next ones. Works in place and never looks at the device."""
        self.choose(self.decoder.step(self.tokens, ~self.ended if len(self.ends) else None))

    def choose(self, logits: torch.Tensor) -> None:
        broken = (logits.isnan().any(1) & ~self.ended).any()
        self.tokens.copy_(self.sampler(logits).masked_fill(self.ended, self.pad))
        self.ended |= (self.tokens[:, None] == self.ends).any(1)
        self.status.copy_(torch.stack([broken, self.ended.all()]))


class Forced(NamedTuple):
    """What a model thinks of a given continuation, token by token."""

    log_probabilities: torch.Tensor  # [n] float32, natural
    likeliest: torch.Tensor  # [n] bool: greedy decoding would have said this token


def score(
    model: PreTrainedModel,
    prompts: Prompts,
    continuations: Prompts,
    policy: Policy | None = None,
    *,
    prefill_chunk: int | None = None,
    cache: KVCache | None = None,
) -> list[torch.Tensor]:
    """Natural-log probability of every token of `continuations[b]` after `prompts[b]`: one float32 tensor a row.

    The tokens are fed one at a time through the decode path, so that the policy acts on all but the first.
    """
    scored = force(model, prompts, continuations, policy, prefill_chunk=prefill_chunk, cache=cache)
    return [row.log_probabilities for row in scored]


def force(
    model: PreTrainedModel,
    prompts: Prompts,
    continuations: Prompts,
    policy: Policy | None = None,
    *,
    prefill_chunk: int | None = None,
    cache: KVCache | None = None,
) -> list[Forced]:
    """As `score`, and whether each token is the likeliest."""
    rows, forced = token_lists(model, prompts), token_lists(model, continuations, "continuation")
    if len(rows) != len(forced):
        raise UserError(f"{len(rows)} prompts, but {len(forced)} continuations")
    longest = max(map(len, forced))
    check_lengths(model, rows, longest - 1)  # the last token is predicted, and takes no position
    decoder = Decoder(model, rows, policy, longest, prefill_chunk, cache)
    padded = torch.zeros(len(rows), longest, dtype=torch.int64)
    sizes = torch.tensor([len(row) for row in forced])
    for row, tokens in zip(padded, forced, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    padded, sizes = padded.to(model.device), sizes.to(model.device)
    logits, found, likeliest = decoder.prefill(), [], []
    for step in range(longest):
        probabilities = torch.log_softmax(logits.float(), -1)
        found.append(probabilities.gather(1, padded[:, step : step + 1]))
        likeliest.append(probabilities.argmax(1) == padded[:, step])
        if step + 1 < longest:
            logits = decoder.step(padded[:, step], step + 1 < sizes)
    table, said = torch.cat(found, 1).cpu(), torch.stack(likeliest, 1).cpu()
    return [Forced(table[b, : len(row)], said[b, : len(row)]) for b, row in enumerate(forced)]


class Decoder:
    """A batch of prompts being decoded with one cache: prefill once, then step."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: list[list[int]],
        policy: Policy | None,
        max_new_tokens: int,
        prefill_chunk: int | None = None,
        cache: KVCache | None = None,
    ) -> None:
        if prefill_chunk is not None and prefill_chunk < 1:
            raise UserError(f"prefill_chunk must be at least 1 token, not {prefill_chunk}")
        self.model, self.rows, self.chunk = model, rows, prefill_chunk
        longest = max(map(len, rows))
        self.cache = cache if cache is not None else KVCache(model, policy, capacity=longest + max_new_tokens)
        if self.cache.get_seq_length() > 0:
            raise UserError("the cache already holds tokens; decode needs a fresh one")
        if cache is not None and policy is not None and cache.policy != policy:
            raise UserError(f"the cache was made for the policy {cache.policy}, not for {policy}")
        self.room = longest + max_new_tokens
        self.cache.check_room(self.room)
        # Left-padded: the last column is every row's last token. The cache drops the padding.
        ids = [[0] * (longest - len(row)) + row for row in rows]
        self.ids = torch.tensor(ids, device=model.device)
        sizes = torch.tensor([len(row) for row in rows], device=model.device)
        self.mask = torch.arange(longest, device=model.device) >= (longest - sizes)[:, None]
        self.ragged = any(len(row) < longest for row in rows)
        self.positions = sizes  # of the next token, per row
        # A layer that transformers manages needs the padding at every step; ours know it from the prompt on.
        self.tells_padding = self.ragged and not all(
            isinstance(layer, LayerCache) for layer in self.cache.layers
        )

    @torch.no_grad()
    def prefill(self) -> torch.Tensor:
        """Logits `[B, V]` of the first new token."""
        total = self.ids.shape[1]
        step = self.chunk or total
        self.cache.expect_prompt(total)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)
        logits = torch.empty(0)
        for first in range(0, total, step):
            last = min(first + step, total)
            logits = self.model(
                input_ids=self.ids[:, first:last],
                attention_mask=self.mask[:, :last].long() if self.ragged else None,
                position_ids=positions[:, first:last],
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            ).logits
        return logits[:, -1]

    @torch.no_grad()
    def step(self, tokens: torch.Tensor, active: torch.Tensor | None = None) -> torch.Tensor:
        """Feed `tokens [B]`, return the logits `[B, V]` of the next; inactive rows `[B]` False only keep their
        place."""
        self.cache.set_active(active)
        mask = None
        if self.tells_padding:
            self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), 1)], 1)
            mask = self.mask.long()
        logits = self.model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=self.positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        self.positions += 1 if active is None else active.long()
        return logits[:, -1]
