"""The heat maps: the score of a policy by where the answer stood in a prompt, and by the length of that."""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from ..manifest import Record
from ..results import MISSING, Results, Subject, group_key
from ..statistics import score_interval
from . import heat, svg
from .folder import RunFolder
from .names import readable_label
from .style import styles

_MOST = 10  # depths told apart
_FEWEST = 4  # samples of a square, where there are so many

_Limits = tuple[float, float]


@dataclasses.dataclass(frozen=True)
class _Found:
    """A sample whose task says where in its prompt the answer stood."""

    depth: float  # 0: at the start, 1: at the end
    score: float


_Cells = dict[tuple[str, int], list[_Found]]  # by the policy's label and the prompt's length


def depth_maps(run: RunFolder) -> list[dict[str, Any]]:
    """The template's view of every task: its drawings, and its table.

    Tasks whose samples say no depth, or whose scores have no limits, are left out.
    """
    groups = {_all_lengths(group.rows[0]): group for group in run.results.groups}
    found: dict[tuple[str, ...], _Cells] = {}
    limits: dict[tuple[str, ...], _Limits] = {}
    for entry, samples in run.measured:
        task = _all_lengths(entry)
        placed = [one for sample in samples if (one := _placed(sample))]
        if placed and entry.limits and entry.higher_is_better and task in groups:
            limits[task] = (entry.limits[0], entry.limits[1])
            found.setdefault(task, {})[entry.policy_label, entry.context] = placed
    return [
        _Task(groups[task].task, groups[task].metric, limits[task], cells, run.results).view()
        for task, cells in found.items()
    ]


def _all_lengths(subject: Subject) -> tuple[str, ...]:
    """Equal for the groups of a task that differ in their context alone."""
    model, task, parameters, _, run = group_key(subject)
    return model, task, parameters, run


def _placed(sample: Record) -> _Found | None:
    depth = (sample.get("facts") or {}).get("depth")
    if isinstance(depth, bool) or not isinstance(depth, int | float) or not 0 <= depth <= 1:
        return None
    return _Found(float(depth), sample["score"])


