"""The page: what was run, the finding, the figure and the table, in one file that needs no network."""

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from markupsafe import Markup

from . import chart
from .finding import finding
from .results import DENSE, MISSING, Group, Results, policy_name

_HERE = Path(__file__).parent
_INK = {name: f"var(--{name})" for name in ("ink", "muted", "line", "paper")}


class Column(NamedTuple):
    title: str
    help: str
    number: bool = True


HEADER = [
    Column("Policy", "The policy, the compression asked for, and its parameters.", number=False),
    Column("Score", "The mean score of the task, with its 95% bootstrap interval."),
    Column(
        "Of dense",
        "Share of the dense score; turned round where lower is better, so that more is always better.",
    ),
    Column(
        "Bytes ratio", "Bytes that attention read while decoding, over what dense attention would have read."
    ),
    Column("KV memory", "Bytes held for keys, values and what the policy keeps beside them."),
    Column("Tokens/s", "Decoded tokens a second on this machine, all rows of the batch together."),
    Column("Samples", "How many samples the score is the mean of."),
]


def render(results: Results) -> str:
    look = chart.styles(results.policies)
    palette = chart.Palette(
        **_INK, policies={name: f"var(--policy-{i})" for i, name in enumerate(results.policies)}
    )
    specifications = [
        chart.specification(
            chart.panel(group, results, palette).properties(width="container", height=230), palette
        )
        | {"autosize": {"type": "fit-x", "contains": "padding"}}
        for group in results.groups
    ]
    scripts = [chart.javascript(), (_HERE / "page.js").read_text("utf-8")]
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("page.html.jinja").render(
        model=", ".join(_distinct(row.model for row in results.rows)),
        finding=finding(results),
        facts=_facts(results),
        legend=[{"name": policy_name(name), "shape": look[name].shape} for name in results.policies],
        columns=_columns(results),
        groups=[_group(group, results) for group in results.groups],
        header=HEADER,
        config=results.config,
        environment=json.dumps(results.environment, indent=2, ensure_ascii=False)
        if results.environment
        else "",
        charts=_data_block(specifications),
        scripts=[Markup(script) for script in scripts],
        script_hashes=Markup(" ".join(_hash(script) for script in scripts)),
        css=Markup(_css(results)),
    )


def _facts(results: Results) -> list[tuple[str, str]]:
    """What was run, then what environment.json tells of where, whatever its keys are."""
    facts = [
        ("Model", ", ".join(_distinct(row.model for row in results.rows))),
        ("Tasks", ", ".join(_distinct(row.task for row in results.rows))),
        ("Policies", ", ".join(policy_name(name) for name in results.policies)),
    ]
    if results.answers:
        facts.append(("Samples decoded", f"{results.answers:,}"))
    for key, value in results.environment.items():
        text = _plain(value)
        if text and len(text) <= 160 and key.lower() != "model":
            facts.append((key.replace("_", " ").capitalize(), text))
    return facts


def _plain(value: Any) -> str:
    if isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d\S*", value):
        zone = " UTC" if re.search(r"(Z|\+00:00)$", value) else ""
        return f"{value[:10]} {value[11:16]}{zone}"
    if isinstance(value, dict):
        return ", ".join(
            f"{key} {_plain(inner)}" for key, inner in value.items() if inner not in (None, "", {}, [])
        )
    if isinstance(value, list):
        return ", ".join(map(_plain, value))
    return (
        "" if value is None else {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)
    )


def _columns(results: Results) -> int:
    """Panels side by side: one task in a line where its contexts allow it."""
    contexts = [
        sum(group.task == task for group in results.groups)
        for task in _distinct(row.task for row in results.rows)
    ]
    return min(len(results.groups), 2 if max(contexts) == 2 and len(contexts) > 1 else 3)


def _group(group: Group, results: Results) -> dict[str, Any]:
    look = chart.styles(results.policies)
    sparse = [row for row in group.rows if row.policy != DENSE]
    most = max if group.higher_is_better else min
    best = {
        "score": _best(most, (row.score for row in sparse)),
        "kv_bytes": _best(min, (row.kv_bytes for row in sparse)),
        "tokens_per_second": _best(max, (row.tokens_per_second for row in sparse)),
    }
    lines = []
    for row in group.rows:
        marked = {
            name: row.policy != DENSE and value is not None and getattr(row, name) == value
            for name, value in best.items()
        }
        quality = group.quality(row)
        lines.append(
            {
                "name": policy_name(row.policy),
                "index": results.policies.index(row.policy),
                "shape": look[row.policy].shape,
                "compression": row.compression,
                "parameters": row.parameters,
                "cells": [
                    _cell(row.score, group.text(row.score), marked["score"], note=group.interval(row)),
                    _cell(quality, MISSING if quality is None else f"{quality:.1%}"),
                    _cell(
                        row.bytes_ratio,
                        MISSING if row.bytes_ratio is None else f"{row.bytes_ratio:.3f}",
                        note="" if row.bytes_per_step is None else f"{_bytes(row.bytes_per_step)} a step",
                    ),
                    _cell(row.kv_bytes, _bytes(row.kv_bytes), marked["kv_bytes"]),
                    _cell(row.tokens_per_second, _count(row.tokens_per_second), marked["tokens_per_second"]),
                    _cell(row.samples, _count(row.samples)),
                ],
            }
        )
    return {
        "task": group.task,
        "context": group.context,
        "metric": group.metric,
        "higher_is_better": group.higher_is_better,
        "lines": lines,
    }


def _cell(value: float | None, text: str, best: bool = False, note: str = "") -> dict[str, Any]:
    return {"value": value, "text": text, "best": best, "note": note}


def _best(most: Callable[[list[float]], float], values: Iterable[float | None]) -> float | None:
    """The best of the measured values; None where all are equal, so that nothing stands out for nothing."""
    measured = [value for value in values if value is not None]
    return most(measured) if len(set(measured)) > 1 else None


def _bytes(count: float | None) -> str:
    if count is None:
        return MISSING
    for unit in ("B", "KiB", "MiB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.3g} GiB" if count < 1000 else f"{count:,.0f} GiB"


def _count(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _distinct(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(names))


def _css(results: Results) -> str:
    look = chart.styles(results.policies)
    colours = {
        mode: " ".join(
            f"--policy-{i}: {getattr(look[name], mode)};" for i, name in enumerate(results.policies)
        )
        for mode in ("light", "dark")
    }
    css = (_HERE / "page.css").read_text("utf-8").replace("FONT", chart.FONT)
    return css.replace("LIGHT", colours["light"]).replace("DARK", colours["dark"])


def _data_block(value: Any) -> Markup:
    """JSON that cannot end the script element it stands in, whatever strings it holds."""
    text = json.dumps(value, ensure_ascii=True)
    return Markup(text.replace("&", r"\u0026").replace("<", r"\u003c").replace(">", r"\u003e"))


def _hash(script: str) -> str:
    """The only scripts that a browser may run on this page are those whose hash stands in its policy."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
