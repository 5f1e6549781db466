"""The decode loop: prefill the prompts, then one token a row per step.

    for token_ids in kvsieve.decode(model, prompts, policy, max_new_tokens=256): ...

A generator: streaming, timing and progress wrap the loop instead of entering it. Prefill is dense; the first
new token comes from it, and the policy acts from the second on, as in the SparQ paper.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from transformers import LogitsProcessorList, PreTrainedModel

from . import graph
from .arguments import whole
from .cache.kv_cache import KVCache, checked_cache
from .contract import checked_policy
from .errors import UserError
from .plans import Segments
from .policy import Policy
from .prompts import Prompts, end_tokens, pad_token, token_lists
from .reading import Begun, Reader, Reading, check_positions
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
    segments: Segments | None = None,
    cache: KVCache | None = None,
    eager: bool = False,
) -> Iterator[torch.Tensor]:
    """Decode `prompts` together, yielding the next token ids `[B]` of all rows at every step.

    Rows do not influence each other. A row that has ended repeats the pad token; when all have, the loop
    stops.

    Args:
        model: from `kvsieve.load` or `kvsieve.prepare`.
        prompts: one text or several; token ids: lists of different lengths, or a tensor `[B, P]` without
            padding; or what a tokenizer returns for several texts, with its `attention_mask`.
        policy: None is dense.
        max_new_tokens: at most this many per row.
        temperature, top_k, top_p: given any of these, sample; else take the most likely token.
        seed: of the sampling, from 0 to 2**64 - B; row b draws from a stream of its own, `seed + b`.
        logits_processor: transformers' processors, applied before sampling. Each row is shown its own tokens
            without padding: prompts of different lengths one by one, as `[1, n]`.
        eos_token_id: the tokens that end a row. None: as the model says; an empty sequence: none.
        prefill_chunk: read the prompt in pieces of this many tokens (less memory, same result).
        segments: of each row, numbers of tokens that add up to its prompt: its context and its question,
            say, or the turns of a conversation. Policies that read a prompt by a plan go by them.
        cache: an empty `KVCache` for this model, to look into afterwards; None makes one. It belongs to this
            decode until the last token or `cache.reset()`. One that was `reset()` keeps its storage and its
            captured step. Where `kvsieve.read` has put texts into it, the prompts continue them.
        eager: on a GPU, run every step from Python instead of capturing it as one CUDA graph. Afterwards
            `cache.eager_because` says why the steps were run from Python, or None: they were a graph.

    Raises: UserError: before anything is computed, for a prompt that is empty or too long, or parameters out
        of range;
            at the prefill, if the cache is in use or holds tokens; during decoding, if the model's logits are
            NaN or a logits_processor leaves a row no token.
    """
    rows = token_lists(model, prompts)
    max_new_tokens = whole("max_new_tokens", max_new_tokens, 1)
    check_positions(model, rows, max_new_tokens, policy_of(policy, cache))
    ends = end_tokens(model, eos_token_id)
    pad = pad_token(model, ends)
    sampler = Sampler(temperature, top_k, top_p, seed, logits_processor, rows, model.device, ends, pad)
    runner = Runner(model, rows, policy, max_new_tokens, prefill_chunk, cache, segments)
    return Decoding(runner, sampler, eager).tokens(max_new_tokens)


class Decoding:
    """One decode: `begin` prefills and chooses the first tokens, `advance` makes one step."""

    def __init__(self, runner: Runner, choice: Sampler | Given, eager: bool) -> None:
        self.runner, self.choice = runner, choice
        self.state = graph.State.at(runner.sizes.clone())
        why = graph.EAGER if eager else choice.why_not_captured
        self.eager_because = why or graph.why_not(runner.cache, runner.model)
        self.replay: graph.Replay | None = None
        self.claim: object = None  # on the cache, from `begin` to `end`

    def tokens(self, at_most: int) -> Iterator[torch.Tensor]:
        """Yield the tokens `[B]` of every step until all rows have ended."""
        try:
            self.begin()
            for step in range(at_most):
                if step > 0:
                    self.advance()
                # The one look at the device in a step.
                broken, unusable, all_ended = self.state.status.tolist()
                if broken:
                    raise self.broken(step + 1)
                if unusable:
                    raise UserError(
                        f"no token can be chosen at new token {step + 1}: behind the logits_processor and "
                        "the temperature, a row's logits are NaN or infinite"
                    )
                yield self.state.tokens.clone()
                if all_ended:
                    return
        finally:
            self.end()

    def begin(self) -> None:
        """Prefill, and choose the first token of each row."""
        cache = self.runner.cache
        self.claim = cache.claim()
        logits = self.runner.prefill()
        cache.eager_because = self.eager_because
        if self.eager_because is None:
            cache.fix_shapes(self.runner.room)
            self.replay = graph.Replay(cache, self.runner.model, self.choice, self.state)
            self.choice, self.state = self.replay.choice, self.replay.state
        self._choose(logits)

    def advance(self) -> None:
        """Make one step: from Python, or as the replay of a graph."""
        self.runner.cache.check_claim(self.claim)
        if self.replay is None:
            self.step()
        else:
            self.replay(self.step)

    def end_rows(self, rows: Sequence[int]) -> None:
        """End these rows: from the next step on they append nothing and are not counted.

        For a choice that was made with `rows_end`.
        """
        assert self.choice.rows_end
        self.state.ended[list(rows)] = True

    def end(self) -> None:
        """Give the cache back; its tokens stay."""
        self.runner.cache.release(self.claim)

    def step(self) -> None:
        """Feed the tokens, choose the next ones. Works in place and never looks at the device."""
        active = ~self.state.ended if self.choice.rows_end else None
        logits = self.runner.run(self.state.tokens, self.state.positions, active)
        self.state.positions.add_(1 if active is None else active.long())
        self._choose(logits)

    def _choose(self, logits: torch.Tensor) -> None:
        state = self.state
        broken = state.status[0] | (logits.isnan().any(1) & ~state.ended).any()
        state.tokens.copy_(self.choice(logits, state.ended))
        state.status.copy_(torch.stack([broken, self.choice.broken, state.ended.all()]))

    def broken(self, token: int | None = None) -> UserError:
        """The error for logits that are not numbers, at this new token or at some."""
        dtype, place = self.runner.model.dtype, "" if token is None else f" at new token {token}"
        return UserError(
            f"the model's logits are NaN{place}: its weights or its dtype ({dtype}) are at fault, or a "
            "custom policy is; try dtype float32 and policy dense"
        )


class Runner:
    """Runs the model on a batch of prompts with one cache: all of them once, then a token a row at a time."""

    def __init__(
        self,
        model: PreTrainedModel,
        rows: list[list[int]],
        policy: Policy | None,
        max_new_tokens: int,
        prefill_chunk: int | None = None,
        cache: KVCache | None = None,
        segments: Segments | None = None,
        reader: Reader | Begun | None = None,
    ) -> None:
        """`reader` reads the prompts: a `Recording` of them, or their reading begun; or None: the model."""
        before = None if cache is None else cache.tokens_read()
        if before is not None:
            _check_continuation(rows, before, segments)
            check_positions(model, rows, max_new_tokens, policy_of(policy, cache), max(before))
        if cache is not None and policy is not None and cache.policy != policy:
            raise UserError(f"the cache was made for the policy {cache.policy}, not for {policy}")
        self.model, self.rows = model, rows
        self.reading = Reading(
            reader or model, rows, policy_of(policy, cache), segments, prefill_chunk, before=before
        )
        needed = self.reading.room(max_new_tokens)
        self.cache = cache if cache is not None else KVCache(model, policy, capacity=needed)
        self.cache.check_free()
        self.reading.check_cache(self.cache, max_new_tokens)
        # Token columns of the prompts, and with those that follow.
        columns = self.cache.get_seq_length() + self.reading.columns
        self.room = columns + max_new_tokens - 1  # the last one is never fed
        # [B], tokens of the rows so far.
        self.sizes = torch.tensor(self.reading.ends, device=model.device)
        # A layer that transformers manages needs the padding at every step; ours know it from the prompt on.
        self.mask = torch.arange(columns, device=model.device) >= columns - self.sizes[:, None]
        ragged = any(end < columns for end in self.reading.ends)
        self.tells_padding = bool(self.cache.other_layers) and ragged

    def prefill(self) -> torch.Tensor:
        """Feed the prompts; return the logits `[B, V]` of the first new token."""
        return self.reading.run(self.cache)

    @torch.no_grad()
    def run(
        self, tokens: torch.Tensor, positions: torch.Tensor, active: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Feed `tokens [B]` at `positions [B]`; return the logits `[B, V]` of the next.

        Rows whose `active [B]` is False only keep their place.
        """
        self.cache.set_active(active)
        mask = None
        if self.tells_padding:
            told = self.mask.new_ones(len(self.rows)) if active is None else active
            self.mask = torch.cat([self.mask, told[:, None]], 1)
            mask = self.mask.long()
        logits = self.model(
            input_ids=tokens[:, None],
            attention_mask=mask,
            position_ids=positions[:, None],
            past_key_values=self.cache,
            use_cache=True,
        ).logits
        return logits[:, -1]


def policy_of(policy: Policy | None, cache: KVCache | None) -> Policy:
    """Return the policy of a decode that was given these.

    Raises:
        UserError: they are no policy or no cache.
    """
    of_cache = None if cache is None else checked_cache(cache).policy
    return checked_policy(of_cache if policy is None else policy)


def _check_continuation(rows: list[list[int]], before: list[int], segments: Segments | None) -> None:
    """Raise UserError for prompts that cannot follow what was read: tokens `before` of each row."""
    if len(rows) != len(before):
        raise UserError(
            f"{len(before)} rows were read into the cache, and {len(rows)} prompts are to continue them: "
            "call cache.batch_repeat_interleave(times) on a clone to ask several questions together"
        )
    if segments is not None:
        raise UserError("what continues a text that was read has no segments: they are for kvsieve.read")
