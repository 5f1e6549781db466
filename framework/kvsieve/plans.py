"""Plans as stages: how the prompts of a batch, each read pass by pass as a policy plans it, go together.

A **stage** is one forward: of each row at most one pass, all of one kind; a row without one is padding. Rows
whose plans have fewer passes begin later, so that all end together. Plain lists: nothing here is computed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple, cast

import torch

from .cache.forward import Forward
from .errors import UserError
from .policy import Pass, Policy

Segments = Sequence[Sequence[int]]


class Stage(NamedTuple):
    """One forward's worth of several rows; the lists are by row."""

    kind: Forward
    tokens: list[list[int]]  # none: the row is not in this stage
    begins: list[int]  # the position of the first token
    spans: list[tuple[int, int]]  # `first` and `last` of the pass, counted within the row's text
    rooms: list[int | None]
    completes: bool = False  # afterwards the prompts, so far as they were read, are complete

    def rooms_of(self, device: torch.device) -> torch.Tensor | None:
        """`[B]`: the slots that stay before it; None: all in every row."""
        if all(room is None for room in self.rooms):
            return None
        return torch.tensor([2**62 if room is None else room for room in self.rooms], device=device)


def schedule(
    rows: list[list[int]],
    plans: list[list[Pass]],
    encode: Callable[[str | tuple[int, ...]], list[int]],
    leave: int = 0,
    before: list[int] | None = None,
) -> list[Stage]:
    """Make the stages of all rows, which end together.

    `encode` gives the token ids of what a probe feeds beside the prompt's tokens; `before`: tokens of each
    row's text that were read earlier.

    Raises:
        UserError: plans that do not fit each other.
    """
    stages: list[Stage] = []
    before = before or [0] * len(rows)
    ends = list(before)  # of each row, the position of its next token
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
                held = before[b] if b in now else 0
                stage.spans.append((held + each.first, held + each.last))
                stage.rooms.append(each.room)
                ends[b] += len(stage.tokens[b]) if each.stays else 0
            stages.append(stage)
    if leave == 0 and stages[-1].kind is not Forward.STEP:
        stages[-1] = _completed(stages[-1])
    return stages


def read_alike(plans: Sequence[Sequence[Stage]]) -> int:
    """The number of first stages that plans for the same rows have in common, before any drops a token.

    Prompts that are complete may be cut: nothing after that is in common.
    """
    count = 0
    for stages in zip(*plans, strict=False):
        first = stages[0]
        if any(each._replace(rooms=first.rooms) != first or _drops(each) for each in stages):
            return count
        count += 1
        if first.completes:
            return count
    return count


def slots_needed(stages: list[Stage]) -> tuple[int, int]:
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


def _drops(stage: Stage) -> bool:
    """Whether tokens are dropped before it, where none were before."""
    return any(room is not None and room < held for room, held in zip(stage.rooms, stage.begins, strict=True))


def _completed(stage: Stage) -> Stage:
    """The same as the end of the prompts: where all rows are in it, each layer ends within the forward."""
    whole = stage.kind is Forward.CHUNK and all(stage.tokens)
    return stage._replace(kind=Forward.PROMPT if whole else stage.kind, completes=True)


def _kind(each: Pass) -> Forward:
    if not each.stays:
        return Forward.PROBE
    return Forward.STEP if each.step else Forward.CHUNK


# -------------------------------------------------------------------- what is refused
def checked_segments(segments: Segments | None, rows: list[list[int]]) -> list[list[int]]:
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
