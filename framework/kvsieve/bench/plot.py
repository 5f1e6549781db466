"""Speed against context: measured, beside the limit that the bytes set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..compare.report import chart
from ..errors import UserError
from .terminal import tokens

try:
    import altair as alt
except ModuleNotFoundError:
    raise UserError("a plot needs altair; pip install 'kvsieve[report]'") from None

_INK = {"ink": "#1b2026", "muted": "#5d6672", "line": "#e2e6ea", "paper": "#ffffff"}
_SHAPES = {"double": "circle", "blocked": "square", "single": "triangle-up"}
_LEGEND: dict[str, Any] = {"orient": "right", "labelLimit": 260}
_PANELS = 4


def write(path: Path, benchmark: str, cells: Sequence[dict[str, Any]]) -> None:
    """Draw a panel for each batch (and attention shape) into an .svg or .png file."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for cell in cells:
        heads = "x".join(map(str, cell["heads"].values())) if "heads" in cell else ""
        groups.setdefault(f"batch {cell['batch']}" + (f", heads {heads}" if heads else ""), []).append(cell)
    names = list(dict.fromkeys(row["policy"] for cell in cells for row in cell["rows"]))
    kinds = list(dict.fromkeys(name.split()[0] for name in names))
    look = chart.styles(kinds)
    palette = chart.Palette(**_INK, policies={kind: style.light for kind, style in look.items()})
    colours = [palette.policies[name.split()[0]] for name in names]
    against = "the best dense attention installed" if benchmark == "attention" else "dense decoding"
    panels = [
        _panel(group, names, colours).properties(
            width=340,
            height=260,
            title=alt.TitleParams(
                title, subtitle=f"speed over {against}; dashed: the limit that the bytes set"
            ),
        )
        for title, group in list(groups.items())[:_PANELS]
    ]
    path.write_bytes(chart.image(panels, palette, path.suffix))


def _panel(cells: Sequence[dict[str, Any]], names: Sequence[str], colours: Sequence[str]) -> chart.Panel:
    points = [
        {
            "context": cell["context"],
            "label": tokens(cell["context"]),
            "name": row["policy"],
            "keys": row["layout"],
            "speedup": row["speedup"],
            "limit": row["limit"],
        }
        for cell in cells
        for row in cell["rows"]
    ]
    limits = list({(point["name"], point["context"]): point for point in points}.values())
    contexts = sorted({point["context"] for point in points})
    x = alt.X(
        "context:Q",
        title="context, tokens",
        scale=alt.Scale(type="log", base=2, domain=[contexts[0] / 1.15, contexts[-1] * 1.15], nice=False),
        axis=alt.Axis(
            values=contexts, labelExpr="datum.value >= 1024 ? datum.value / 1024 + 'k' : datum.value"
        ),
    )
    values = [point[key] for point in points for key in ("speedup", "limit")]
    low, high = math.floor(math.log2(min([*values, 1]))), math.ceil(math.log2(max([*values, 2])))
    ticks = [2.0**power for power in range(low, high + 1)]
    y_axis = alt.Axis(values=ticks, tickCount=len(ticks), format="~g")
    y_scale = alt.Scale(type="log", base=2, domain=[2.0**low, 2.0**high], nice=False)
    colours_of = alt.Scale(domain=list(names), range=list(colours))
    colour = alt.Color("name:N", scale=colours_of, legend=alt.Legend(title=None, **_LEGEND))
    shapes_of = alt.Scale(domain=list(_SHAPES), range=list(_SHAPES.values()))
    shape = alt.Shape("keys:N", scale=shapes_of, legend=alt.Legend(title="key layout", **_LEGEND))

    def y(field: str) -> alt.Y:
        return alt.Y(f"{field}:Q", title=None, axis=y_axis, scale=y_scale)

    measured, allowed = alt.Chart({"values": points}), alt.Chart({"values": limits})
    return alt.layer(
        allowed.mark_line(strokeDash=[5, 4], strokeWidth=1.3).encode(x=x, y=y("limit"), color=colour),
        measured.mark_line(strokeWidth=1.8).encode(x=x, y=y("speedup"), color=colour, detail="keys:N"),
        measured.mark_point(filled=True, size=75, opacity=1).encode(
            x=x, y=y("speedup"), color=colour, shape=shape
        ),
    )
