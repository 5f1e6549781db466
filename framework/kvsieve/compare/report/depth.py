"""The heat map: the score of a policy by where in the prompt the answer stood, and by the prompt's length."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from ..manifest import Record
from ..results import Results, group_key
from .folder import RunFolder
from .names import readable_label

_MOST = 10  # columns


@dataclasses.dataclass(frozen=True)
class _Found:
    """A sample whose task says where in its prompt the answer stood."""

    depth: float  # 0: at the start, 1: at the end
    score: float


def depth_maps(run: RunFolder) -> list[dict[str, Any]]:
    """The template's view: for every task a map for each policy, with a line for each length.

    Tasks whose samples say no depth, or whose scores have no limits, are left out.
    """
    titles = {group_key(group.rows[0])[:3]: group.task for group in run.results.groups}
    found: dict[tuple[str, str, str], dict[tuple[str, int], list[_Found]]] = {}
    limits: dict[tuple[str, str, str], tuple[float, float]] = {}
    for entry, samples in run.measured:
        task = group_key(entry)[:3]
        placed = [one for sample in samples if (one := _placed(sample))]
        if placed and entry.limits and entry.higher_is_better and task in titles:
            limits[task] = entry.limits
            found.setdefault(task, {})[entry.policy_label, entry.context] = placed
    return [
        {"task": titles[task], **_maps(cells, limits[task], run.results)} for task, cells in found.items()
    ]


def _placed(sample: Record) -> _Found | None:
    depth = (sample.get("facts") or {}).get("depth")
    if isinstance(depth, bool) or not isinstance(depth, int | float) or not 0 <= depth <= 1:
        return None
    return _Found(float(depth), sample["score"])


def _maps(
    cells: dict[tuple[str, int], list[_Found]], limits: tuple[float, float], results: Results
) -> dict[str, Any]:
    bins = max(2, min(_MOST, min(map(len, cells.values())) // 2))
    contexts = sorted({context for _, context in cells})
    policies = {row.policy_label: row.policy for row in results.rows}
    labels = [label for label in results.pivot if any(label == one for one, _ in cells)]
    maps = [
        {
            "label": readable_label(policies[label], label),
            "index": results.policies.index(policies[label]),
            "lines": [
                {
                    "context": f"{context:,}",
                    "squares": _squares(cells.get((label, context), []), bins, limits),
                }
                for context in contexts
            ],
        }
        for label in labels
    ]
    edges = [f"{100 * i / bins:.0f} to {100 * (i + 1) / bins:.0f}%" for i in range(bins)]
    return {"edges": edges, "maps": maps}


def _squares(placed: Sequence[_Found], bins: int, limits: tuple[float, float]) -> list[dict[str, Any]]:
    """The mean score of the samples between two depths, and how many they are."""
    squares = []
    for i in range(bins):
        scores = [one.score for one in placed if min(int(one.depth * bins), bins - 1) == i]
        mean = sum(scores) / len(scores) if scores else None
        share = None if mean is None else (mean - limits[0]) / (limits[1] - limits[0])
        squares.append(
            {
                "text": "" if mean is None else _brief(mean, limits),
                "share": None if share is None else round(min(max(share, 0.0), 1.0), 3),
                "title": "no sample" if mean is None else f"{mean:.3g}, mean of {len(scores)}",
            }
        )
    return squares


def _brief(mean: float, limits: tuple[float, float]) -> str:
    """`1`, `.5`, `0`: two characters where they can be had."""
    text = f"{mean:.1f}" if limits[1] <= 1 else f"{mean:.0f}"
    return text.removesuffix(".0").removeprefix("0") or "0"
