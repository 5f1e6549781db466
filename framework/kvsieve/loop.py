"""The decode loop: prefill the prompts, then one token a row per step.

    for token_ids in kvsieve.decode(model, prompts, policy, max_new_tokens=256): ...

A generator: streaming, timing and progress wrap the loop instead of entering it. Prefill is dense; the first new token
comes from it, and the policy acts from the second on, as in the SparQ paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from . import graph, transfer
from .cache.kv_cache import KVCache
from .cache.layer import LayerCache
from .errors import UserError
from .policy import Policy
from .prompts import Prompts, check_lengths, end_tokens, pad_token, token_lists
from .sampling import Given, Sampler


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
        cache: an empty `KVCache` for this model, to look into afterwards; None makes one. One that was used and
            `reset()` keeps its storage, and with it the captured step.
        eager: on a GPU, run every step from Python instead of capturing it as one CUDA graph. Afterwards
            `cache.ran_eagerly` says why the steps were run from Python, or None: they were a graph.

    Raises:
        UserError: before anything is computed, for a prompt that is empty or too long, or parameters out of range;
            during decoding, if the model's logits are NaN.
    """
    rows = token_lists(model, prompts)
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    check_lengths(model, rows, max_new_tokens)
    ends = end_tokens(model, eos_token_id)
    pad = pad_token(model, ends)
    sampler = Sampler(temperature, top_k, top_p, seed, logits_processor, rows, model.device, ends, pad)
    decoder = Decoder(model, rows, policy, max_new_tokens, prefill_chunk, cache)
    return _decode(Generation(decoder, sampler, eager), max_new_tokens)


def _decode(generation: Generation, max_new_tokens: int) -> Iterator[torch.Tensor]:
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


class Generation:
    """The state of a decode, in tensors that stay where they are, and the step that moves it on."""

    def __init__(self, decoder: Decoder, choice: Sampler | Given, eager: bool) -> None:
        self.decoder, self.choice = decoder, choice
        rows, device = len(decoder.rows), decoder.model.device
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.ended = torch.zeros(rows, dtype=torch.bool, device=device)
        self.status = torch.zeros(2, dtype=torch.bool, device=device)  # a NaN was seen; every row has ended
        self.ran_eagerly = graph.EAGER if eager else None
        self.ran_eagerly = (
            self.ran_eagerly or choice.why_not_captured or graph.why_not(decoder.cache, decoder.model)
        )
        self.replay: graph.StepGraph | None = None

    def begin(self) -> None:
        """Prefill, and choose the first token."""
        cache = self.decoder.cache
        logits = self.decoder.prefill()
        cache.ran_eagerly = self.ran_eagerly
        if self.ran_eagerly is None:
            cache.fix_shapes(self.decoder.room)
            self._replay()
        self.choose(logits)

    def _replay(self) -> None:
        """From now on a step is a graph: the one that was captured with this cache before, if it still fits."""
        cache, model = self.decoder.cache, self.decoder.model
        self.key = self.choice.kind, model, transfer.current(), cache.places()
        known = cache.captured if cache.captured is not None and cache.captured.key == self.key else None
        if known is not None:  # go on in its tensors
            known.choice.restart(self.choice)
            known.positions.copy_(self.decoder.positions)
            self.choice, self.decoder.positions = known.choice, known.positions
            self.tokens, self.ended, self.status = known.tokens, known.ended, known.status
            self.ended.zero_()
        self.replay = graph.StepGraph(
            model.device, self.choice.streams, None if known is None else known.graph
        )

    def advance(self) -> None:
        """One step."""
        if self.replay is None:
            self.step()
            return
        captured, cache = self.replay.graph, self.decoder.cache
        self.replay(self.step)
        cache.count_fed()
        if captured is None and self.replay.graph is not None:
            state = self.choice, self.decoder.positions, self.tokens, self.ended, self.status
            cache.captured = graph.Captured(self.key, self.replay.graph, *state)

    def step(self) -> None:
        """Feed the tokens, choose the next ones. Works in place and never looks at the device."""
        self.choose(self.decoder.step(self.tokens, ~self.ended if self.choice.rows_end else None))

    def choose(self, logits: torch.Tensor) -> None:
        broken = (logits.isnan().any(1) & ~self.ended).any()
        self.tokens.copy_(self.choice(logits, self.ended))
        self.status.copy_(torch.stack([broken, self.ended.all()]))


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
