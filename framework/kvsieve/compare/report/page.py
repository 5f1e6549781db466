"""The page: everything a reader needs to judge a run, in one file that needs no network."""

import base64
import dataclasses
import functools
import gzip
import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from .. import paper
from ..results import Results, csv_lines, eager_notes, load_notes, noise_note
from . import chart
from .again import commands, protocol
from .answers import answers
from .depth import depth_maps
from .folder import RunFolder
from .headline import headline
from .heads import head_maps
from .names import policy_name, readable_label
from .pivot import pivot
from .style import FONT, HEAT_DARK, HEAT_LIGHT, Palette, styles
from .table import HEADER, table

MOST = 3_000_000  # bytes of a page

_PARTS = Path(__file__).parent / "parts"
_INK = {name: f"var(--{name})" for name in ("ink", "muted", "line", "paper")}


@dataclasses.dataclass(frozen=True, eq=False)
class Section:
    """A part of the page: NAME.html.jinja filled with `view`, and NAME.js, which finds `data`."""

    name: str
    title: str
    source: str  # a file with the same, for when there is no room
    view: Mapping[str, Any]
    data: Any = None

    @functools.cached_property
    def html(self) -> Markup:
        return Markup(_template(self.name).render(self.view))

    @functools.cached_property
    def packed(self) -> str:
        return "" if self.data is None else _packed(self.data)

    @property
    def script(self) -> str:
        path = _PARTS / f"{self.name}.js"
        return path.read_text("utf-8") if path.exists() else ""

    @property
    def size(self) -> int:
        """Bytes on the page, with some for its link, its tags and the hash of its script."""
        return sum(len(text.encode()) for text in (self.html, self.packed, self.script)) + 500


# Where there is no room for all, the last of these is left out first.
_IMPORTANT = ["again", "overview", "frontier", "paper", "results", "depth", "heads", "answers"]


def render(run: RunFolder) -> str:
    """The page of a run, as HTML of at most MOST bytes; it names the sections for which there is no room."""
    sections = _sections(run)
    left = MOST - len(_page(run, [], sections).encode())
    kept: list[Section] = []
    for section in sorted(sections, key=lambda section: _IMPORTANT.index(section.name)):
        if section.size <= left:
            left -= section.size
            kept.append(section)
    return _page(
        run,
        [section for section in sections if section in kept],
        [section for section in sections if section not in kept],
    )


def _page(run: RunFolder, shown: Sequence[Section], left_out: Sequence[Section]) -> str:
    results = run.results
    look = styles(results.policies)
    shared = (_PARTS / "share.js").read_text("utf-8")
    scripts = [shared, *(section.script for section in shown if section.script)]
    return _template("page").render(
        model=", ".join(_distinct(row.model for row in results.rows)),
        sections=shown,
        left_out=left_out,
        headline=headline(results),
        facts=_facts(run),
        failures=run.failures,
        shapes=[look[name].shape for name in results.policies],
        scripts=[Markup(script) for script in scripts],
        script_hashes=Markup(" ".join(_hash(script) for script in scripts)),
        css=Markup(_css(results)),
    )


def _sections(run: RunFolder) -> list[Section]:
    """All that this run has, in their order on the page."""
    results = run.results
    loads = load_notes(run.environment)
    groups = [table(group, results) for group in results.groups]
    axes = chart.measured(results) or chart.AXES[:1]
    drawings = [(axis.name, axis.label, _drawings(results, axis)) for axis in axes]
    frontier = {
        "legend": [policy_name(name) for name in results.policies],
        "axes": axes,
        "drawings": drawings[0][2],
        "width": chart.WIDTH,
        "height": chart.HEIGHT,
        "groups": groups,
        "disturbed": " ".join(loads),
    }
    notes = [noise_note(results.rows), *eager_notes(results.rows), *loads]
    again = {
        "commands": commands(run),
        "version": run.environment.get("kvsieve", ""),
        "config": run.config,
        "protocol": protocol(run),
        "environment": json.dumps(run.environment, indent=2, ensure_ascii=False),
        "parameters": _parameters(results),
    }
    sections = [
        Section("overview", "Policies by tasks", "summary.md", {"pivot": pivot(results)}),
        Section(
            "frontier",
            "Frontier",
            "summary.csv",
            frontier,
            {"labels": _labels(results), "axes": drawings[1:]},
        ),
        Section(
            "results",
            "All results",
            "summary.csv",
            {"groups": groups, "header": HEADER, "notes": [note for note in notes if note]},
            csv_lines(results.rows),
        ),
    ]
    if maps := depth_maps(run):
        drawn = [one["drawings"] for one in maps]
        sections.append(Section("depth", "Depth", "samples.jsonl", {"maps": maps}, drawn))
    if heads := head_maps(run.diagnosed, results):
        sections.append(Section("heads", "Heads", "diagnostics.jsonl", {"heads": heads}))
    if texts := answers(run):
        sections.append(Section("answers", "Answers", "samples.jsonl", {}, texts))
    if numbers := paper.beside(results.rows):
        view = {
            "paper": [number.cells() for number in numbers],
            "headings": paper.HEADINGS,
            "meaning": paper.MEANING,
        }
        sections.append(Section("paper", "The paper", "summary.md", view))
    return [*sections, Section("again", "Run it again", "config.yaml", again)]


