"""PyramidKV: much for the first layers, little for the last (arXiv:2406.02069).

The one idea: attention is spread in the lower layers and gathers on few tokens in the upper ones; so the
budget falls from layer to layer, in equal steps. Within a layer tokens are chosen as by SnapKV.

The schedule is that of the authors' KVCache-Factory:

- The window comes on top of each layer's share, and `budget - window` is the mean of the shares: with L
  layers they fall from 2 (budget - window) - low to low = (budget - window) / beta, in whole steps. The last
  layer may be left with its window alone.
- Where the first share would exceed the tokens before the window, it is these, and the last share is raised.
- A prompt shorter than 2 (budget - window) is flat: every layer keeps `budget`. A model of one layer too,
  for which the authors' formula divides by zero.

kvpress counts the window in, and makes all budgets equal where the smallest would be below the window.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch

from kvsieve import KVView, UserError, Wrapper

from .window_votes import WindowVotes


@dataclass(frozen=True)
class PyramidKV(WindowVotes):
    """Keeps `budget` tokens on average over the layers: the window and a share that falls; then it grows."""

    beta: int = 20  # the larger, the less is left for the last layer

    name: ClassVar[str] = "pyramidkv"
    paper: ClassVar[str] = "arXiv:2406.02069"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.beta < 1:
            raise UserError(f"pyramidkv.beta must be at least 1, not {self.beta}")

    def for_layer(self, layer: int, layers: int) -> "PyramidLayer":
        return PyramidLayer(self, layer, layers)

    def cut(self, kv: KVView) -> torch.Tensor:
        return self._cut_layer(kv, 0, 1)

    def _cut_layer(self, kv: KVView, layer: int, layers: int) -> torch.Tensor:
        share = self._share(kv.lengths, layer, layers)
        return self._best(kv, self._votes(kv), share)

    def _share(self, lengths: torch.Tensor, layer: int, layers: int) -> torch.Tensor:
        """Tokens before the window that a layer keeps, `[B, K]`."""
        mean = torch.full_like(lengths, self.budget - self.window)
        if layers == 1:
            return mean
        before = lengths - self.window
        low = mean // self.beta
        high = torch.minimum(2 * mean - low, before)
        low = 2 * mean - high
        share = high - layer * ((high - low) // (layers - 1))
        return torch.where(lengths < 2 * mean, mean, share).clamp(min=0)


@dataclass(frozen=True)
class PyramidLayer(Wrapper):
    """PyramidKV in one layer of a model."""

    inner: PyramidKV
    layer: int
    layers: int

    name: ClassVar[str] = "pyramidkv"

    def for_layer(self, layer: int, layers: int) -> "PyramidLayer":
        return self

    def cut(self, kv: KVView) -> torch.Tensor:
        return self.inner._cut_layer(kv, self.layer, self.layers)
