"""One decode step as one CUDA graph: forward, policy, sampling, the advance of positions, replayed without
Python.

A graph belongs to a cache: its batch and its capacity are the shapes, its storage is what the graph reads and
writes. A cache that is `reset()` keeps both, so that the next decode with it replays the same graph.

A step needs for that: constant shapes (`KVCache.fix_shapes`), lengths and positions in device tensors, every
result written in place, no look at the device. A policy declares with `capturable` whether its own code keeps
to it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, Self

import torch
from transformers import PreTrainedModel

from . import contract, ops, transfer
from .cache.kv_cache import KVCache
from .errors import UserError
from .hf.parallel import is_split

EAGER = "eager was asked for"
_WARM_UP = 2  # real steps that run eagerly first: kernels are compiled and workspaces allocated there


class _Wanted(threading.local):
    """Of this thread."""

    capture = True


_wanted = _Wanted()


@contextlib.contextmanager
def capturing(wanted: bool) -> Iterator[None]:
    """Capture the decode steps inside where they can be (the default), or none; in this thread."""
    before, _wanted.capture = _wanted.capture, wanted
    try:
        yield
    finally:
        _wanted.capture = before


def why_not(cache: KVCache, model: PreTrainedModel) -> str | None:
    """Say why a decode step of this model with this cache is not captured; None if it is."""
    return next(_hindrances(cache, model), None)


def _hindrances(cache: KVCache, model: PreTrainedModel) -> Iterator[str]:
    if not _wanted.capture:
        yield EAGER
    if contract.is_strict():
        yield "strict mode checks every answer, which waits for the device"
    if model.device.type != "cuda":
        yield f"graphs need a GPU, the model is on {model.device.type}"
    if is_split(model):
        yield "the model is split over processes, and what they send each other is not captured"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        yield "the model's layers are on several devices"
    for layer in cache.other_layers:
        yield f"the model has layers of its own kind ({type(layer).__name__}), which are not captured"
    for layer in cache.kv_layers:
        if not layer.policy.capturable:
            yield f"policy {layer.policy.name} declares that it cannot be captured"


# -------------------------------------------------------------------- the step of a decode
class State(NamedTuple):
    """Everything that a decode step reads and writes beside the cache, in tensors that stay in place."""

    tokens: torch.Tensor  # [B] int64, the newest of each row
    positions: torch.Tensor  # [B] int64, of the next token
    ended: torch.Tensor  # [B] bool
    status: torch.Tensor  # [3] bool: some logits were NaN; a row has no token to choose; every row has ended

    @classmethod
    def at(cls, positions: torch.Tensor) -> Self:
        """A decode that begins at these positions."""
        ended = torch.zeros_like(positions, dtype=torch.bool)
        status = torch.zeros(3, dtype=torch.bool, device=positions.device)
        return cls(torch.zeros_like(positions), positions, ended, status)


class Choice(Protocol):
    """Chooses the next tokens: see sampling.py."""

    kind: tuple[Any, ...]  # two choices of one kind make the same step
    streams: Sequence[torch.Generator]

    def restart(self, like: Any) -> None:
        """Begin again as `like`, in the tensors that are here."""


class Captured(NamedTuple):
    """A captured step, kept by the cache whose storage it works on."""

    key: tuple[Any, ...]  # must be the same for the graph to be right
    graph: torch.cuda.CUDAGraph
    choice: Any
    state: State


class Replay:
    """The steps of one decode as replays of a graph: the cache's captured one if it fits, else a new one.

    `choice` and `state` are those to work in from now on: of the captured step, set to begin as the ones
    given.
    """

    def __init__(self, cache: KVCache, model: PreTrainedModel, choice: Any, state: State) -> None:
        self.cache = cache
        self.key = choice.kind, model, transfer.current(), ops.chosen(model.device), cache.places()
        self.choice, self.state = choice, state
        known = cache.captured if cache.captured is not None and cache.captured.key == self.key else None
        if known is not None:
            known.choice.restart(choice)
            known.state.positions.copy_(state.positions)
            known.state.ended.zero_()
            known.state.status.zero_()
            self.choice, self.state = known.choice, known.state
        graph = None if known is None else known.graph
        self.run = StepGraph(model.device, self.choice.streams, graph)

    def __call__(self, step: Callable[[], None]) -> None:
        """Do `step`, always the same one."""
        before = self.run.graph
        self.run(step)
        self.cache.count_fed()
        if before is None and self.run.graph is not None:
            self.cache.captured = Captured(self.key, self.run.graph, self.choice, self.state)


class StepGraph:
    """Runs a step again and again: the first times eagerly, then as a captured graph.

    Args:
        device: a GPU.
        generators: random streams that the step draws from.
        graph: of the same step, captured before.
    """

    def __init__(
        self,
        device: torch.device,
        generators: Sequence[torch.Generator] = (),
        graph: torch.cuda.CUDAGraph | None = None,
    ) -> None:
        self.device, self.generators, self.graph = device, generators, graph
        self.steps = 0
        self.stream = torch.cuda.Stream(device) if graph is None else None

    def __call__(self, step: Callable[[], None]) -> None:
        """Do `step`, always the same one: it reads and writes only tensors that stay where they are."""
        self.steps += 1
        with torch.cuda.device(self.device):
            if self.graph is not None:
                self.graph.replay()
            elif self.steps <= _WARM_UP:
                assert self.stream is not None
                self.stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(self.stream):
                    step()
                torch.cuda.current_stream().wait_stream(self.stream)
            else:
                self.graph = self._capture(step)
                self.graph.replay()

    def _capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        try:
            # Other threads may decode meanwhile: what they do is no part of this capture.
            with torch.cuda.graph(graph, capture_error_mode="thread_local"):
                step()  # recorded, not run
        except RuntimeError as error:
            for each in (error, error.__context__):  # a capture that fails may fail to end, too
                if isinstance(each, torch.OutOfMemoryError):
                    raise each from None  # as anywhere else: fewer rows may have room
            raise UserError(
                f"the decode step cannot be captured as a CUDA graph; pass eager=True (--eager): {error}"
            ) from error
        return graph
