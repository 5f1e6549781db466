"""One decode step as one CUDA graph: forward, policy, sampling, the advance of positions, replayed without Python.

What a step needs for that: constant shapes (`KVCache.fix_shapes`), lengths and positions in device tensors, every
result written in place, no look at the device. A policy declares with `capturable` whether its own code keeps to it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .cache import KVCache, LayerCache
from .errors import UserError

_WARM_UP = 2  # real steps that run eagerly first: kernels are compiled and workspaces allocated there


def why_not(cache: KVCache, device: torch.device) -> str | None:
    """Why a step with this cache cannot be captured; None if it can."""
    if device.type != "cuda":
        return f"graphs need a GPU, the model is on {device.type}"
    for layer in cache.layers:
        if not isinstance(layer, LayerCache):
            return f"the model has layers of its own kind ({type(layer).__name__}), whose shapes change"
        if not layer.policy.capturable:
            return f"policy {layer.policy.name} declares that it cannot be captured"
    return None


class StepGraph:
    """Runs `step` again and again: the first times eagerly, then as a captured graph.

    Args:
        step: reads and writes only tensors that stay where they are; does the same work every time.
        generators: random streams that `step` draws from.
    """

    def __init__(self, step: Callable[[], None], generators: Sequence[torch.Generator] = ()) -> None:
        self.step, self.generators = step, generators
        self.steps = 0
        self.graph: torch.cuda.CUDAGraph | None = None
        self.stream = torch.cuda.Stream()

    def __call__(self) -> None:
        self.steps += 1
        if self.graph is not None:
            self.graph.replay()
        elif self.steps <= _WARM_UP:
            self.stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.stream):
                self.step()
            torch.cuda.current_stream().wait_stream(self.stream)
        else:
            self._capture()

    def _capture(self) -> None:
        graph = torch.cuda.CUDAGraph()
        for generator in self.generators:
            graph.register_generator_state(generator)
        try:
            with torch.cuda.graph(graph):
                self.step()  # recorded, not run
        except RuntimeError as error:
            raise UserError(
                f"the decode step cannot be captured as a CUDA graph; pass eager=True (--eager): {error}"
            ) from error
        self.graph = graph
        graph.replay()
