"""The frontier alone, as an image on a card of its own: it reads the same on a light and on a dark page."""

from pathlib import Path

from ..results import Group, Results
from . import chart, svg
from .style import on_paper
from .svg import element

_TASKS = ["needle", "repetition"]
_EDGE, _GAP, _TITLE = 24, 44, 46


def render(results: Results, path: Path) -> bytes:
    palette = on_paper(results.policies)
    groups = _chosen(results)
    across = 2 * _EDGE + len(groups) * chart.WIDTH + (len(groups) - 1) * _GAP
    key, top = svg.legend(chart.legend(results, palette), _EDGE, across - _EDGE, _EDGE + 8, palette.ink)
    parts = [key]
    for i, group in enumerate(groups):
        note = "" if group.higher_is_better else ", lower is better"
        parts.append(
            element(
                "g",
                svg.text(0, 16, f"{group.task}, {group.context} tokens", palette.ink, 14, font_weight=600),
                svg.text(0, 33, f"{group.metric}{note}", palette.muted),
                element(
                    "g",
                    *chart.panel(group, results, chart.AXES[0], palette),
                    transform=f"translate(0,{_TITLE})",
                ),
                transform=f"translate({_EDGE + i * (chart.WIDTH + _GAP)},{top})",
            )
        )
    return svg.image(svg.drawing(parts, across, top + _TITLE + chart.HEIGHT + _EDGE, palette.paper), path)


def _chosen(results: Results) -> list[Group]:
    """The longest context of each of the two tasks."""
    longest = {group.rows[0].task: group for group in results.groups}  # the last of each task
    tasks = [task for task in _TASKS if task in longest] or list(longest)[:2]
    return [longest[task] for task in tasks]
