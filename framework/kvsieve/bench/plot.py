"""Speed against context: measured, beside the limit that the bytes set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from ..compare.report import style, svg
from ..compare.report.svg import element
from .terminal import tokens

_SHAPES = {"double": style.CIRCLE, "blocked": style.SQUARE, "single": style.UP}
_PANELS = 4
_WIDTH, _HEIGHT, _LEFT, _GAP, _EDGE = 340, 300, 42, 44, 24


def write(path: Path, benchmark: str, cells: Sequence[dict[str, Any]]) -> None:
    """Draw a panel for each batch (and attention shape) into an .svg or .png file.

    Raises:
        UserError: as svg.image.
    """
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        heads = "x".join(map(str, cell["heads"].values())) if "heads" in cell else ""
        groups.setdefault(f"batch {cell['batch']}" + (f", heads {heads}" if heads else ""), []).append(cell)
    names = list(dict.fromkeys(row["policy"] for cell in cells for row in cell["rows"]))
    layouts = list(dict.fromkeys(row["layout"] for cell in cells for row in cell["rows"]))
    palette = style.on_paper(list(dict.fromkeys(name.split()[0] for name in names)))
    against = "the best dense attention installed" if benchmark == "attention" else "dense decoding"
    shown = list(groups.items())[:_PANELS]
    across = 2 * _EDGE + len(shown) * _WIDTH + (len(shown) - 1) * _GAP
    entries = [(name, palette.policies[name.split()[0]], style.CIRCLE) for name in names]
    entries += [(f"keys: {layout}", palette.muted, _SHAPES[layout]) for layout in layouts]
    parts, top = svg.legend(entries, _EDGE, across - _EDGE, _EDGE + 8, palette.ink)
    drawn = [parts]
    for i, (title, group) in enumerate(shown):
        drawn.append(
            element(
                "g",
                svg.text(0, 16, title, palette.ink, 14, font_weight=600),
                svg.text(0, 33, f"speed over {against}; dashed: the limit that the bytes set", palette.muted),
                *_panel(group, palette),
                transform=f"translate({_EDGE + i * (_WIDTH + _GAP)},{top})",
            )
        )
    path.write_bytes(svg.image(svg.drawing(drawn, across, top + _HEIGHT + _EDGE, palette.paper), path))


def _panel(cells: Sequence[dict[str, Any]], palette: style.Palette) -> list[Markup]:
    contexts = sorted({cell["context"] for cell in cells})
    rows = [(cell["context"], row) for cell in cells for row in cell["rows"]]
    values = [row[key] for _, row in rows for key in ("speedup", "limit")]
    low, high = math.floor(math.log2(min([*values, 1]))), math.ceil(math.log2(max([*values, 2])))
    x = svg.Scale(contexts[0] / 1.15, contexts[-1] * 1.15, _LEFT, _WIDTH, log=True)
    y = svg.Scale(2.0**low, 2.0**high, _HEIGHT - 44, 50, log=True)
    parts = [
        svg.axes(
            x, y, "context, tokens", palette, x_ticks=contexts, x_label=lambda count: tokens(round(count))
        )
    ]
    lines: dict[tuple[str, str], list[tuple[float, dict[str, Any]]]] = {}
    for context, row in rows:
        lines.setdefault((row["policy"], row["layout"]), []).append((x(context), row))
    for (name, layout), points in lines.items():
        colour = palette.policies[name.split()[0]]
        limits = svg.path([(px, y(row["limit"])) for px, row in points])
        speeds = [(px, y(row["speedup"])) for px, row in points]
        parts += [
            element("path", d=limits, fill="none", stroke=colour, stroke_width=1.3, stroke_dasharray="5 4"),
            element("path", d=svg.path(speeds), fill="none", stroke=colour, stroke_width=1.8),
            *(svg.shape(_SHAPES[layout], px, py, 4.8, fill=colour) for px, py in speeds),
        ]
    return parts
