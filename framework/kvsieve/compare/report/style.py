"""The look of a policy: one colour and one shape everywhere, so that neither is needed alone."""

import dataclasses
from collections.abc import Mapping, Sequence

from ..results import DENSE

FONT = "Inter, 'Segoe UI', Roboto, 'Helvetica Neue', 'Liberation Sans', Arial, 'DejaVu Sans', sans-serif"

# Marks in a square of side 2.
CIRCLE = "M1,0A1,1,0,1,1,-1,0A1,1,0,1,1,1,0Z"
SQUARE = "M-0.9,-0.9L0.9,-0.9L0.9,0.9L-0.9,0.9Z"
UP = "M0,-1.1L1.1,0.85L-1.1,0.85Z"
DOWN = "M0,1.1L1.1,-0.85L-1.1,-0.85Z"
DIAMOND = "M0,-1.25L1.1,0L0,1.25L-1.1,0Z"
CROSS = "M-1.1,-0.4H-0.4V-1.1H0.4V-0.4H1.1V0.4H0.4V1.1H-0.4V0.4H-1.1Z"
STAR = "M0,-1.3L0.38,-0.45L1.25,-0.4L0.6,0.2L0.8,1.1L0,0.6L-0.8,1.1L-0.6,0.2L-1.25,-0.4L-0.38,-0.45Z"


@dataclasses.dataclass(frozen=True)
class Style:
    light: str
    dark: str
    shape: str


# After Okabe and Ito: told apart with any colour vision.
_KNOWN = {
    DENSE: Style("#5b6470", "#a3adb9", CIRCLE),
    "sparq": Style("#0072b2", "#4db1ec", CIRCLE),
    "h2o": Style("#d55e00", "#ff8b45", SQUARE),
    "local_window": Style("#00875f", "#35c79a", UP),
}
# Six colours and seven shapes: 42 policies before two look the same.
_COLOURS = [
    ("#a8468f", "#e58ccb"), ("#a97900", "#e8b53c"), ("#6a4fb3", "#ab97ee"),
    ("#2e8a9b", "#66cbdc"), ("#b8383d", "#ff8a85"), ("#5f7d1f", "#a9cf5b"),
]  # fmt: skip
_SHAPES = [DIAMOND, DOWN, CROSS, SQUARE, STAR, UP, CIRCLE]


def styles(policies: Sequence[str]) -> dict[str, Style]:
    """A style for every policy; the known ones always have the same."""
    unknown = [name for name in policies if name not in _KNOWN]
    others = {
        name: Style(*_COLOURS[i % len(_COLOURS)], _SHAPES[i % len(_SHAPES)]) for i, name in enumerate(unknown)
    }
    return {name: _KNOWN.get(name) or others[name] for name in policies}


# The colours of heat maps, from the lowest score, near the colour of the paper, to the highest: they go from
# pale to dark or from dark to pale, so that they are told apart with any colour vision, and without colour.
HEAT_LIGHT = (
    "#ebf1f4", "#c8e2ec", "#a6d1e5", "#85c0dd", "#67aed3", "#4b9cc8",
    "#237dad", "#0a6b9e", "#005a8d", "#004a7b", "#00396b",
)  # fmt: skip
HEAT_DARK = (
    "#25292f", "#293643", "#2c4458", "#2e526d", "#306180", "#337092",
    "#458bae", "#57a1c4", "#6db8d8", "#87ceea", "#a4e5fb",
)  # fmt: skip
PALEST_HALF = 5  # up to this level a number on it has the ink's colour, beyond that of the paper


@dataclasses.dataclass(frozen=True)
class Palette:
    """Colours of a drawing: CSS variables on the page, so that one drawing serves light, dark and print."""

    ink: str
    muted: str
    line: str
    paper: str
    policies: Mapping[str, str]


def on_paper(policies: Sequence[str]) -> Palette:
    """Plain colours, for a picture on a card of its own."""
    colours = {name: style.light for name, style in styles(policies).items()}
    return Palette(ink="#1b2026", muted="#5d6672", line="#e2e6ea", paper="#ffffff", policies=colours)
