"""A wrapper that behaves as the policy in it, and takes notes of what it does."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .. import contract, ops
from ..cache.kv import KVView
from ..cache.layouts import KEY_STORES, by_token
from ..cache.new_tokens import NewTokens
from ..policy import Far, Policy, Ranking, Selection
from ..wrapper import Wrapper

Answer = TypeVar("Answer")


@dataclasses.dataclass
class Notes:
    """Everything that the spy saw in decode steps, and what `cut` said."""

    selections: list[Selection | None] = dataclasses.field(default_factory=list)
    lengths: list[torch.Tensor] = dataclasses.field(default_factory=list)
    # The positions that each `cut` chose, by row and head; None: it left the choice to `priority`.
    cuts: list[list[list[list[int]]] | None] = dataclasses.field(default_factory=list)
    changes: list[str] = dataclasses.field(default_factory=list)  # by questions, in the cache
    leaks: list[str] = dataclasses.field(default_factory=list)  # from slots outside the selection
    unmetered: list[str] = dataclasses.field(default_factory=list)  # reads and writes behind the meter
    direct_reads: int = 0  # bytes of keys and values that the policy read itself


@dataclasses.dataclass(frozen=True)
class Spy(Wrapper):
    """Asks `inner` everything that it is asked, and takes notes."""

    inner: Policy
    notes: Notes = dataclasses.field(default_factory=Notes, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "name", self.inner.name)  # in messages it is the author's policy

    def __repr__(self) -> str:
        return repr(self.inner)

    def select(self, query: torch.Tensor, kv: KVView) -> Selection | None:
        answer = self._watched(kv, "select", lambda: self.inner.select(query, kv), question=True)
        selection = contract.checked_selection(answer, self.inner, 0, kv._slots, query)
        self.notes.selections.append(selection)
        self.notes.lengths.append(kv.lengths.clone())
        if selection is not None:
            self._look_for_leaks(query, kv, selection)
        return selection

    def priority(self, kv: KVView) -> torch.Tensor | Ranking:
        return self._watched(kv, "priority", lambda: self.inner.priority(kv), question=True)

    def cut(self, kv: KVView) -> torch.Tensor | None:
        stays = self._watched(kv, "cut", lambda: self.inner.cut(kv), question=True)
        self.notes.cuts.append(_chosen(kv, stays))
        return stays

    def cut_together(self, layers: Sequence[KVView]) -> Sequence[torch.Tensor | None]:
        answers = self._watched(
            layers[0], "cut_together", lambda: self.inner.cut_together(layers), question=True
        )
        contract.check_answers(answers, self.inner, len(layers))
        self.notes.cuts += [_chosen(kv, stays) for kv, stays in zip(layers, answers, strict=True)]
        return answers

    def sees(self, kv: KVView, new: NewTokens) -> torch.Tensor | None:
        return self._watched(kv, "sees", lambda: self.inner.sees(kv, new), question=True)

    def on_append(self, kv: KVView, new: NewTokens) -> None:
        self._watched(kv, "on_append", lambda: self.inner.on_append(kv, new))

    def on_queries(self, kv: KVView, queries: torch.Tensor, new: NewTokens) -> None:
        self._watched(kv, "on_queries", lambda: self.inner.on_queries(kv, queries, new))

    def on_select(self, kv: KVView, selection: Selection | None) -> None:
        self._watched(kv, "on_select", lambda: self.inner.on_select(kv, selection))

    def on_attend(self, kv: KVView, mass: torch.Tensor) -> None:
        self._watched(kv, "on_attend", lambda: self.inner.on_attend(kv, mass))

    def on_surprise(self, kv: KVView, surprise: torch.Tensor, new: NewTokens) -> None:
        self._watched(kv, "on_surprise", lambda: self.inner.on_surprise(kv, surprise, new))

    def for_layer(self, layer: int, layers: int) -> Policy:
        return self

    def _watched(self, kv: KVView, hook: str, ask: Callable[[], Answer], question: bool = False) -> Answer:
        before = {name: tensor.clone() for name, tensor in kv._slots.stored().items()} if question else {}
        counted = _direct(kv)
        if kv._traffic.meter is None:
            answer = ask()
        else:
            with _FindsUnmetered(kv) as reads:
                answer = ask()
            self.notes.unmetered += [f"{hook} touches {what} behind the meter" for what in reads.found]
        self.notes.direct_reads += _direct(kv) - counted
        for name, tensor in before.items():
            if not torch.equal(tensor, kv._slots.stored()[name]):
                self.notes.changes.append(f"{hook} changed {name!r}")
        return answer

    def _look_for_leaks(self, query: torch.Tensor, kv: KVView, selection: Selection) -> None:
        """Attention over the selection must not change when every slot outside it is spoilt."""
        slots = kv._slots
        chosen = torch.zeros(*slots.lengths.shape, slots.used, dtype=torch.bool)
        for b in range(chosen.shape[0]):
            for k in range(chosen.shape[1]):
                for part in parts(selection):
                    chosen[b, k, part.slots[b, k, : int(part.counts[b, k])]] = True
        meter, kv._traffic.meter = kv._traffic.meter, None
        clean, _ = ops.attend(query, kv, selection)
        saved = slots.keys.clone(), slots.values.clone()
        junk = by_token(saved[0], slots.used).masked_fill(~chosen[..., None], 1e4)
        ops.reference.append(slots.keys, junk, torch.arange(slots.used).expand(chosen.shape))
        slots.values.masked_fill_(~chosen[..., None], 1e4)
        spoilt, _ = ops.attend(query, kv, selection)
        slots.keys.copy_(saved[0])
        slots.values.copy_(saved[1])
        kv._traffic.meter = meter
        if not torch.equal(clean, spoilt):
            self.notes.leaks.append("attention depends on slots outside the selection")


def parts(selection: Selection) -> list[Selection | Far]:
    """The slots that are read by the step's query, and those by another."""
    return [selection] if selection.far is None else [selection, selection.far]


