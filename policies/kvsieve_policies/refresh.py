"""Search now and then: the slots that another policy chose are read again for some steps.

HiP (arXiv:2406.09827) and InfiniteHiP (arXiv:2502.08910) do so; this takes the idea to any policy that reads
a part. The one idea: neighbouring tokens attend to nearly the same places, so most of a search may be spared.

At steps 1, 1 + every, 1 + 2 every, ... after the prompt `inner` is asked. Between, what it chose is read, and
the tokens that came since. Choices: a tail (SparQ's mean value and its weight) stays as it was at the search;
where `inner` read everything, everything is read until it is asked again.

The search is really left out, so steps are not alike: one CUDA graph cannot hold them, and they run from
Python. What the search costs is saved; what `inner` keeps up (Quest's bounds) is kept up at every step.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from kvsieve import KVView, Policy, Positions, Selection, Shape, Tail, UserError, Wrapper


@dataclass(frozen=True)
class Refresh(Wrapper):
    """Asks `inner` at every `every`-th step, and reads the same slots and the newest between."""

    inner: Policy
    every: int = 8  # steps from one search to the next

    name: ClassVar[str] = "refresh"
    capturable = False

    def __post_init__(self) -> None:
        if self.every < 1:
            raise UserError(f"refresh.every must be at least 1 step, not {self.every}")
        if self.inner.drops:
            raise UserError(
                f"refresh.inner is {self.inner.name}, which drops tokens and does not search at every step: "
                "give a policy that keeps all and reads a part, such as sparq or quest"
            )
        if self.inner.positions is not Positions.TEXT:
            raise UserError(
                f"refresh.inner is {self.inner.name}, which turns queries or keys at every step: give one "
                "that leaves them as they are, such as sparq or quest"
            )

    @property
    def own_summaries(self) -> Mapping[str, Shape]:
        return {
            "slots": (torch.int32, "S"),
            "counts": torch.int32,
            "searched": torch.int64,  # how many slots were live then
            "tail_weight": (torch.float32, "S"),
            "tail_value": (torch.float32, "S"),
        }

    def select(self, query: torch.Tensor, kv: KVView) -> Selection | None:
        age = self._age(kv)
        if age == 0:
            return self.inner.select(query, kv)
        slots, counts = kv[self.own("slots")].long(), kv[self.own("counts")]
        if slots.shape[2] == 0:
            return None
        searched = kv[self.own("searched")]
        since = (kv.lengths - searched).clamp(0, age)[..., None]  # fewer than `age` in rows that have ended
        place = torch.arange(slots.shape[2] + age, device=slots.device)
        kept = slots.gather(2, (place - since).clamp(0, slots.shape[2] - 1))
        chosen = torch.where(place < since, searched[..., None] + place, kept)
        weight, value = kv[self.own("tail_weight")], kv[self.own("tail_value")]
        tail = Tail(weight, value.to(query.dtype)) if weight.shape[2] else None
        return Selection(chosen, counts + since[..., 0], tail)

    def on_select(self, kv: KVView, selection: Selection | None) -> None:
        if self._age(kv) > 0:
            return
        self.inner.on_select(kv, selection)
        nothing = kv.lengths.new_zeros(*kv.lengths.shape, 0)
        slots, counts, tail, _ = selection or Selection(nothing, nothing.sum(2))
        kv[self.own("slots")], kv[self.own("counts")], kv[self.own("searched")] = slots, counts, kv.lengths
        kv[self.own("tail_weight")], kv[self.own("tail_value")] = tail or (nothing, nothing)

    @classmethod
    def for_compression(
        cls,
        ratio: float,
        head_size: int,
        context: int,
        inner: Callable[[float], Policy] | None = None,
        every: int = 8,
    ) -> Self:
        """Give `inner` the whole ratio: a step that searches reads so much, the steps between read less."""
        if inner is None:
            raise UserError("refresh needs the policy `inner` to be asked for a compression")
        return cls(inner(ratio), every)

    @classmethod
    def for_tokens(
        cls,
        tokens: int,
        head_size: int,
        context: int,
        inner: Callable[[int], Policy] | None = None,
        every: int = 8,
    ) -> Self:
        """Let `inner` choose what the newest leave, that come until it is asked again."""
        if inner is None:
            raise UserError("refresh needs the policy `inner` to be asked for tokens")
        if tokens < every:
            raise UserError(f"refresh reads {every - 1} tokens that come between two searches: give {every}")
        return cls(inner(tokens - every + 1), every)

    def _age(self, kv: KVView) -> int:
        """Steps since the search, 0 at one."""
        return (kv.steps - 1) % self.every
