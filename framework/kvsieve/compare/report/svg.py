"""Drawings as SVG text: elements with every string escaped, scales, axes, and files of them."""

import dataclasses
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

from markupsafe import Markup, escape

from ...errors import UserError
from .style import FONT, Palette

Attribute = str | float | None


def element(tag: str, *children: str, **attributes: Attribute) -> Markup:
    """`<tag ...>children</tag>`; `stroke_width` is stroke-width, and what is None is left out."""
    given = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_short(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    inside = Markup("").join(children)  # escapes what is not markup
    return Markup(f"<{tag}{given}>{inside}</{tag}>" if children else f"<{tag}{given}/>")


def text(x: float, y: float, words: str, fill: str, size: float = 11, **attributes: Attribute) -> Markup:
    return element("text", words, x=x, y=y, fill=fill, font_size=size, **attributes)


def line(
    x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1, **attributes: Attribute
) -> Markup:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, stroke=colour, stroke_width=width, **attributes)


def shape(outline: str, x: float, y: float, radius: float, **attributes: Attribute) -> Markup:
    """One of the marks of `style`, with its middle at x, y."""
    place = f"translate({_short(x)},{_short(y)}) scale({_short(radius)})"
    return element("path", d=outline, transform=place, **attributes)


@dataclasses.dataclass(frozen=True)
class Scale:
    """From values to places on the page; `log`: equal ratios are equally far apart."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high = self.low, self.high
        if self.log:
            value, low, high = math.log2(value), math.log2(low), math.log2(high)
        return self.start + (self.end - self.start) * (value - low) / (high - low)

    @property
    def ticks(self) -> list[float]:
        """Powers of two, or about five round numbers."""
        if self.log:
            powers = range(math.ceil(math.log2(self.low)), math.floor(math.log2(self.high)) + 1)
            return [2.0**power for power in powers if power % -(-len(powers) // 8) == 0]
        rough = (self.high - self.low) / 5
        unit = 10.0 ** math.floor(math.log10(rough))
        step = unit * min((1, 2, 2.5, 5, 10), key=lambda factor: abs(math.log(factor * unit / rough)))
        return [step * i for i in range(math.ceil(self.low / step), math.floor(self.high / step) + 1)]


def fraction(value: float) -> str:
    """`1/8`, `1`, `4`: the label of a ratio."""
    return f"1/{1 / value:.0f}" if value < 1 else f"{value:g}"


def axes(
    x: Scale,
    y: Scale,
    title: str,
    palette: Palette,
    x_ticks: Sequence[float] | None = None,
    x_label: Callable[[float], str] = fraction,
) -> Markup:
    """Lines across at the ticks of y, labels at those of x, and the title of x below."""
    ink = palette.muted
    parts = [line(x.start, y(at), x.end, y(at), palette.line) for at in y.ticks]
    parts += [text(x.start - 7, y(at) + 3.7, f"{round(at, 9):g}", ink, text_anchor="end") for at in y.ticks]
    for at in x.ticks if x_ticks is None else x_ticks:
        parts.append(text(x(at), y.start + 16, x_label(at), ink, text_anchor="middle"))
    parts.append(text((x.start + x.end) / 2, y.start + 34, title, ink, text_anchor="middle"))
    return element("g", *parts, class_="axes")


def path(points: Iterable[tuple[float, float]]) -> str:
    """A line through the points, for `d`."""
    return "M" + "L".join(f"{_short(x)},{_short(y)}" for x, y in points)


def width(words: str, size: float = 11) -> float:
    """About as wide as the words are drawn."""
    return 0.56 * size * len(words)


def legend(
    entries: Sequence[tuple[str, str, str]], left: float, right: float, y: float, ink: str
) -> tuple[Markup, float]:
    """Name, colour and shape of each series, in as many lines as they need; and where the next line goes."""
    drawn: list[Markup] = []
    x = left
    for name, colour, outline in entries:
        if x > left and x + 18 + width(name, 12) > right:
            x, y = left, y + 20
        drawn += [shape(outline, x + 5, y - 4, 5, fill=colour), text(x + 16, y, name, ink, 12)]
        x += 34 + width(name, 12)
    return element("g", *drawn), y + 20


def drawing(contents: Iterable[str], across: float, down: float, paper: str) -> str:
    """A whole file."""
    card = element("rect", width=across, height=down, fill=paper)
    return str(
        element(
            "svg", card, *contents,
            xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {_short(across)} {_short(down)}",
            width=across, height=down, font_family=FONT,
        )
    )  # fmt: skip


def image(drawn: str, file: Path) -> bytes:
    """A drawing as the .svg or .png file that the name of `file` asks for.

    Warns where this machine has no font to draw the words of a .png with.

    Raises:
        UserError: another ending; or .png without the extra `report`.
    """
    if file.suffix == ".svg":
        return drawn.encode()
    if file.suffix != ".png":
        raise UserError(f"a picture ends in .png or .svg, not {file.suffix!r}")
    try:
        import resvg_py
    except ModuleNotFoundError:
        raise UserError("a .png needs resvg_py; pip install 'kvsieve[report]', or ask for .svg") from None
    if not _has_font(resvg_py.svg_to_bytes):
        warnings.warn(
            f"{file} has no words: this machine has no font to draw them with. Install one of {FONT} "
            "(Debian: fonts-dejavu-core), or ask for .svg, whose words whoever looks at it draws",
            stacklevel=3,
        )
    return bytes(resvg_py.svg_to_bytes(svg_string=drawn, zoom=2))


def _has_font(draw: Callable[..., bytes]) -> bool:
    """Whether a word is drawn: `draw` leaves it out without a word of its own where it finds no font."""
    with_word, without = (
        draw(svg_string=drawing([text(4, 14, word, "black")], 20, 20, "white")) for word in ("a", "")
    )
    return with_word != without


def _short(value: Attribute) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