@functools.cache
def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PARTS), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(f"{name}.html.jinja")


def _labels(results: Results) -> list[str]:
    """The text of every mark, row by row: the same on every axis."""
    labels = {id(row): chart.label(group, row) for group in results.groups for row in group.rows}
    return [labels[id(row)] for row in results.rows]


def _drawings(results: Results, axis: chart.Axis) -> list[Markup]:
    """The panel of every group."""
    palette = Palette(
        **_INK, policies={name: f"var(--policy-{i})" for i, name in enumerate(results.policies)}
    )
    return [Markup("").join(chart.panel(group, results, axis, palette)) for group in results.groups]


def _facts(run: RunFolder) -> list[tuple[str, str]]:
    """The task, machine and versions of the run; the rest of environment.json can be unfolded below."""
    results = run.results
    known = {key: value for key, value in run.environment.items() if value not in (None, "", {})}
    size = f"{known['parameters'] / 1e6:,.3g} M parameters" if "parameters" in known else ""
    cores = f"{known['cores']} cores" if "cores" in known else ""
    packages = ("kvsieve", "torch", "transformers", "python")
    versions = [f"{name} {known[name]}" for name in packages if name in known]
    plugins = [f"{name} {version}" for name, version in known.get("plugins", {}).items()]
    started = re.sub(r"T(\d\d:\d\d)[\d:.]*", r" \1 ", known.get("started", "")).replace("+00:00", "UTC")
    facts = {
        "Model": [*_distinct(row.model for row in results.rows), size, known.get("dtype", "")],
        "Tasks": _distinct(row.task for row in results.rows),
        "Policies": [policy_name(name) for name in results.policies],
        "Samples decoded": [f"{run.answers:,}" if run.answers else ""],
        "Started": [started],
        "Machine": [
            known.get("gpu", ""),
            known.get("cpu", ""),
            cores,
            known.get("ops", "") and f"ops: {known['ops']}",
            known.get("layout_auto", "") and f"layout auto: {known['layout_auto']}",
        ],
        "Versions": [*versions, *plugins],
        "Commit": [known.get("git_commit", "")],
    }
    lines = {name: ", ".join(str(part) for part in parts if part) for name, parts in facts.items()}
    return [(name, line) for name, line in lines.items() if line]


def _parameters(results: Results) -> list[tuple[str, str]]:
    """All parameters of every policy; once for each context where a compression means others there."""
    found: dict[str, dict[str, str]] = {}
    for group in results.groups:
        for row in group.rows:
            if row.parameters:
                label = readable_label(row.policy, row.policy_label)
                found.setdefault(label, {}).setdefault(row.parameters, group.context)
    return [
        (label if len(ways) == 1 else f"{label}, {context} tokens", parameters)
        for label, ways in found.items()
        for parameters, context in ways.items()
    ]


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _css(results: Results) -> str:
    look = styles(results.policies)
    heat = {"light": HEAT_LIGHT, "dark": HEAT_DARK}
    colours = {
        mode: " ".join(
            [f"--policy-{i}: {getattr(look[name], mode)};" for i, name in enumerate(results.policies)]
            + [f"--heat-{i}: {colour};" for i, colour in enumerate(heat[mode])]
        )
        for mode in heat
    }
    css = (_PARTS / "page.css").read_text("utf-8").replace("FONT", FONT)
    css += "\n".join(f".p{i} {{ color: var(--policy-{i}); }}" for i in range(len(results.policies)))
    return css.replace("LIGHT", colours["light"]).replace("DARK", colours["dark"])


def _packed(value: Any) -> str:
    """JSON, compressed, in letters and digits: no string of it can end the script element it stands in."""
    return base64.b64encode(gzip.compress(json.dumps(value).encode(), mtime=0)).decode()


def _hash(script: str) -> str:
    """The only scripts that a browser may run on this page are those whose hash stands in its policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
