"""The paper's figure: score against bytes read, one panel for each task and context length.

A panel is drawn in the colours of a `Palette`: CSS variables on the page, so that one drawing serves light,
dark and print; plain colours in a picture.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

from ...errors import UserError
from ..results import DENSE, MISSING, Group, Results, Row
from .names import policy_name, readable_label

try:
    import altair as alt
    import vl_convert
except ModuleNotFoundError as error:
    raise UserError(f"a report needs {error.name}; pip install 'kvsieve[report]'") from None

Title = alt.TitleParams
Panel = alt.LayerChart | alt.FacetChart
VEGA_LITE = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
FONT = "Inter, 'Segoe UI', Roboto, 'Helvetica Neue', 'Liberation Sans', Arial, sans-serif"

# Marks in a square of side 2, for the legend on the page and for Vega.
CIRCLE = "M1,0A1,1,0,1,1,-1,0A1,1,0,1,1,1,0Z"
_SQUARE = "M-0.9,-0.9L0.9,-0.9L0.9,0.9L-0.9,0.9Z"
_UP = "M0,-1.1L1.1,0.85L-1.1,0.85Z"
_DIAMOND = "M0,-1.25L1.1,0L0,1.25L-1.1,0Z"
_DOWN = "M0,1.1L1.1,-0.85L-1.1,-0.85Z"
_CROSS = "M-1.1,-0.4H-0.4V-1.1H0.4V-0.4H1.1V0.4H0.4V1.1H-0.4V0.4H-1.1Z"


@dataclasses.dataclass(frozen=True)
class Style:
    """The look of one policy everywhere: a colour and a shape, so that neither is needed alone."""

    light: str
    dark: str
    shape: str


# After Okabe and Ito: told apart with any colour vision.
_KNOWN = {
    DENSE: Style("#5b6470", "#a3adb9", CIRCLE),
    "sparq": Style("#0072b2", "#4db1ec", CIRCLE),
    "h2o": Style("#d55e00", "#ff8b45", _SQUARE),
    "local_window": Style("#00875f", "#35c79a", _UP),
}
_OTHERS = [
    Style("#a8468f", "#e58ccb", _DIAMOND),
    Style("#a97900", "#e8b53c", _DOWN),
    Style("#6a4fb3", "#ab97ee", _CROSS),
    Style("#2e8a9b", "#66cbdc", _SQUARE),
]


def styles(policies: Sequence[str]) -> dict[str, Style]:
    """A style for every policy; the known ones always have the same."""
    unknown = [name for name in policies if name not in _KNOWN]
    return {name: _KNOWN.get(name) or _OTHERS[unknown.index(name) % len(_OTHERS)] for name in policies}


@dataclasses.dataclass(frozen=True)
class Palette:
    ink: str
    muted: str
    line: str
    paper: str
    policies: Mapping[str, str]


def panel(group: Group, results: Results, palette: Palette, legend: bool = False) -> Panel:
    """Score with its 95% interval against bytes read over dense, on an axis of halves; dense's is a band."""
    rows = [row for row in group.rows if row.score is not None and row.bytes_ratio]
    look = styles(results.policies)
    names = [policy_name(policy) for policy in results.policies]
    low = min([1 / 16, *(row.bytes_ratio or 1 for row in rows)])
    high = max([1.0, *(row.bytes_ratio or 1 for row in rows)])
    x = alt.X(
        "bytes_ratio:Q",
        title="bytes read, dense = 1",
        scale=alt.Scale(type="log", base=2, domain=[low * 0.86, high * 1.16], nice=False),
        axis=alt.Axis(
            values=[2.0**power for power in range(math.floor(math.log2(low)), 1)],
            labelExpr="datum.value >= 1 ? '1' : '1/' + round(1 / datum.value)",
        ),
    )
    y = alt.Y("score:Q", title=None, scale=alt.Scale(domain=_range(group, results), nice=False, zero=False))
    colours = alt.Scale(domain=names, range=[palette.policies[policy] for policy in results.policies])
    shapes = alt.Scale(domain=names, range=[look[policy].shape for policy in results.policies])
    colour = alt.Color("name:N", scale=colours, legend=alt.Legend(title=None) if legend else None)
    shape = alt.Shape("name:N", scale=shapes, legend=alt.Legend(title=None) if legend else None)
    tooltip = [
        alt.Tooltip(f"{field}:N", title=title)
        for field, title in {
            "label": "Policy",
            "parameters": "Parameters",
            "score_text": group.metric.capitalize(),
            "interval": "95% interval",
            "against": "Against dense",
            "changes": "Answers",
            "ratio_text": "Bytes read",
            "samples": "Samples",
        }.items()
    ]
    layers = [alt.Chart({"values": []}).mark_point().encode(x=x, y=y)]  # the axes, whatever was measured
    if group.dense is not None:
        dense = {"values": [_point(group, group.dense)]}
        line = palette.policies[DENSE]
        if group.dense.score_low is not None:
            band = alt.Chart(dense).mark_rect(color=line, opacity=0.13, tooltip=None, aria=False)
            layers.append(band.encode(y=alt.Y("score_low:Q"), y2="score_high:Q"))
        layers.append(alt.Chart(dense).mark_rule(color=line, strokeDash=[5, 4], strokeWidth=1.2).encode(y=y))
    others = [policy for policy in results.policies if policy != DENSE]
    # Equal scores at equal ratios are common; a few pixels sideways keep every mark visible.
    step = min(5.0, 18 / max(len(others) - 1, 1))
    for policy in [*others, DENSE]:
        points = _series([row for row in rows if row.policy == policy], group)
        if not points:
            continue
        aside = 0 if policy == DENSE else step * (others.index(policy) - (len(others) - 1) / 2)
        chart = alt.Chart({"values": points})
        layers += [
            chart.mark_line(strokeWidth=1.6, opacity=0.55, xOffset=aside, aria=False).encode(
                x=x, y=y, color=colour, detail="series:N"
            ),
            chart.mark_rule(strokeWidth=1.6, opacity=0.75, xOffset=aside, aria=False).encode(
                x=x, y=alt.Y("score_low:Q"), y2="score_high:Q", color=colour
            ),
            chart.mark_point(
                filled=True, size=85, opacity=1, xOffset=aside, stroke=palette.paper, strokeWidth=1.2
            ).encode(x=x, y=y, color=colour, shape=shape, tooltip=tooltip),
        ]
    return alt.layer(*layers)


