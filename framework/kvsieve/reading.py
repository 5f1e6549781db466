"""Read prompts into a cache: as a whole, or pass by pass as the policy plans it, stage by stage.

What stands outside of the forwards, dropping tokens before a pass and taking a probe back after it, is done
for all layers at once.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from transformers import PreTrainedModel

from .arguments import whole
from .cache.forward import Forward
from .cache.kv_cache import KVCache, checked_cache
from .errors import UserError
from .plans import Segments, Stage, checked_plan, checked_segments, schedule, slots_needed
from .policy import Policy, Positions
from .prompts import Prompts, check_lengths, token_lists


def read(
    model: PreTrainedModel,
    prompts: Prompts,
    cache: KVCache,
    *,
    segments: Segments | None = None,
    leave: int = 1,
    prefill_chunk: int | None = None,
    reader: Reader | Begun | None = None,
) -> None:
    """Read `prompts` into an empty cache by the plan of its policy, and say no word.

    All but the last token of each, so that `model.generate(..., past_key_values=cache)` can follow with the
    whole prompts, padded on the left. With `leave = 0` all of it: the policy then decides who stays, and
    other texts can follow, in `generate` or in `kvsieve.decode(..., cache=cache)`. Several questions about
    one document: one `cache.clone()` each.

    Args:
        prompts, segments, prefill_chunk: as in `decode`.
        cache: empty, for this model.
        leave: number of tokens at the end of each prompt that are not read.
        reader: reads in place of the model: a recording of the prompts, or their reading begun, made by it.

    Raises:
        UserError: before anything is computed, as `decode`; or where a prompt has no more than `leave`
            tokens.
    """
    checked_cache(cache)
    rows, leave = token_lists(model, prompts), whole("leave", leave, 0, "tokens")
    for b, row in enumerate(rows):
        if len(row) <= leave:
            raise UserError(f"prompt {b} has {len(row)} tokens: with leave={leave} nothing is left to read")
    check_positions(model, rows, 0, cache.policy)
    cache.check_empty()
    reading = Reading(reader or model, rows, cache.policy, segments, prefill_chunk, leave)
    reading.check_cache(cache)
    reading.run(cache)
    cache.mark_read()


def cache_for(model: PreTrainedModel, rows: list[list[int]], policy: Policy, new_tokens: int) -> KVCache:
    """Make a cache with room for these prompts, as the policy reads them, and so many new tokens."""
    return KVCache(model, policy, capacity=Reading(model, rows, policy).room(new_tokens))


def check_positions(
    model: PreTrainedModel, rows: list[list[int]], new_tokens: int, policy: Policy, before: int = 0
) -> None:
    """Raise UserError if texts are longer than the model has positions, where the policy counts those of the
    text.
    """
    if policy.positions is not Positions.CACHE:
        check_lengths(model, rows, new_tokens, before)


class Reader(Protocol):
    """Reads prompts into a cache: a model; or a recording, which stands in for one."""

    @property
    def config(self) -> Any: ...
    @property
    def device(self) -> torch.device: ...
    def __call__(self, **inputs: Any) -> Any: ...


class Begun(NamedTuple):
    """The first stages of a reading. Nothing was dropped yet, and no prompt was said to be complete.

    Whoever would have read these stages alike can go on from here.
    """

    model: Reader
    cache: KVCache
    stages: int
    logits: torch.Tensor  # [B, V], of each row's last token so far
    mask: torch.Tensor  # [B, columns] bool: of the columns fed that stay, those that are no padding


class Reading:
    """Prompts and the way they are read, decided before anything is computed.

    Args:
        model: or a `Recording` of these rows, made by one; or their reading begun.
        rows: token ids, one list a row.
        policy: it is asked for a plan for each row.
        segments: of each row; None: a row is one segment.
        chunk: tokens that are fed at once, at most; None: a pass is fed as a whole.
        leave: tokens at the end of each row that are not read.
        before: tokens of each row that the cache holds already; then there is no plan. None: it is empty.

    Raises:
        UserError: segments or a plan that do not fit the rows.
    """

    def __init__(
        self,
        model: Reader | Begun,
        rows: list[list[int]],
        policy: Policy,
        segments: Segments | None = None,
        chunk: int | None = None,
        leave: int = 0,
        before: list[int] | None = None,
    ) -> None:
        if chunk is not None:
            chunk = whole("prefill_chunk", chunk, 1, "tokens")
        self.begun = model if isinstance(model, Begun) else None
        self.model = model = model.model if isinstance(model, Begun) else model
        self.chunk, self.policy = chunk, policy
        self.segments = checked_segments(segments, rows)
        plans = [policy.plan(each) if before is None else None for each in self.segments]
        self.planned = any(plan is not None for plan in plans)
        checked = [checked_plan(plan, len(row), policy) for plan, row in zip(plans, rows, strict=True)]
        self.before = before or [0] * len(rows)
        self.stages = schedule(rows, checked, functools.partial(_encoded, model), leave, self.before)
        # Columns of token ids as whoever comes later sees them: padded on the left.
        self.sizes = [len(row) - leave for row in rows]
        self.columns, self.leave = max(self.sizes), leave
        # Of each row, the tokens that are held afterwards, or were.
        self.ends = [n + size for n, size in zip(self.before, self.sizes, strict=True)]
        self.peak, self.held = slots_needed(self.stages)
        self.ragged = any(size < self.columns for size in self.sizes)

    def room(self, new_tokens: int) -> int:
        """The slots that a row needs for its prompt, beside what was held before, and so many new tokens, of
        which the last is never fed.
        """
        return max(self.peak, self.held + max(0, new_tokens - 1))

    def check_cache(self, cache: KVCache, new_tokens: int = 0) -> None:
        """Raise UserError if this cache cannot be read into so, or not hold as many new tokens then."""
        needed = self.room(new_tokens) + cache.slots_in_use()
        cache.check_room(needed)
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if self.policy.positions is Positions.CACHE and limit is not None and needed > limit:
            raise UserError(
                f"policy {self.policy.name} holds up to {needed} tokens at once, and "
                f"{type(self.model).__name__} has {limit} positions (max_position_embeddings): let it hold "
                "fewer"
            )
        ends = [b + len(t) for stage in self.stages for b, t in zip(stage.begins, stage.tokens, strict=True)]
        if self.policy.positions is not Positions.CACHE and limit is not None and max(ends) > limit:
            raise UserError(
                f"policy {self.policy.name} reads these prompts up to position {max(ends)}, its probes "
                f"included, and {type(self.model).__name__} has {limit} positions (max_position_embeddings)"
            )
        others = {type(layer).__name__ for layer in cache.other_layers}
        who = f"{type(self.model).__name__} has layers that are not the policy's ({', '.join(others)})"
        if others and any(stage.kind is Forward.PROBE for stage in self.stages):
            raise UserError(
                f"policy {self.policy.name} reads probes and takes them back, and {who}, which cannot"
            )
        uneven = any(len(set(map(len, stage.tokens))) > 1 for stage in self.stages)
        if others and uneven and (len(self.stages) > 1 or any(self.before)):
            raise UserError(
                f"{who}, which know padding on the left only: to read prompts in several passes, or to "
                "continue texts, give rows of equal segments, or one at a time"
            )

    @torch.no_grad()
    def run(self, cache: KVCache) -> torch.Tensor:
        """Read; return the logits `[B, V]` that the last token of each row gives."""
        obeys = [
            layer
            for layer in cache.policy_layers
            if not self.planned or layer.policy.plan(self.segments[0]) is not None
        ]
        fed, done = cache.get_seq_length(), 0
        if self.begun is None:
            mask, logits = self._nothing_fed(fed)
        else:
            cache.go_on_from(self.begun.cache)
            done, logits, mask = self.begun.stages, self.begun.logits, self.begun.mask
            if self.stages[done - 1].completes:
                cache.complete_prompt()
        for stage in self.stages[done:]:
            for layer in obeys:
                layer.make_way(stage.rooms_of(self.model.device))
            if any(stage.tokens):
                logits, mask = self._feed(cache, stage, logits, mask)
            if stage.completes and stage.kind is not Forward.PROMPT:
                cache.complete_prompt()
        cache.end_reading(fed + self.columns, self.leave, trim=len(self.stages) > 1)
        return logits

    @torch.no_grad()
    def begin(self, cache: KVCache, stages: int) -> Begun:
        """Read the first stages into an empty cache: no more than come before anything is dropped."""
        mask, logits = self._nothing_fed(0)
        for stage in self.stages[:stages]:
            kind = Forward.CHUNK if stage.kind is Forward.PROMPT else stage.kind  # who goes on completes it
            logits, mask = self._feed(cache, stage._replace(kind=kind), logits, mask)
        return Begun(self.model, cache, stages, logits, mask)

    def _nothing_fed(self, fed: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The mask of columns that were fed before, the rows' tokens padded on the left; and no logits."""
        device = self.model.device
        mask = torch.arange(fed, device=device) >= fed - self._row(self.before)[:, None]
        return mask, torch.empty(0, device=device)

    def _feed(
        self, cache: KVCache, stage: Stage, before: torch.Tensor, mask: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one stage; return the logits `[B, V]` of the rows' last tokens so far, those `before` it given,
        and the mask of the columns that stay.
        """
        sizes = [len(tokens) for tokens in stage.tokens]
        size = max(sizes)
        # Padded on the left: the last column is every row's last token. The cache drops the padding.
        ids = torch.tensor([[0] * (size - len(row)) + row for row in stage.tokens], device=mask.device)
        real = torch.arange(size, device=mask.device) >= size - self._row(sizes)[:, None]
        ragged = self.ragged or len(set(sizes)) > 1 or len(set(self.before)) > 1
        positions = (self._row(stage.begins)[:, None] + real.cumsum(1) - 1).clamp(min=0)
        columns = torch.cat([mask, real], 1)
        logits, chunk = torch.empty(0), self.chunk or size
        cache.begin_pass(stage.kind, self._row([n > 0 for n in sizes]), self._row(stage.spans))
        try:
            for first in range(0, size, chunk):
                last = min(first + chunk, size)
                more = last < size and stage.kind is Forward.PROMPT
                cache.expect(Forward.CHUNK if more else stage.kind)
                logits = self.model(
                    input_ids=ids[:, first:last],
                    attention_mask=columns[:, : mask.shape[1] + last].long() if ragged else None,
                    position_ids=positions[:, first:last],
                    past_key_values=cache,
                    use_cache=True,
                    logits_to_keep=1,
                ).logits
        finally:
            cache.expect(None)
        cache.end_pass(ragged and (len(self.stages) > 1 or any(self.before)))
        if stage.kind is Forward.PROBE:
            return before, mask
        last_logits, among = logits[:, -1], self._row([n > 0 for n in sizes])
        return last_logits if len(before) == 0 else torch.where(among[:, None], last_logits, before), columns

    def _row(self, values: Sequence[object]) -> torch.Tensor:
        return torch.tensor(values, device=self.model.device)


def _encoded(model: Reader, part: str | tuple[int, ...]) -> list[int]:
    """Token ids of text, without those that begin a text, or checked ids."""
    return (
        token_lists(cast(PreTrainedModel, model), cast(Prompts, [part]), "part of a probe")[0] if part else []
    )