@dataclasses.dataclass(frozen=True)
class _Task:
    name: str
    metric: str
    limits: _Limits
    cells: _Cells
    results: Results

    def view(self) -> dict[str, Any]:
        grids = self.strips() if len(self.contexts) == 1 else self.maps()
        names = (20 + svg.width(name, 12) for name in self.names.values())  # a map's own stands above it
        across = max(*(grid.across for grid in grids), *names)
        counts = [len(scores) for found in self.cells.values() for scores in self.scores(found) if scores]
        return {
            "task": self.name,
            "metric": self.metric,
            "length": f"{self.contexts[0]:,}" if len(self.contexts) == 1 else "",
            "samples": " to ".join(str(n) for n in sorted({min(counts), max(counts)})),
            "drawings": "".join(heat.draw(grid, across) for grid in grids),
            "scale": heat.scale(*(f"{limit:g}" for limit in self.limits)),
            "edges": [self.edges(i) for i in range(self.bins)],
            "lines": [
                {
                    "name": self.names[label],
                    "index": self.results.policies.index(self.policies[label]),
                    "context": f"{context:,}",
                    "cells": [
                        f"{sum(scores) / len(scores):.3g}" if scores else MISSING
                        for scores in self.scores(self.cells[label, context])
                    ],
                }
                for label in self.names
                for context in self.contexts
                if (label, context) in self.cells
            ],
        }

    def maps(self) -> list[heat.Grid]:
        """A map for every policy: the start of the prompt on top, a column for each length."""
        columns = [(i + 0.5, words) for i, words in enumerate(_lengths(self.contexts))]
        wide = max(30.0, *(8 + svg.width(words) for _, words in columns))
        return [
            heat.Grid(
                f"{self.names[label]}, by depth and length",
                list(zip(*(self.squares(label, context) for context in self.contexts), strict=True)),
                wide,
                self.ends,
                columns,
                left=36,
                top=22,
                heading=self.heading(label, 12),
            )
            for label in self.names
        ]

    def strips(self) -> list[heat.Grid]:
        """One map of all policies: the start of the prompt on the left, a line for each policy."""
        lines = list(enumerate(self.names))
        return [
            heat.Grid(
                "Policies by depth",
                [self.squares(label, self.contexts[0]) for label in self.names],
                28,
                [],
                self.ends,
                left=28 + max(svg.width(name, 12) for name in self.names.values()),
                top=0,
                heading=[part for i, label in lines for part in self.heading(label, (i + 0.7) * heat.HIGH)],
            )
        ]

    def heading(self, label: str, y: float) -> list[Markup]:
        """The mark and the name of a policy."""
        policy = self.policies[label]
        colour = f"var(--policy-{self.results.policies.index(policy)})"
        return [
            svg.shape(styles(self.results.policies)[policy].shape, 6, y - 4, 4.6, fill=colour),
            svg.text(18, y, self.names[label], "var(--ink)", 12),
        ]

    def squares(self, label: str, context: int) -> list[heat.Square | None]:
        """By depth."""
        found = self.scores(self.cells.get((label, context), []))
        return [self.square(label, context, i, scores) if scores else None for i, scores in enumerate(found)]

    def square(self, label: str, context: int, depth: int, scores: Sequence[float]) -> heat.Square:
        mean = sum(scores) / len(scores)
        low, high = self.limits
        ends = _interval(tuple(sorted(scores)), self.limits)
        return heat.Square(
            (mean - low) / (high - low),
            _brief(mean, self.limits),
            f"{self.names[label]}\ndepth: {self.edges(depth)}\nlength: {context:,} tokens\n"
            f"{self.metric}: {mean:.3g} ({ends})\nsamples: {len(scores)}",
        )

    def scores(self, found: Sequence[_Found]) -> list[list[float]]:
        """By depth."""
        scores: list[list[float]] = [[] for _ in range(self.bins)]
        for one in found:
            scores[min(int(one.depth * self.bins), self.bins - 1)].append(one.score)
        return scores

    def edges(self, depth: int) -> str:
        return f"{100 * depth / self.bins:.0f} to {100 * (depth + 1) / self.bins:.0f}%"

    @property
    def ends(self) -> list[heat.Tick]:
        """Of the prompt."""
        return [(0.5, "start"), (self.bins - 0.5, "end")]

    @functools.cached_property
    def bins(self) -> int:
        return max(2, min(_MOST, min(map(len, self.cells.values())) // _FEWEST))

    @functools.cached_property
    def contexts(self) -> list[int]:
        return sorted({context for _, context in self.cells})

    @functools.cached_property
    def policies(self) -> dict[str, str]:
        """By label, in the order of the tables."""
        here = {label for label, _ in self.cells}
        rows = self.results.pivot.items()
        return {label: next(iter(by_group.values())).policy for label, by_group in rows if label in here}

    @functools.cached_property
    def names(self) -> dict[str, str]:
        """Of each label, the form for readers."""
        return {label: readable_label(policy, label) for label, policy in self.policies.items()}


@functools.lru_cache(maxsize=4096)  # a few right or wrong answers can be few things
def _interval(scores: tuple[float, ...], limits: _Limits) -> str:
    low, high = score_interval(scores, limits) or limits
    return f"{low:.2g} to {high:.2g}"


def _lengths(contexts: Sequence[int]) -> list[str]:
    """`512`, `1,024`; `8k`, `128k` where some are many and all are multiples of 1,024."""
    if max(contexts) >= 10_000 and all(context % 1024 == 0 for context in contexts):
        return [f"{context // 1024}k" for context in contexts]
    return [f"{context:,}" for context in contexts]


def _brief(mean: float, limits: _Limits) -> str:
    """`1`, `.75`, `0`: what fits into a square."""
    if limits[1] > 1:
        return f"{mean:.0f}"
    return f"{mean:.2f}".rstrip("0").rstrip(".").removeprefix("0") or "0"
