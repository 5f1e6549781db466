"""The first table of the page: policies by tasks, a score with its mark in every cell."""

from typing import Any

from ..results import DENSE, MISSING, Group, Results, Row, bytes_range, chance_note
from .names import policy_name


def pivot(results: Results) -> dict[str, Any]:
    """The template's view: tasks with their lengths as columns, and a line for every policy."""
    tasks: list[dict[str, Any]] = []
    for group in results.groups:
        if not tasks or tasks[-1]["task"] != group.task:
            note = group.metric + ("" if group.higher_is_better else ", lower is better")
            tasks.append({"task": group.task, "note": note, "contexts": []})
        tasks[-1]["contexts"].append(group.context)
    lines = []
    for label, rows in results.pivot.items():
        policy = next(iter(rows.values())).policy
        lines.append(
            {
                "name": policy_name(policy),
                "how": label.removeprefix(policy).strip(),
                "index": results.policies.index(policy),
                "bytes": bytes_range(rows.values()),
                "cells": [_cell(group, rows.get(i)) for i, group in enumerate(results.groups)],
            }
        )
    return {"tasks": tasks, "lines": lines, "note": chance_note(results)}


def _cell(group: Group, row: Row | None) -> dict[str, Any]:
    if row is None or row.score is None:
        text, why = (row.missing, row.error) if row is not None else (MISSING, "")
        unknown = {"text": text, "value": None, "title": why or "not measured"}
        return unknown | dict.fromkeys(("count", "symbol", "mark"), "")
    against = "" if row.policy == DENSE else f"against dense {group.difference(row)}"
    interval = f"95% interval {group.interval(row)}" if group.interval(row) else ""
    told = [group.count(row), interval, against, row.changes]
    return {
        "text": group.text(row.score),
        "count": group.count(row),
        "value": row.score,
        "symbol": row.symbol,
        "mark": row.mark if row.symbol else "",
        "title": "; ".join(part for part in told if part),
    }
