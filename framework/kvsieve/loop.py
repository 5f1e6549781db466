"""The decode loop: prefill the prompts, then one token a row per step.

    for token_ids in kvsieve.decode(model, prompts, policy, max_new_tokens=256): ...

A generator: streaming, timing and progress wrap the loop instead of entering it. Prefill is dense; the first new token
comes from it, and the policy acts from the second on, as in the SparQ paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from .cache import KVCache, LayerCache
from .errors import UserError
from .policy import Policy

Prompts = str | Sequence[str] | Sequence[Sequence[int]] | torch.Tensor


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

    Raises:
        UserError: before anything is computed, for a prompt that is empty or too long, or parameters out of range;
            during decoding, if the model's logits are NaN.
    """
    rows = token_lists(model, prompts)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    check_lengths(model, rows, max_new_tokens)
    ends = _ends(model, eos_token_id)
    sampler = _Sampler(temperature, top_k, top_p, seed, logits_processor, len(rows), model.device)
    decoder = Decoder(model, rows, policy, max_new_tokens, prefill_chunk, cache)
    return _decode(decoder, sampler, ends, max_new_tokens, _pad_token(model, ends))


def _decode(
    decoder: Decoder, sampler: _Sampler, ends: list[int], max_new_tokens: int, pad: int
) -> Iterator[torch.Tensor]:
    logits = decoder.prefill()
    ended = torch.zeros(len(decoder.rows), dtype=torch.bool, device=logits.device)
    stops = torch.tensor(ends, device=logits.device)
    for step in range(max_new_tokens):
        tokens = sampler(decoder.ids, logits).masked_fill(ended, pad)
        ended = ended | torch.isin(tokens, stops)
        # One look at the device a step: is there a NaN, and has every row ended?
        broken, all_ended = torch.stack([(logits.isnan().any(1) & ~ended).any(), ended.all()]).tolist()
        if broken:
            raise UserError(
                f"the model's logits are NaN at new token {step + 1}: its weights or its dtype "
                f"({decoder.model.dtype}) are at fault, or a custom policy is; try dtype float32 and policy dense"
            )
        yield tokens
        if all_ended or step + 1 == max_new_tokens:
            return
        logits = decoder.step(tokens, ~ended if ends else None)


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
    rows, forced = token_lists(model, prompts), token_lists(model, continuations, "continuation")
    if len(rows) != len(forced):
        raise UserError(f"{len(rows)} prompts, but {len(forced)} continuations")
    longest = max(map(len, forced))
    check_lengths(model, rows, longest)
    decoder = Decoder(model, rows, policy, longest, prefill_chunk, cache)
    padded = torch.zeros(len(rows), longest, dtype=torch.int64)
    sizes = torch.tensor([len(row) for row in forced])
    for row, tokens in zip(padded, forced, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    padded, sizes = padded.to(model.device), sizes.to(model.device)
    logits, found = decoder.prefill(), []
    for step in range(longest):
        probabilities = torch.log_softmax(logits.float(), -1)
        found.append(probabilities.gather(1, padded[:, step : step + 1]))
        if step + 1 < longest:
            logits = decoder.step(padded[:, step], step + 1 < sizes)
    table = torch.cat(found, 1).cpu()
    return [table[b, : len(tokens)] for b, tokens in enumerate(forced)]


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
        self.cache.check_room(longest + max_new_tokens)
        # Left-padded: the last column is every row's last token. The cache drops the padding.
        ids = [[0] * (longest - len(row)) + row for row in rows]
        self.ids = torch.tensor(ids, device=model.device)
        sizes = torch.tensor([len(row) for row in rows], device=model.device)
        self.mask = torch.arange(longest, device=model.device) >= (longest - sizes)[:, None]
        self.ragged = any(len(row) < longest for row in rows)
        self.positions = sizes  # of the next token, per row
        # A layer that transformers manages needs the padding at every step; ours know it from the prompt on.
        self.tells_padding = self.ragged and not all(isinstance(layer, LayerCache) for layer in self.cache.layers)

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
        """Feed `tokens [B]`, return the logits `[B, V]` of the next; inactive rows `[B]` False only keep their place."""
        self.cache.set_active(active)
        self.ids = torch.cat([self.ids, tokens[:, None]], 1)
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
        self.positions = self.positions + (1 if active is None else active)
        return logits[:, -1]


class _Sampler:
    """The next token of each row: the most likely, or drawn from a stream of the row's own."""

    def __init__(
        self,
        temperature: float | None,
        top_k: int | None,
        top_p: float | None,
        seed: int,
        processors: LogitsProcessorList | None,
        rows: int,
        device: torch.device,
    ) -> None:
        self.processors = LogitsProcessorList(processors or [])
        self.draws = any(option is not None for option in (temperature, top_k, top_p))
        try:
            if temperature is not None and temperature != 1:
                self.processors.append(TemperatureLogitsWarper(float(temperature)))
            if top_k is not None:
                self.processors.append(TopKLogitsWarper(top_k))
            if top_p is not None:
                self.processors.append(TopPLogitsWarper(float(top_p)))
        except ValueError as error:
            raise UserError(f"sampling: {error}") from error
        self.streams = [torch.Generator(device).manual_seed(seed + row) for row in range(rows if self.draws else 0)]

    def __call__(self, ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        logits = self.processors(ids, logits.float())
        if not self.draws:
            return logits.argmax(-1)
        chances = torch.softmax(logits, -1).nan_to_num(1.0)  # a NaN is reported by the loop, not by multinomial
        return torch.cat([torch.multinomial(row, 1, generator=g) for row, g in zip(chances, self.streams, strict=True)])


def token_lists(model: PreTrainedModel, prompts: Prompts, what: str = "prompt") -> list[list[int]]:
    """Prompts in any accepted form as one list of token ids per row.

    Raises:
        UserError: none, or an empty one; text for a model without a tokenizer; an id outside the vocabulary.
    """
    if isinstance(prompts, str):
        prompts = [prompts]
    given: list[Any] = prompts.tolist() if isinstance(prompts, torch.Tensor) else list(prompts)
    tokenizer = getattr(model, "tokenizer", None)
    rows = []
    for b, prompt in enumerate(given):
        if isinstance(prompt, str):
            if tokenizer is None:
                raise UserError(f"{what} {b} is text, but the model has no tokenizer: give token ids, or set model.tokenizer")
            prompt = tokenizer(prompt)["input_ids"]
        rows.append([int(token) for token in prompt])
        if not rows[-1]:
            raise UserError(f"{what} {b} is empty: a model needs at least one token to start from")
        size = model.get_input_embeddings().num_embeddings
        if not 0 <= min(rows[-1]) <= max(rows[-1]) < size:
            raise UserError(f"{what} {b} has a token id outside the vocabulary (0 to {size - 1})")
    if not rows:
        raise UserError(f"no {what} was given")
    return rows


def check_lengths(model: PreTrainedModel, rows: list[list[int]], new_tokens: int) -> None:
    """Raise UserError if a prompt and its new tokens need more positions than the model has."""
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    longest = max(map(len, rows))
    if limit is not None and longest + new_tokens > limit:
        raise UserError(
            f"a prompt of {longest} tokens and {new_tokens} new ones need {longest + new_tokens} positions; "
            f"{type(model).__name__} has {limit} (max_position_embeddings)"
        )


def _ends(model: PreTrainedModel, eos_token_id: int | Sequence[int] | None) -> list[int]:
    if eos_token_id is None:
        generation = getattr(model, "generation_config", None)
        eos_token_id = getattr(generation, "eos_token_id", None)
        if eos_token_id is None:
            eos_token_id = getattr(model.config.get_text_config(decoder=True), "eos_token_id", None)
    if eos_token_id is None:
        return []
    return [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id)


def _pad_token(model: PreTrainedModel, ends: list[int]) -> int:
    pad = getattr(model.config.get_text_config(decoder=True), "pad_token_id", None)
    return pad if pad is not None else (ends[0] if ends else 0)