def specification(chart: Panel | alt.HConcatChart, palette: Palette, font_size: int = 11) -> dict[str, Any]:
    """The Vega-Lite specification of a chart in the palette, as plain data."""
    chart = chart.configure(
        background="transparent" if palette.paper.startswith("var") else palette.paper,
        font=FONT,
        view=alt.ViewConfig(stroke=None),
        axis=alt.AxisConfig(
            labelColor=palette.muted,
            titleColor=palette.muted,
            labelFontSize=font_size,
            titleFontSize=font_size,
            titleFontWeight="normal",
            titlePadding=8,
            gridColor=palette.line,
            domainColor=palette.line,
            tickColor=palette.line,
            labelPadding=5,
        ),
        axisX=alt.AxisConfig(grid=False),
        axisY=alt.AxisConfig(domain=False, ticks=False, tickCount=5),
        legend=alt.LegendConfig(
            orient="top",
            labelColor=palette.ink,
            labelFontSize=font_size + 1,
            symbolSize=90,
            symbolOpacity=1,
            columnPadding=18,
            offset=14,
        ),
        title=alt.TitleConfig(
            anchor="start",
            color=palette.ink,
            fontSize=font_size + 3,
            fontWeight=600,
            subtitleColor=palette.muted,
            subtitleFontSize=font_size,
            offset=12,
        ),
    )
    # Validation is half of the time, and a test draws this chart.
    spec: dict[str, Any] = chart.to_dict(validate=False)
    del spec["$schema"]  # an address that nothing has to follow
    return spec


@functools.cache
def javascript() -> str:
    """Vega, Vega-Lite and vega-embed in one script that can stand in a page."""
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", VEGA_LITE).replace(
        "</script", r"<\/script"
    )


def image(panels: Sequence[Panel], palette: Palette, suffix: str) -> bytes:
    """The panels side by side under one legend, as a .png or .svg file."""
    spec = specification(alt.hconcat(*panels, spacing=44), palette, font_size=12) | {"padding": 24}
    if suffix == ".svg":
        return vl_convert.vegalite_to_svg(spec, vl_version=VEGA_LITE).encode()
    return vl_convert.vegalite_to_png(spec, vl_version=VEGA_LITE, scale=2)


def _series(rows: Sequence[Row], group: Group) -> list[dict[str, Any]]:
    """The points of one policy; of several at the same budget each starts a line of its own."""
    seen: dict[str, int] = {}
    points = []
    for row in rows:
        seen[row.budget] = seen.get(row.budget, 0) + bool(row.budget)
        points.append(_point(group, row) | {"series": seen[row.budget]})
    return points


def _point(group: Group, row: Row) -> dict[str, Any]:
    return {
        "name": policy_name(row.policy),
        "label": readable_label(row.policy, row.policy_label),
        "parameters": row.parameters or MISSING,
        "score": row.score,
        "score_low": row.score if row.score_low is None else row.score_low,
        "score_high": row.score if row.score_high is None else row.score_high,
        "bytes_ratio": row.bytes_ratio,
        "score_text": group.text(row.score),
        "interval": group.interval(row) or MISSING,
        "against": f"{group.difference(row)} {row.mark}".strip() or MISSING,
        "changes": row.changes or MISSING,
        "ratio_text": MISSING if row.bytes_ratio is None else f"{row.bytes_ratio:.3f} of dense",
        "samples": MISSING if row.samples is None else str(row.samples),
    }


def _range(group: Group, results: Results) -> list[float]:
    """The score axis: the same for all contexts of a task, and from zero where more is better."""
    rows = [row for other in results.groups if other.rows[0].task == group.rows[0].task for row in other.rows]
    values = [
        value for row in rows for value in (row.score, row.score_low, row.score_high) if value is not None
    ]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if group.higher_is_better:
        low, high = min(low, 0.0), 1.0 if 0.5 < high <= 1.0 else high or 1.0
    room = 0.06 * (high - low or abs(high) or 1.0)
    return [low - room, high + room]
