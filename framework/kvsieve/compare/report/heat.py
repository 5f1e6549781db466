"""The drawing of a heat map: a grid of squares, each in the colour of a share, with its number."""

import dataclasses
from collections.abc import Sequence

from markupsafe import Markup

from . import svg
from .style import HEAT_LIGHT, PALEST_HALF
from .svg import element

HIGH = 18  # of a square
_GAP = 2  # between squares
_BELOW = 18  # room for the labels of the columns
_INK, _PAPER, _MUTED, _LINE = (f"var(--{name})" for name in ("ink", "paper", "muted", "line"))


@dataclasses.dataclass(frozen=True)
class Square:
    share: float  # of the way from the lowest score to the highest
    number: str
    told: str  # everything about it, line by line


Tick = tuple[float, str]  # how many squares from the top or the left, and its words


@dataclasses.dataclass(frozen=True)
class Grid:
    label: str  # for those who do not see it
    squares: Sequence[Sequence[Square | None]]  # line by line; None: no sample
    wide: float  # of a square
    rows: Sequence[Tick]
    columns: Sequence[Tick]
    left: float  # where the first square is
    top: float
    heading: Sequence[Markup]

    @property
    def across(self) -> float:
        return self.left + self.wide * len(self.squares[0])


def draw(grid: Grid, across: float) -> Markup:
    """A drawing of its own; squares with a number are marks, line by line."""
    parts: list[Markup] = []
    numbers: dict[str, list[Markup]] = {_INK: [], _PAPER: []}
    for i, line in enumerate(grid.squares):
        for j, square in enumerate(line):
            x, y = grid.left + j * grid.wide, grid.top + i * HIGH
            about: dict[str, svg.Attribute] = {"fill": "none", "stroke": _LINE, "stroke_dasharray": "2 2"}
            if square:
                level = round(min(max(square.share, 0.0), 1.0) * (len(HEAT_LIGHT) - 1))
                about = {"class_": "square", "role": "img", "aria_label": square.told}
                about["fill"] = f"var(--heat-{level})"
                middle = x + (grid.wide - _GAP) / 2
                written = element("text", square.number, x=middle, y=y + HIGH / 2 + 2.7)
                numbers[_INK if level <= PALEST_HALF else _PAPER].append(written)
            parts.append(element("rect", x=x, y=y, width=grid.wide - _GAP, height=HIGH - _GAP, rx=2, **about))
    for at, words in grid.rows:
        y = grid.top + at * HIGH + 2.7
        parts.append(svg.text(grid.left - 6, y, words, _MUTED, text_anchor="end", aria_hidden="true"))
    below = grid.top + HIGH * len(grid.squares) + 12
    for at, words in grid.columns:
        x = grid.left + at * grid.wide - _GAP / 2
        parts.append(svg.text(x, below, words, _MUTED, text_anchor="middle", aria_hidden="true"))
    for colour, drawn in numbers.items():
        parts.append(
            element("g", *drawn, fill=colour, font_size=10.5, text_anchor="middle", aria_hidden="true")
        )
    return _drawing([*grid.heading, *parts], across, below - 12 + _BELOW, grid.label, "group")


def scale(low: str, high: str) -> Markup:
    """The key to the colours, from the lowest score to the highest."""
    left, wide = svg.width(low) + 8, 15
    end = left + wide * len(HEAT_LIGHT)
    squares = [
        element("rect", x=left + i * wide, y=0, width=wide, height=12, fill=f"var(--heat-{i})")
        for i in range(len(HEAT_LIGHT))
    ]
    ends = [
        svg.text(left - 6, 10, low, _MUTED, text_anchor="end"),
        svg.text(end + 6, 10, high, _MUTED),
    ]
    across = end + 8 + svg.width(high)
    return _drawing(
        [*squares, *ends], across, 14, f"The colours: palest {low}, strongest {high}", "img", "map scale"
    )


def _drawing(
    parts: Sequence[Markup], across: float, down: float, label: str, role: str, kind: str = "map"
) -> Markup:
    return element(
        "svg", *parts, class_=kind, role=role, aria_label=label,
        viewBox=f"0 0 {across:.0f} {down:.0f}", width=f"{across:.0f}", height=f"{down:.0f}",
    )  # fmt: skip
