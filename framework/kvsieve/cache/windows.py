"""Layers with a sliding window: transformers keeps them to it itself; what is added here is the meter."""

from typing import Any

import torch
from transformers.cache_utils import DynamicSlidingWindowLayer

from .. import transfer
from .forward import Forward, kind_of_forward


class WindowLayer(DynamicSlidingWindowLayer):
    """transformers' own layer, no policy acts on it; the bytes of its decode steps are counted.

    Dense attention reads no more than the window here, so what is read counts as `dense_read` too.
    """

    def __init__(self, sliding_window: int) -> None:
        super().__init__(sliding_window=sliding_window)
        self.active: torch.Tensor | None = None  # [B] bool: rows that still decode; None: all
        self.prompt_end: int | None = None  # columns of the prompt, where that is known
        self.expected: Forward | None = None  # the kind of the next forward, where whoever feeds it says so
        self.meter: transfer.Meter | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Take the new tokens, and mark the returned keys, by which attention finds this layer."""
        held, new = self.get_seq_length() > 0, key_states.shape[2]
        keys, values = super().update(key_states, value_states, *args, **kwargs)
        fed = self.get_seq_length()
        kind = self.expected or kind_of_forward(new, held=held, fed=fed, prompt_end=self.prompt_end)
        self.meter = transfer.current() if kind is Forward.STEP else None
        ones = torch.ones(len(keys), dtype=torch.int64, device=keys.device)
        self._count("written", ones, keys, values)
        keys.kvsieve_layer = self  # type: ignore[attr-defined]
        return keys, values

    def reset(self) -> None:
        super().reset()
        self.active, self.prompt_end, self.expected = None, None, None

    def count_read(self, keys: torch.Tensor, values: torch.Tensor, mask: torch.Tensor | None) -> None:
        """Count one attention over `keys`, `values [B, K, T, D]`; `mask [B, 1, 1, T]`: what a row sees."""
        if self.meter is None:
            return
        if mask is None:
            tokens = torch.full((len(keys),), keys.shape[2], device=keys.device)
        else:
            tokens = mask[:, 0, 0, : keys.shape[2]].sum(1)
        self._count("read", tokens, keys, values)
        self._count("dense", tokens, keys, values)

    def _count(self, way: str, tokens: torch.Tensor, keys: torch.Tensor, values: torch.Tensor) -> None:
        """Count the keys and values of `tokens [B]`, in all KV heads of the active rows."""
        if self.meter is None:
            return
        if self.active is not None:
            tokens = tokens * self.active
        for kind, of in (("keys", keys), ("values", values)):
            numbers = of.shape[1] * of.shape[3]
            self.meter.add(f"{way}/{kind}", tokens * (numbers * of.element_size()))
