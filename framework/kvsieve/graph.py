"""One decode step as one CUDA graph: forward, policy, sampling, the advance of positions, replayed without Python.

A graph belongs to a cache: its batch and its capacity are the shapes, its storage is what the graph reads and writes. A
cache that is `reset()` keeps both, so that the next decode with it replays what is there.

What a step needs for that: constant shapes (`KVCache.fix_shapes`), lengths and positions in device tensors, every
result written in place, no look at the device. A policy declares with `capturable` whether its own code keeps to it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from .cache.kv_cache import KVCache
from .cache.layer import LayerCache
from .errors import UserError
from .hf.parallel import is_split

EAGER = "eager was asked for"
_wanted = True
_WARM_UP = 2  # real steps that run eagerly first: kernels are compiled and workspaces allocated there


@contextlib.contextmanager
def capturing(wanted: bool) -> Iterator[None]:
    """Whether decode steps inside are captured where they can be; outside of this, they are."""
    global _wanted  # noqa: PLW0603
    before, _wanted = _wanted, wanted
    try:
        yield
    finally:
        _wanted = before


def why_not(cache: KVCache, model: PreTrainedModel) -> str | None:
    """Why a decode step of this model with this cache is not captured; None if it is."""
    if not _wanted:
        return EAGER
    if model.device.type != "cuda":
        return f"graphs need a GPU, the model is on {model.device.type}"
    if is_split(model):
        return "the model is split over processes, and what they send each other is not captured"
    if len(set(getattr(model, "hf_device_map", {}).values())) > 1:
        return "the model's layers are on several devices"
    return next(filter(None, map(_why_not_this_layer, cache.layers)), None)


def _why_not_this_layer(layer: object) -> str | None:
    if not isinstance(layer, LayerCache):
        return f"the model has layers of its own kind ({type(layer).__name__}), whose shapes change"
    if not layer.policy.capturable:
        return f"policy {layer.policy.name} declares that it cannot be captured"
    return None


class Captured(NamedTuple):
    """A decode step as a graph, and the tensors that it works in besides those of the cache, which keeps it."""

    key: tuple[Any, ...]  # what must be the same for the graph to be right
    graph: torch.cuda.CUDAGraph
    choice: Any
    positions: torch.Tensor
    tokens: torch.Tensor
    ended: torch.Tensor
    status: torch.Tensor


class StepGraph:
    """Runs a step again and again: the first times eagerly, then as a captured graph.

    Args:
        device: a GPU.
        generators: random streams that the step draws from.
        graph: what was captured of the same step before.
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
            with torch.cuda.graph(graph):
                step()  # recorded, not run
        except RuntimeError as error:
            raise UserError(
                f"the decode step cannot be captured as a CUDA graph; pass eager=True (--eager): {error}"
            ) from error
        return graph
