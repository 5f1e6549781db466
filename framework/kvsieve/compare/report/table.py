"""The table, group by group: what stands in each cell, and which values are the best."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from . import chart
from .results import DENSE, MISSING, Group, Results, policy_name


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


def table(group: Group, results: Results) -> dict[str, Any]:
    """What the template shows of a group: its rows, with the best values of the sparse policies marked."""
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
                    _cell(
                        row.tokens_per_second,
                        _count(row.tokens_per_second),
                        marked["tokens_per_second"],
                        note="eager" if row.ran_eagerly else "",
                    ),
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
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 999.5 else f"{count:,.0f} GB"


def _count(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
