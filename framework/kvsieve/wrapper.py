"""Wrapper: the base of policies that change another one, `inner`, and leave the rest to it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from .cache.layouts import KeyLayout
from .policy import Column, Observe, Pass, Policy, Positions, Ranking, Selection, Shape, Wants

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from .cache.kv import KVView
    from .cache.new_tokens import NewTokens


class Wrapper(Policy):
    """Forwards everything to `inner`; a subclass overrides what it changes.

    A subclass is a frozen dataclass with a field `inner: Policy`. Columns and summaries of the wrapper's own
    are declared in `own_columns` and `own_summaries`; the cache holds them under `self.own(name)`, so that
    they never meet those of `inner`.
    """

    inner: Policy  # a field of the subclass

    # ---------------------------------------------------------------- the wrapper's own
    @property
    def own_columns(self) -> Mapping[str, Column]:
        """Columns beside those of `inner`; read them as `kv[self.own("name")]`."""
        return {}

    @property
    def own_summaries(self) -> Mapping[str, Shape]:
        """Summaries beside those of `inner`."""
        return {}

    def own(self, name: str) -> str:
        """Return the name under which the cache holds a column or summary of the wrapper's own."""
        full = f"{self.name}.{name}"
        while full in self.inner.columns or full in self.inner.summaries:
            full = f"{self.name}.{full}"
        return full

    # ---------------------------------------------------------------- forwarded
    @property
    def keeps(self) -> int | None:
        return self.inner.keeps

    @property
    def overwrites(self) -> bool:
        return self.inner.overwrites

    @property
    def columns(self) -> Mapping[str, Column]:
        return {**self.inner.columns, **{self.own(name): shape for name, shape in self.own_columns.items()}}

    @property
    def summaries(self) -> Mapping[str, Shape]:
        return {
            **self.inner.summaries,
            **{self.own(name): shape for name, shape in self.own_summaries.items()},
        }

    @property
    def observes(self) -> Observe:
        return self.inner.observes

    @property
    def adds_mass_to(self) -> str | None:
        return self.inner.adds_mass_to

    @property
    def positions(self) -> Positions:
        return self.inner.positions

    @property
    def any_order(self) -> bool:
        """Whether `inner` says so; not where the wrapper has a `select` of its own, unless it declares it."""
        return self.inner.any_order and type(self).select is Wrapper.select

    @property
    def in_windows(self) -> bool:
        return self.inner.in_windows

    @property
    def drops(self) -> bool:
        return self.inner.drops

    @property
    def cuts_together(self) -> bool:
        return self.inner.cuts_together

    @property
    def wants(self) -> Wants:
        return self.inner.wants

    @property
    def last_queries(self) -> int:
        return self.inner.last_queries

    @property
    def key_layout(self) -> KeyLayout:
        return self.inner.key_layout

    @property
    def capturable(self) -> bool:
        return self.inner.capturable

    def keeps_per_head(self, layer: int, heads: range) -> Sequence[int | None] | None:
        return self.inner.keeps_per_head(layer, heads)

    def bind(
        self, layer: int, heads: range, head_size: int, device: torch.device
    ) -> Mapping[str, torch.Tensor]:
        return self.inner.bind(layer, heads, head_size, device)

    def plan(self, segments: Sequence[int]) -> Sequence[Pass] | None:
        return self.inner.plan(segments)

    def select(self, query: torch.Tensor, kv: KVView) -> Selection | None:
        return self.inner.select(query, kv)

    def priority(self, kv: KVView) -> torch.Tensor | Ranking:
        return self.inner.priority(kv)

    def cut(self, kv: KVView) -> torch.Tensor | None:
        return self.inner.cut(kv)

    def cut_together(self, layers: Sequence[KVView]) -> Sequence[torch.Tensor | None]:
        return self.inner.cut_together(layers)

    def sees(self, kv: KVView, new: NewTokens) -> torch.Tensor | None:
        return self.inner.sees(kv, new)

    def on_append(self, kv: KVView, new: NewTokens) -> None:
        self.inner.on_append(kv, new)

    def on_queries(self, kv: KVView, queries: torch.Tensor, new: NewTokens) -> None:
        self.inner.on_queries(kv, queries, new)

    def on_select(self, kv: KVView, selection: Selection | None) -> None:
        self.inner.on_select(kv, selection)

    def on_attend(self, kv: KVView, mass: torch.Tensor) -> None:
        self.inner.on_attend(kv, mass)

    def on_surprise(self, kv: KVView, surprise: torch.Tensor, new: NewTokens) -> None:
        self.inner.on_surprise(kv, surprise, new)

    def on_prefill(self, kv: KVView) -> None:
        self.inner.on_prefill(kv)

    def for_layer(self, layer: int, layers: int) -> Policy:
        inner = self.inner.for_layer(layer, layers)
        return dataclasses.replace(self, inner=inner)  # type: ignore[call-arg]

    def in_layout(self, layout: KeyLayout) -> Policy | None:
        inner = self.inner.in_layout(layout)
        return None if inner is None else dataclasses.replace(self, inner=inner)  # type: ignore[call-arg]

    def files(self) -> Mapping[str, str]:
        return {f"inner.{name}": path for name, path in self.inner.files().items()}

    def check(self, head_size: int) -> None:
        self.inner.check(head_size)

    def check_model(self, model: PreTrainedModel) -> None:
        self.inner.check_model(model)
