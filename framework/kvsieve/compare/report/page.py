"""The page: everything a reader needs to judge a run, in one file that needs no network."""

import base64
import gzip
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from .. import paper
from ..results import Results, csv_lines, eager_notes, noise_note
from . import chart
from .again import commands, protocol
from .answers import answers
from .depth import depth_maps
from .folder import RunFolder
from .headline import headline
from .heads import head_maps
from .names import policy_name, readable_label
from .pivot import pivot
from .style import FONT, Palette, styles
from .table import HEADER, table

_PARTS = Path(__file__).parent / "parts"
_SCRIPTS = ["share.js", "charts.js", "tables.js", "answers.js"]
_INK = {name: f"var(--{name})" for name in ("ink", "muted", "line", "paper")}
_SECTIONS = {
    "overview": "Policies by tasks",
    "frontier": "Frontier",
    "results": "All results",
    "depth": "Depth",
    "heads": "Heads",
    "answers": "Answers",
    "paper": "The paper",
    "again": "Run it again",
}


def render(run: RunFolder) -> str:
    """The page of a run, as HTML."""
    results = run.results
    look = styles(results.policies)
    maps, heads, texts = depth_maps(run), head_maps(run.diagnosed, results), answers(run)
    numbers = paper.beside(results.rows)
    optional = {"depth": maps, "heads": heads, "answers": texts, "paper": numbers}
    absent = {name for name, found in optional.items() if not found}
    axes = chart.measured(results) or chart.AXES[:1]
    data = {
        "csv": csv_lines(results.rows),
        "labels": _labels(results),
        "answers": texts,
        # Of the first axis the page itself has the drawings.
        "axes": [(axis.name, axis.label, _drawings(results, axis)) for axis in axes[1:]],
    }
    scripts = [(_PARTS / name).read_text("utf-8") for name in _SCRIPTS]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_PARTS), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.jinja").render(
        model=", ".join(_distinct(row.model for row in results.rows)),
        sections=[(name, title) for name, title in _SECTIONS.items() if name not in absent],
        headline=headline(results),
        facts=_facts(run),
        failures=run.failures,
        pivot=pivot(results),
        legend=[{"name": policy_name(name), "shape": look[name].shape} for name in results.policies],
        axes=axes,
        drawings=_drawings(results, axes[0]),
        width=chart.WIDTH,
        height=chart.HEIGHT,
        groups=[table(group, results) for group in results.groups],
        header=HEADER,
        disturbed=_disturbed(run),
        notes=[
            note for note in [noise_note(results.rows), *eager_notes(results.rows), _disturbed(run)] if note
        ],
        depth_maps=maps,
        heads=heads,
        answers=texts,
        paper=[number.cells() for number in numbers],
        headings=paper.HEADINGS,
        meaning=paper.MEANING,
        commands=commands(run),
        config=run.config,
        protocol=protocol(run),
        environment=json.dumps(run.environment, indent=2, ensure_ascii=False),
        parameters=_parameters(results),
        data=_packed(data),
        scripts=[Markup(script) for script in scripts],
        script_hashes=Markup(" ".join(_hash(script) for script in scripts)),
        css=Markup(_css(results)),
    )


def _disturbed(run: RunFolder) -> str:
    """Why the speeds are not to be quoted; empty if they are, or if older runs did not note it."""
    load = run.environment.get("load")
    during = load.get("run") if isinstance(load, dict) else None
    why = during.get("not_to_be_quoted") if isinstance(during, dict) else None
    return f"tokens/s are not to be quoted: {why}." if why else ""


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
    colours = {
        mode: " ".join(
            f"--policy-{i}: {getattr(look[name], mode)};" for i, name in enumerate(results.policies)
        )
        for mode in ("light", "dark")
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