def _chosen(kv: KVView, stays: torch.Tensor | None) -> list[list[list[int]]] | None:
    """The positions that a cut chose, by row and head; None: it chose none, or is not one."""
    held = kv.positions
    if not isinstance(stays, torch.Tensor) or stays.dtype != torch.bool or stays.shape != held.shape:
        return None
    return [[held[b, k][stays[b, k]].tolist() for k in range(held.shape[1])] for b in range(len(held))]


def _direct(kv: KVView) -> int:
    counted = kv._traffic.meter.by_kind if kv._traffic.meter else {}
    return counted.get("keys", 0) + counted.get("values", 0)


class _FindsUnmetered(TorchDispatchMode):
    """Notes the stores that an operator inside touches although neither the view nor an op counted them."""

    def __init__(self, kv: KVView) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kv = kv
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        read = _read_uncounted(args, kwargs)
        for name in self._stores_among(read):
            if name not in self.kv._traffic.handed and name not in self.found:
                self.found.append(name)
        return func(*args, **(kwargs or {}))

    def _stores_among(self, tensors: Iterable[torch.Tensor]) -> Iterator[str]:
        places = {
            tensor.untyped_storage().data_ptr(): "keys" if name in KEY_STORES else name
            for name, tensor in self.kv._slots.stored().items()
            if name not in ("lengths", "seen", "positions") and tensor.numel()
        }
        for tensor in tensors:
            name = places.get(tensor.untyped_storage().data_ptr())
            if name is not None:
                yield name


def _read_uncounted(args: Any, kwargs: Any) -> list[torch.Tensor]:
    """The tensors among the arguments of the operator that is running, if no code that counts has called it.

    An op of kvsieve.ops counts what it takes from the view, not what it was given beside it. The view counts
    all.
    """
    frame: Any = sys._getframe(2)
    given: Any = (args, kwargs)
    while frame is not None and frame.f_globals.get("__name__") != __name__:
        module = frame.f_globals.get("__name__", "")
        if module.startswith("kvsieve.cache."):
            return []
        if module == "kvsieve.ops":
            code = frame.f_code
            given = [
                frame.f_locals[name] for name in code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            ]
        frame = frame.f_back
    return [leaf for leaf in tree_leaves(given) if isinstance(leaf, torch.Tensor)]
