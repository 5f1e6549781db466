"""Read prompts into a cache: as a whole, or pass by pass as the policy plans it.

A **stage** is one forward: of each row at most one pass, all of one kind; a row without one is padding. Rows
whose plans have fewer passes begin later, so that all end together. What stands outside of the forwards,
dropping tokens before a pass and taking a probe back after it, is done for all layers at once.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch
from transformers import PreTrainedModel

from .cache.forward import Forward
from .cache.kv_cache import KVCache
from .cache.layer import LayerCache
from .errors import UserError
from .policy import Pass, Policy, Positions
from .prompts import Prompts, check_lengths, token_lists

Segments = Sequence[Sequence[int]]


def read(
    model: PreTrainedModel,
    prompts: Prompts,
    cache: KVCache,
    *,
    segments: Segments | None = None,
    leave: int = 1,
    prefill_chunk: int | None = None,
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

    Raises:
        UserError: before anything is computed, as `decode`; or where a prompt has no more than `leave`
            tokens.
    """
    rows = token_lists(model, prompts)
    if isinstance(leave, bool) or not isinstance(leave, int) or leave < 0:
        raise UserError(f"leave must be a number of tokens, 0 or more, not {leave!r}")
    for b, row in enumerate(rows):
        if len(row) <= leave:
            raise UserError(f"prompt {b} has {len(row)} tokens: with leave={leave} nothing is left to read")
    check_positions(model, rows, 0, cache.policy)
    cache.check_empty()
    reading = Reading(model, rows, cache.policy, segments, prefill_chunk, leave)
    reading.check_cache(cache)
    reading.run(cache)
    cache.mark_read()


def check_positions(
    model: PreTrainedModel, rows: list[list[int]], new_tokens: int, policy: Policy, before: int = 0
) -> None:
    """Raise UserError if texts are longer than the model has positions, where the policy counts those of the
    text.
    """
    if policy.positions is not Positions.CACHE:
        check_lengths(model, rows, new_tokens, before)


class Stage(NamedTuple):
    """One forward's worth of several rows; the lists are by row."""

    kind: Forward
    tokens: list[list[int]]  # none: the row is not in this stage
    begins: list[int]  # the position of the first token
    spans: list[tuple[int, int]]  # `first` and `last` of the pass
    rooms: list[int | None]
    completes: bool = False  # afterwards the prompts, so far as they were read, are complete

    def rooms_of(self, device: torch.device) -> torch.Tensor | None:
        """`[B]`: the slots that stay before it; None: all in every row."""
        if all(room is None for room in self.rooms):
            return None
        return torch.tensor([2**62 if room is None else room for room in self.rooms], device=device)


class Reading:
    """Prompts and the way they are read, decided before anything is computed.

    Args:
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
        model: PreTrainedModel,
        rows: list[list[int]],
        policy: Policy,
        segments: Segments | None = None,
        chunk: int | None = None,
        leave: int = 0,
        before: list[int] | None = None,
    ) -> None:
        if chunk is not None and chunk < 1:
            raise UserError(f"prefill_chunk must be at least 1 token, not {chunk}")
        self.model, self.chunk, self.policy = model, chunk, policy
        self.segments = _checked_segments(segments, rows)
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
        self.peak, self.held = _slots_needed(self.stages)
        self.ragged = any(size < self.columns for size in self.sizes)

    def check_cache(self, cache: KVCache, new_tokens: int = 0) -> None:
        """Raise UserError if this cache cannot be read into so, or not hold as many new tokens then."""
        needed = max(self.peak, self.held + new_tokens) + cache.slots_in_use()
        cache.check_room(needed)
        limit = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if self.policy.positions is Positions.CACHE and limit is not None and needed > limit:
            raise UserError(
                f"policy {self.policy.name} holds up to {needed} tokens at once, and "
                f"{type(self.model).__name__} has {limit} positions (max_position_embeddings): let it hold "
                "fewer"
            )
        others = {type(layer).__name__ for layer in cache.layers if not isinstance(layer, LayerCache)}
        who = f"{type(self.model).__name__} has layers that are not the policy's ({', '.join(others)})"
        if others and any(stage.kind is Forward.PROBE for stage in self.stages):
            raise UserError(
                f"policy {self.policy.name} reads probes and takes them back, and {who}, which cannot: they "
                "keep what their windows keep"
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
        fed = cache.get_seq_length()
        # The columns fed; earlier ones are the rows' tokens, padded on the left.
        device = self.model.device
        mask = torch.arange(fed, device=device) >= fed - self._row(self.before)[:, None]
        logits = torch.empty(0, device=device)
        for stage in self.stages:
            for layer in obeys:
                layer.make_way(stage.rooms_of(device))
            if any(stage.tokens):
                found, mask = self._feed(cache, stage, mask)
                if stage.kind is not Forward.PROBE:
                    among = self._row([bool(tokens) for tokens in stage.tokens])
                    logits = found if len(logits) == 0 else torch.where(among[:, None], found, logits)
            if stage.completes and stage.kind is not Forward.PROMPT:
                cache.complete_prompt()
        cache.end_reading(fed + self.columns, self.leave, trim=len(self.stages) > 1)
        return logits

    def _feed(self, cache: KVCache, stage: Stage, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Run one stage; return its last logits `[B, V]` and the mask of the columns that stay."""
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
        return logits[:, -1], mask if stage.kind is Forward.PROBE else columns

    def _row(self, values: Sequence[object]) -> torch.Tensor:
        return torch.tensor(values, device=self.model.device)


