"""The frontier: score against bytes read, memory held or time a token, one panel for each task and length.

All three are shares of what dense attention took, on an axis of halves, so that panels can be compared. A
panel is drawn in the colours of a `Palette`.
"""

import dataclasses
from collections.abc import Callable, Sequence

from markupsafe import Markup

from ..results import DENSE, MISSING, Group, Results, Row, byte_text, speed
from . import svg
from .names import readable_label
from .style import Palette, styles
from .svg import element

WIDTH, HEIGHT = 360, 262
_LEFT, _RIGHT, _TOP, _BOTTOM = 42, 10, 10, 44


def _bytes(row: Row, dense: Row | None) -> float | None:
    return row.bytes_ratio or None


def _memory(row: Row, dense: Row | None) -> float | None:
    return _over(row.kv_bytes, dense.kv_bytes if dense else None)


def _time(row: Row, dense: Row | None) -> float | None:
    return _over(dense.tokens_per_second if dense else None, row.tokens_per_second)


def _over(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None


@dataclasses.dataclass(frozen=True)
class Axis:
    """A price: less is better."""

    name: str
    title: str
    label: str  # below the axis
    share: Callable[[Row, Row | None], float | None]  # of what dense took, from a row and that of dense


AXES = [
    Axis("bytes", "Bytes read", "bytes read, dense = 1", _bytes),
    Axis("memory", "Memory held", "KV memory held, dense = 1", _memory),
    Axis("time", "Time a token", "measured time a token, dense = 1", _time),
]


def measured(results: Results) -> list[Axis]:
    """The axes along which this run tells anything."""
    return [
        axis
        for axis in AXES
        if any(axis.share(row, group.dense) for group in results.groups for row in group.rows)
    ]


def panel(group: Group, results: Results, axis: Axis, palette: Palette) -> list[Markup]:
    """The elements of a panel of WIDTH x HEIGHT: scores with their 95% intervals; dense's is a band."""
    points = [
        (row, share)
        for row in group.rows
        if row.score is not None and (share := axis.share(row, group.dense))
    ]
    shares = [share for _, share in points]
    x = svg.Scale(min([0.5, *shares]) * 0.86, max([1.0, *shares]) * 1.16, _LEFT, WIDTH - _RIGHT, log=True)
    y = svg.Scale(*_range(group, results), HEIGHT - _BOTTOM, _TOP)
    return _Panel(group, results, axis, palette, x, y).draw(points)


@dataclasses.dataclass(frozen=True)
class _Panel:
    group: Group
    results: Results
    axis: Axis
    palette: Palette
    x: svg.Scale
    y: svg.Scale

    def draw(self, points: Sequence[tuple[Row, float]]) -> list[Markup]:
        """Dense last, so that it lies on top."""
        others = [policy for policy in self.results.policies if policy != DENSE]
        # Equal scores at equal shares are common; a few pixels sideways keep every mark visible.
        step = min(5.0, 18 / max(len(others) - 1, 1))
        parts = [svg.axes(self.x, self.y, self.axis.label, self.palette), *self.dense()]
        parts.append(element("path", class_="frontier", d="M0,0", fill="none", stroke=self.palette.ink))
        for i, policy in enumerate([*others, DENSE]):
            aside = 0.0 if policy == DENSE else step * (i - (len(others) - 1) / 2)
            placed = [(row, share, self.x(share) + aside) for row, share in points if row.policy == policy]
            if placed:
                parts.append(self.series(policy, placed))
        return parts

    def dense(self) -> list[Markup]:
        """A band for its interval, and a line for its score."""
        dense = self.group.dense
        if dense is None or dense.score is None:
            return []
        x, y, colour, parts = self.x, self.y, self.palette.policies[DENSE], []
        if dense.score_low is not None and dense.score_high is not None:
            top, bottom = y(dense.score_high), y(dense.score_low)
            parts.append(element("rect", x=x.start, width=x.end - x.start, y=top, height=bottom - top,
                                 fill=colour, fill_opacity=0.13))  # fmt: skip
        level = y(dense.score)
        return [*parts, svg.line(x.start, level, x.end, level, colour, width=1.2, stroke_dasharray="5 4")]

    def series(self, policy: str, placed: Sequence[tuple[Row, float, float]]) -> Markup:
        """The intervals of a policy, lines through what differs in its budget alone, and the marks."""
        points = [(row, px, self.y(row.score or 0.0)) for row, _, px in placed]
        lines = "".join(svg.path(line) for line in _lines(points) if len(line) > 1)
        bars = "".join(
            svg.path([(px, self.y(row.score_low)), (px, self.y(row.score_high))])
            for row, px, _ in points
            if row.score_low is not None and row.score_high is not None and policy != DENSE
        )
        colour = self.palette.policies[policy]
        faint = 0.7 if len(self.results.policies) <= 6 else 0.35
        parts = [
            element("path", d=d, fill="none", stroke=colour, stroke_width=1.6, stroke_opacity=opacity)
            for d, opacity in ((lines, 0.5), (bars, faint))
            if d
        ]
        paper, marks = self.palette.paper, [self.mark(row, share, px, colour) for row, share, px in placed]
        # The edge of a mark is told in its shape's own units.
        parts.append(element("g", *marks, fill=colour, stroke=paper, stroke_width=0.2))
        return element("g", *parts, class_="series", data_policy=self.results.policies.index(policy))

    def mark(self, row: Row, share: float, px: float, colour: str) -> Markup:
        """Hollow where its price is a noisy speed."""
        noisy: dict[str, svg.Attribute] = {}
        if self.axis.name == "time" and row.noisy:
            noisy = {"fill": self.palette.paper, "stroke": colour, "stroke_width": 0.3}
        outline = styles(self.results.policies)[row.policy].shape
        about: dict[str, svg.Attribute] = {
            "data_row": self.results.numbers[id(row)],
            "data_share": f"{share:.5g}",
        }
        kind = "mark noisy" if noisy else "mark"
        return svg.shape(outline, px, self.y(row.score or 0.0), 5.2, class_=kind, **about, **noisy)


def _lines(points: Sequence[tuple[Row, float, float]]) -> list[list[tuple[float, float]]]:
    """Of several points at the same budget each starts a line of its own; unasked ones are joined."""
    seen: dict[str, int] = {}
    lines: dict[int, list[tuple[float, float]]] = {}
    for row, px, py in points:
        seen[row.budget] = seen.get(row.budget, 0) + bool(row.budget)
        lines.setdefault(seen[row.budget], []).append((px, py))
    return [sorted(line) for line in lines.values()]


def label(group: Group, row: Row) -> str:
    """Everything about a mark, line by line: the tooltip, and what a screen reader says."""
    lines = {
        group.metric: f"{group.text(row.score)} ({group.interval(row)})"
        if group.interval(row)
        else group.score(row),
        "against dense": f"{group.difference(row)} {row.mark}".strip(),
        "answers": row.changes,
        "bytes read": MISSING if row.bytes_ratio is None else f"{row.bytes_ratio:.3f} of dense",
        "memory": byte_text(row.kv_bytes),
        "tokens/s": speed(row.tokens_per_second) + " (noisy)" * row.noisy,
        "samples": str(row.samples or MISSING),
        "failed": row.error,
    }
    return "\n".join(
        [
            readable_label(row.policy, row.policy_label),
            *(f"{name}: {value}" for name, value in lines.items() if value),
        ]
    )


def _range(group: Group, results: Results) -> tuple[float, float]:
    """The score axis: the same for all contexts of a task, and from zero where more is better."""
    rows = [row for other in results.groups if other.task == group.task for row in other.rows]
    values = [v for row in rows for v in (row.score, row.score_low, row.score_high) if v is not None]
    low, high = min(values, default=0.0), max(values, default=1.0)
    if group.higher_is_better:
        low, high = min(low, 0.0), 1.0 if 0.5 < high <= 1.0 else high or 1.0
    room = 0.06 * (high - low or abs(high) or 1.0)
    return low - room, high + room


def legend(results: Results, palette: Palette) -> list[tuple[str, str, str]]:
    """Name, colour and shape of every policy."""
    look = styles(results.policies)
    return [
        (readable_label(name, name), palette.policies[name], look[name].shape) for name in results.policies
    ]
