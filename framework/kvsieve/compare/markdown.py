"""summary.md: the tables of a run, ready to paste."""

from __future__ import annotations

from collections.abc import Sequence

from . import paper
from .results import (
    DENSE,
    MISSING,
    SYMBOLS,
    Group,
    Results,
    Row,
    bytes_range,
    chance_note,
    eager_notes,
    noise_note,
)
from .statistics import BETTER, WORSE

MARKS = (
    f"{SYMBOLS[WORSE]} worse, {SYMBOLS[BETTER]} better than dense on the same samples; at most 5 % of these "
    "marks are expected to be wrong. Unmarked: no difference was shown."
)
MEANING = (
    "`against dense`: the difference from the dense score on the same samples, with its 95 % interval. "
    "`better`, `worse`: what differs when at most 5 % of all such marks are expected to be wrong "
    "(Benjamini-Hochberg); `few`: too few samples to say. An interval is of its row alone: one that leaves 0 "
    "out may be unmarked among many rows."
)
_HEADINGS = ["context", "policy", "score", "95 % interval", "against dense", "answers", "bytes read / dense",
             "KV MB", "slots a head", "tokens/s"]  # fmt: skip


def markdown(results: Results, failures: Sequence[str], loads: Sequence[str] = ()) -> str:
    """Policies by tasks, then a table for every task, and what failed; `loads`: see load_notes."""
    lines = _pivot(results)
    for task in dict.fromkeys(group.task for group in results.groups):
        groups = [group for group in results.groups if group.task == task]
        better = "higher" if groups[0].higher_is_better else "lower"
        lines += [f"## {task}: {groups[0].metric} ({better} is better)", ""]
        rows = [row for group in groups for row in group.rows]
        empty = set() if any(row.changes for row in rows) else {"answers"}
        if all(row.slots_per_head is None for row in rows):
            empty.add("slots a head")
        kept = [i for i, heading in enumerate(_HEADINGS) if heading not in empty]
        lines.append(_line([_HEADINGS[i] for i in kept]))
        lines.append("|" + "|".join("---" if _HEADINGS[i] == "policy" else "---:" for i in kept) + "|")
        for group in groups:
            for row in group.rows:
                cells = _cells(group, row)
                lines.append(_line([cells[i] for i in kept]))
        lines.append("")
    if any(row.difference is not None for row in results.rows):
        lines += [MEANING, ""]
    lines += [
        line
        for note in [noise_note(results.rows), *eager_notes(results.rows), *loads]
        if note
        for line in (note, "")
    ]
    if known := paper.beside(results.rows):
        rule = "|" + "---|" * len(paper.HEADINGS)
        lines += ["## The SparQ paper's numbers", "", _line(paper.HEADINGS), rule]
        lines += [*(_line(beside.cells()) for beside in known), "", paper.MEANING, ""]
    if failures:
        lines += ["## Failed", "", *(f"- {failure}" for failure in failures), ""]
    return "\n".join(lines)


def _pivot(results: Results) -> list[str]:
    """A line for every policy, a column for every task."""
    lines = [
        "## Policies by tasks",
        "",
        _line(["policy", "bytes read", *(group.column for group in results.groups)]),
    ]
    lines.append("|---|" + "---:|" * (1 + len(results.groups)))
    for label, rows in results.pivot.items():
        scores = [_score(group, rows.get(index)) for index, group in enumerate(results.groups)]
        lines.append(_line([label, bytes_range(rows.values()), *scores]))
    if any(row.symbol for row in results.rows):
        lines += ["", MARKS]
    if note := chance_note(results):
        lines += ["", note]
    return [*lines, ""]


def _score(group: Group, row: Row | None) -> str:
    if row is None or row.score is None:
        return MISSING if row is None else row.missing
    return " ".join(filter(None, [f"{row.score:.3g}", row.symbol, group.count(row)]))


def _cells(group: Group, row: Row) -> list[str]:
    against = "" if row.policy == DENSE else f"{group.difference(row)} {row.mark}".strip() or MISSING
    ratio = MISSING if row.bytes_ratio is None else f"{row.bytes_ratio:.3f}"
    score = f"{group.score(row)} {group.count(row)}".strip()
    return [
        str(row.context), row.policy_label, score, group.interval(row) or MISSING, against, row.changes,
        ratio, megabytes(row.kv_bytes), slots(row.slots_per_head), row.speed + " noisy" * row.noisy,
    ]  # fmt: skip


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def slots(value: float | None) -> str:
    """Slots that a KV head holds, on average."""
    return MISSING if value is None else f"{value:,.1f}".removesuffix(".0")


def megabytes(value: float | None) -> str:
    if value is None:
        return MISSING
    return f"{value / 1e6:.2f}" if value < 1e8 else f"{value / 1e6:.0f}"
