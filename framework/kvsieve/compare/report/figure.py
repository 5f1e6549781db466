"""The figure alone, as an image on a card of its own: it reads the same on a light and on a dark page."""

from ...errors import UserError
from ..results import Group, Results
from . import chart

_TASKS = ["needle", "repetition"]
_INK = {"ink": "#1b2026", "muted": "#5d6672", "line": "#e2e6ea", "paper": "#ffffff"}


def render(results: Results, suffix: str) -> bytes:
    if suffix not in (".png", ".svg"):
        raise UserError(f"a picture ends in .png or .svg, not {suffix!r}")
    look = chart.styles(results.policies)
    palette = chart.Palette(**_INK, policies={name: style.light for name, style in look.items()})
    panels = [
        chart.panel(group, results, palette, legend=True).properties(
            width=370, height=250, title=_title(group)
        )
        for group in _chosen(results)
    ]
    return chart.image(panels, palette, suffix)


def _chosen(results: Results) -> list[Group]:
    """The longest context of each of the two tasks."""
    longest = {group.rows[0].task: group for group in results.groups}  # the last of each task
    tasks = [task for task in _TASKS if task in longest] or list(longest)[:2]
    return [longest[task] for task in tasks]


def _title(group: Group) -> chart.Title:
    note = "" if group.higher_is_better else ", lower is better"
    return chart.Title(f"{group.task}, {group.context} tokens", subtitle=f"{group.metric}{note}")
