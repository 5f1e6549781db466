"""Maps of layers and heads: what every policy reads and answers, beside dense attention."""

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from ..diagnostics import Diagnosed
from ..results import Results
from .names import policy_name
from .svg import element

_LEVELS = 20  # of shade
_WIDTH = 112  # of a map, about
_ALIKE = 0.005  # heads that differ by less have no map
_MOST = 60_000  # squares on a page; beyond, policies have their numbers only
# Of each number: its name, and whether the head to be named is the one with the least or with the most of it.
_COLUMNS = (("Mass kept", "least"), ("Recall", "least"), ("Error", "most"), ("Tail", "most"))


def head_maps(diagnosed: Sequence[Diagnosed], results: Results) -> dict[str, Any] | None:
    """The template's view: a line for every policy, with the mean and a map for each number.

    None: nothing was diagnosed of what is in the tables.
    """
    diagnosed = [one for one in diagnosed if one.policy in results.policies]
    if not diagnosed:
        return None
    lines, squares = [], 0
    for one in diagnosed:
        squares += one.numbers.size
        lines.append(
            {
                "name": policy_name(one.policy),
                "how": one.label.removeprefix(one.policy).strip(),
                "index": results.policies.index(one.policy),
                "cells": [
                    _cell(name, extreme, numbers, one.layers, drawn=squares <= _MOST)
                    for (name, extreme), numbers in zip(_COLUMNS, one.numbers, strict=True)
                ],
            }
        )
    return {
        "columns": [name for name, _ in _COLUMNS],
        "lines": lines,
        "samples": max(one.samples for one in diagnosed),
        "steps": max(one.steps for one in diagnosed),
        "some": squares > _MOST,
    }


def _cell(
    name: str, extreme: str, numbers: np.ndarray, layers: Sequence[int], *, drawn: bool
) -> dict[str, Any]:
    at = int(numbers.argmin() if extreme == "least" else numbers.argmax())
    line, head = divmod(at, numbers.shape[1])
    where = f"{extreme} {numbers[line, head]:.2f} in layer {layers[line]}, head {head}"
    differ = numbers.max() - numbers.min() > _ALIKE
    return {
        "mean": f"{numbers.mean():.3f}",
        "where": where if differ else "",
        "map": _map(f"{name} by layer and head: {where}", numbers) if differ and drawn else "",
    }


def _map(label: str, numbers: np.ndarray) -> Markup:
    """A square for every head, a line for every layer; the larger the number, up to 1, the stronger."""
    layers, heads = numbers.shape
    size = min(14, max(3, _WIDTH // max(layers, heads)))
    levels = np.clip(np.rint(numbers * _LEVELS), 0, _LEVELS).astype(int)
    outlines: dict[int, list[str]] = {}
    for y, row in enumerate(levels):
        x = 0
        for level, run in itertools.groupby(row.tolist()):
            width = len(list(run))
            if level:
                outlines.setdefault(level, []).append(f"M{x} {y}.5h{width}")
            x += width
    paths = [
        element("path", d="".join(outline), stroke_opacity=level / _LEVELS)
        for level, outline in sorted(outlines.items())
    ]
    return element(
        "svg",
        element("rect", width=heads, height=layers),
        *paths,
        class_="heads",
        role="img",
        aria_label=label,
        viewBox=f"0 0 {heads} {layers}",
        width=heads * size,
        height=layers * size,
    )