def schedule(
    rows: list[list[int]],
    plans: list[list[Pass]],
    encode: Callable[[str | tuple[int, ...]], list[int]],
    leave: int = 0,
    before: list[int] | None = None,
) -> list[Stage]:
    """Make the stages of all rows, which end together.

    `encode` gives the token ids of what a probe feeds beside the prompt's tokens.

    Raises:
        UserError: plans that do not fit each other.
    """
    stages: list[Stage] = []
    ends = list(before or [0] * len(rows))  # of each row, the position of its next token
    for turn in range(-max(map(len, plans)), 0):
        due = {b: plan[turn] for b, plan in enumerate(plans) if -turn <= len(plan)}
        cuts = {each.cut for each in due.values()} | {False for _ in range(len(due), len(rows))}
        if len(cuts) > 1:
            raise UserError(
                "rows whose plans cut at other passes cannot be read together: read them one by one"
            )
        steps = [each.step for each in due.values()]
        if stages and (cuts == {True} or (any(steps) and stages[-1].kind is not Forward.STEP)):
            stages[-1] = _completed(stages[-1])
        for kind in (Forward.CHUNK, Forward.PROBE, Forward.STEP):
            now = {b: each for b, each in due.items() if _kind(each) is kind}
            if not now:
                continue
            stage = Stage(kind, [], list(ends), [], [])
            for b, row in enumerate(rows):
                each = now.get(b, Pass(0, 0))
                last = min(each.last, len(row) - leave) if each.stays else each.last
                parts = [row[p.start : p.stop] if isinstance(p, range) else encode(p) for p in each.before]
                stage.tokens.append([*itertools.chain(*parts), *row[each.first : last]])
                stage.spans.append((each.first, each.last))
                stage.rooms.append(each.room)
                ends[b] += len(stage.tokens[b]) if each.stays else 0
            stages.append(stage)
    if leave == 0 and stages[-1].kind is not Forward.STEP:
        stages[-1] = _completed(stages[-1])
    return stages


def _slots_needed(stages: list[Stage]) -> tuple[int, int]:
    """The slots that a row needs while it is read, and those that are in use then, at most.

    Beside what was held before. Only `room` counts: what a cut leaves is not known yet.
    """
    peak, held = 0, [0] * len(stages[0].tokens)
    for stage in stages:
        held = [n if room is None else min(n, room) for n, room in zip(held, stage.rooms, strict=True)]
        peak = max(peak, max(held) + max(map(len, stage.tokens)))
        if stage.kind is not Forward.PROBE:
            held = [n + len(tokens) for n, tokens in zip(held, stage.tokens, strict=True)]
    return peak, max(held)


def _completed(stage: Stage) -> Stage:
    """The same as the end of the prompts: where all rows are in it, each layer ends within the forward."""
    whole = stage.kind is Forward.CHUNK and all(stage.tokens)
    return stage._replace(kind=Forward.PROMPT if whole else stage.kind, completes=True)


def _kind(each: Pass) -> Forward:
    if not each.stays:
        return Forward.PROBE
    return Forward.STEP if each.step else Forward.CHUNK


def _encoded(model: PreTrainedModel, part: str | tuple[int, ...]) -> list[int]:
    """Token ids of text, without those that begin a text, or checked ids."""
    return token_lists(model, cast(Prompts, [part]), "part of a probe")[0] if part else []


# -------------------------------------------------------------------- what is refused
def _checked_segments(segments: Segments | None, rows: list[list[int]]) -> list[list[int]]:
    if segments is None:
        return [[len(row)] for row in rows]
    if len(segments) != len(rows):
        raise UserError(f"segments are given for {len(segments)} rows, and there are {len(rows)} prompts")
    checked = [list(each) for each in segments]
    for b, (each, row) in enumerate(zip(checked, rows, strict=True)):
        numbers = all(isinstance(n, int) and not isinstance(n, bool) and n > 0 for n in each)
        if not numbers or sum(each) != len(row):
            raise UserError(
                f"segments of prompt {b} are {each}; they must be numbers of tokens, each at least 1, whose "
                f"sum is the length of the prompt, {len(row)}"
            )
    return checked


def checked_plan(plan: object, size: int, policy: Policy) -> list[Pass]:
    """Return a plan that can be followed for a prompt of `size` tokens; of None, one pass.

    Raises:
        UserError: naming the policy, and what cannot be.
    """
    if plan is None:
        return [Pass(0, size)]

    def refuse(why: str) -> UserError:
        return UserError(f"policy {policy.name}: the plan for a prompt of {size} tokens {why}")

    if not isinstance(plan, Sequence) or not all(isinstance(each, Pass) for each in plan) or not plan:
        raise refuse(f"must be a list of kvsieve.Pass, not {plan!r}")
    end = 0
    for number, each in enumerate(cast(Sequence[Pass], plan)):
        if not 0 <= each.first <= each.last <= size:
            raise refuse(f"has pass {number} over tokens {each.first} to {each.last}")
        if each.room is not None and each.room < 1:
            raise refuse(f"leaves room for {each.room} slots before pass {number}; a head keeps at least 1")
        if each.stays and each.before:
            raise refuse(f"feeds tokens before pass {number}, which stays: only a probe can have them")
        if each.step and (not each.stays or each.last != each.first + 1 or number == 0):
            raise refuse(f"has a decode step as pass {number}: a step is of 1 token, stays, and comes later")
        if each.stays and each.first != end:
            raise refuse(f"goes on at token {each.first} in pass {number}, where {end} were read")
        if number == 0 and not each.stays:
            raise refuse("begins with a probe, before anything is held")
        end = each.last if each.stays else end
    if end != size:
        raise refuse(f"reads {end} of them")
    return list(cast(Sequence[Pass], plan))
