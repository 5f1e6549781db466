"""Measured lines beside the limit that the bytes set: speed against context, or time as sizes grow."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from ..compare.report import style, svg
from ..compare.report.svg import element
from ..compare.results import DENSE
from .terminal import tokens

_SHAPES = {"double": style.CIRCLE, "blocked": style.SQUARE, "single": style.UP}
_BEST = "best dense"
_PANELS = 4
_WIDTH, _HEIGHT, _LEFT, _GAP, _EDGE = 340, 300, 42, 44, 24

Cell = dict[str, Any]
# Of a policy and key layout: x, measured, limit.
Lines = dict[tuple[str, str], list[tuple[float, float, float]]]


class Panel(NamedTuple):
    title: str
    note: str
    across: str  # the title of the horizontal axis
    label: Callable[[float], str]  # of its ticks
    lines: Lines


def write(path: Path, benchmark: str, cells: Sequence[Cell]) -> None:
    """Draw the cells of a benchmark into an .svg or .png file.

    Raises:
        UserError: as svg.image.
    """
    panels = growth(cells) if benchmark == "growth" else speeds(benchmark, cells)
    path.write_bytes(svg.image(_drawing(panels[:_PANELS]), path))


def speeds(benchmark: str, cells: Sequence[Cell]) -> list[Panel]:
    """Speed against context: a panel for each batch (and attention shape)."""
    groups: dict[str, list[Cell]] = {}
    for cell in cells:
        heads = "x".join(map(str, cell["heads"].values())) if "heads" in cell else ""
        groups.setdefault(f"batch {cell['batch']}" + (f", heads {heads}" if heads else ""), []).append(cell)
    against = "dense decoding" if benchmark == "decode" else "the best dense attention installed"
    note = f"speed over {against}; dashed: the limit that the bytes set"
    panels = []
    for title, group in groups.items():
        lines: Lines = {}
        for cell in group:
            for row in cell["rows"]:
                point = float(cell["context"]), row["speedup"], row["limit"]
                lines.setdefault((row["policy"], row["layout"]), []).append(point)
        panels.append(Panel(title, note, "context, tokens", _tokens, lines))
    return panels


def growth(cells: Sequence[Cell]) -> list[Panel]:
    """Milliseconds of a step against the context of one row, and against the rows of one context.

    The limit is the time that the bytes of the step take at the highest bandwidth of the run.
    """
    bandwidth = max(speed for cell in cells for speed in cell["bandwidth"].values())
    note = f"milliseconds a step; dashed: its bytes at {bandwidth / 1e9:.3g} GB/s"
    rows = min(cell["batch"] for cell in cells)
    by_context = [cell for cell in cells if cell["batch"] == rows]
    found = [
        Panel(f"batch {rows}", note, "context, tokens", _tokens, _times(by_context, "context", bandwidth))
    ]
    for context in sorted({cell["context"] for cell in cells if cell["batch"] != rows}):
        by_batch = [cell for cell in cells if cell["context"] == context]
        lines = _times(by_batch, "batch", bandwidth)
        found.append(Panel(f"context {tokens(context)}", note, "batch, rows", "{:.0f}".format, lines))
    return found


def _times(cells: Sequence[Cell], size: str, bandwidth: float) -> Lines:
    found: Lines = {}

    def add(name: str, layout: str, x: float, seconds: float, moved: int) -> None:
        found.setdefault((name, layout), []).append((x, 1e3 * seconds, 1e3 * moved / bandwidth))

    for cell in sorted(cells, key=lambda cell: int(cell[size])):
        best = cell["best_dense"]
        add(_BEST, "single", cell[size], best["seconds"]["median"], best["bytes"])
        for row in cell["rows"]:
            moved = row["bytes"]["read"] + row["bytes"]["written"]
            add(row["policy"], row["layout"], cell[size], row["seconds"]["median"], moved)
    return found


def _tokens(count: float) -> str:
    return tokens(round(count))


def _kind(name: str) -> str:
    """The policy whose colour a line has."""
    return DENSE if name == _BEST else name.partition(" ")[0]


def _drawing(panels: Sequence[Panel]) -> str:
    names = list(dict.fromkeys(name for panel in panels for name, _ in panel.lines))
    layouts = list(dict.fromkeys(layout for panel in panels for _, layout in panel.lines))
    palette = style.on_paper(list(dict.fromkeys(map(_kind, names))))
    across = 2 * _EDGE + len(panels) * _WIDTH + (len(panels) - 1) * _GAP
    entries = [(name, palette.policies[_kind(name)], style.CIRCLE) for name in names]
    entries += [(f"keys: {layout}", palette.muted, _SHAPES[layout]) for layout in layouts]
    parts, top = svg.legend(entries, _EDGE, across - _EDGE, _EDGE + 8, palette.ink)
    drawn = [parts]
    for i, panel in enumerate(panels):
        drawn.append(
            element(
                "g",
                svg.text(0, 16, panel.title, palette.ink, 14, font_weight=600),
                svg.text(0, 33, panel.note, palette.muted),
                *_panel(panel, palette),
                transform=f"translate({_EDGE + i * (_WIDTH + _GAP)},{top})",
            )
        )
    return svg.drawing(drawn, across, top + _HEIGHT + _EDGE, palette.paper)


def _panel(panel: Panel, palette: style.Palette) -> list[Markup]:
    points = [point for line in panel.lines.values() for point in line]
    sizes = sorted({x for x, _, _ in points})
    values = [value for _, *both in points for value in both]
    low, high = math.floor(math.log2(min([*values, 1]))), math.ceil(math.log2(max([*values, 2])))
    x = svg.Scale(sizes[0] / 1.15, sizes[-1] * 1.15, _LEFT, _WIDTH, log=True)
    y = svg.Scale(2.0**low, 2.0**high, _HEIGHT - 44, 50, log=True)
    parts = [svg.axes(x, y, panel.across, palette, x_ticks=sizes, x_label=panel.label)]
    for (name, layout), line in panel.lines.items():
        colour = palette.policies[_kind(name)]
        limits = svg.path([(x(at), y(limit)) for at, _, limit in line])
        measured = [(x(at), y(value)) for at, value, _ in line]
        parts += [
            element("path", d=limits, fill="none", stroke=colour, stroke_width=1.3, stroke_dasharray="5 4"),
            element("path", d=svg.path(measured), fill="none", stroke=colour, stroke_width=1.8),
            *(svg.shape(_SHAPES[layout], px, py, 4.8, fill=colour) for px, py in measured),
        ]
    return parts
