"""The table of all results, group by group: the text of each cell, and which values are the best."""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from ..markdown import slots
from ..results import DENSE, MISSING, Group, Results, Row, byte_text, speed
from ..statistics import CHANCE, FEW, WORSE
from .names import policy_name


class Column(NamedTuple):
    title: str
    help: str
    number: bool = True


HEADER = [
    Column(
        "Policy",
        "The policy with the budget asked for; below it, its parameters that are not the defaults.",
        number=False,
    ),
    Column(
        "Score",
        "The mean score of the task, with its 95% interval: Wilson for right or wrong answers, else t.",
    ),
    Column(
        "Against dense",
        "The score minus that of dense on the same samples, with its 95% interval, and the answers that were "
        "lost and won. ▼ worse, ▲ better: of all such marks at most 5% are expected to be wrong "
        "(Benjamini-Hochberg). few: too few samples to tell.",
    ),
    Column("Bytes read", "By attention while decoding, over what dense attention would have read."),
    Column(
        "KV memory",
        "Bytes held for keys, values and the policy's own data beside them; and tokens that a KV head holds "
        "at the end, on average over heads and layers.",
    ),
    Column(
        "Tokens/s",
        "Decoded tokens a second on this machine, all rows of a batch together: the median of the batches. "
        "Grey and noisy: the batches differ by more than 20%.",
    ),
    Column("Samples", "How many samples the score is the mean of."),
]


class Cell(NamedTuple):
    """`value` sorts the column; None is not measured."""

    value: float | None
    text: str
    style: str = ""  # a class of page.css
    notes: tuple[str, ...] = ()


def table(group: Group, results: Results) -> dict[str, Any]:
    """The template's view of a group: its rows, with the best values of the sparse policies marked."""
    best = {
        "score": _best(max if group.higher_is_better else min, (row.score for row in group.contenders)),
        "kv_bytes": _best(min, (row.kv_bytes for row in group.contenders)),
        "tokens_per_second": _best(max, (row.tokens_per_second for row in group.contenders if not row.noisy)),
    }
    lines = [
        {
            "name": policy_name(row.policy),
            "how": row.policy_label.removeprefix(row.policy).strip(),
            "index": results.policies.index(row.policy),
            "parameters": row.not_default,
            "mark": row.mark,
            "number": results.numbers[id(row)],
            "cells": _cells(group, row, best if row in group.contenders else {}),
        }
        for row in group.rows
    ]
    return {
        "task": group.task,
        "context": group.context,
        "metric": group.metric,
        "higher_is_better": group.higher_is_better,
        "lines": lines,
    }


def _cells(group: Group, row: Row, best: dict[str, float | None]) -> list[Cell]:
    def style(name: str) -> str:
        value = getattr(row, name)
        return "best" if value is not None and best.get(name) == value else ""

    per_step = () if row.bytes_per_step is None else (f"{byte_text(row.bytes_per_step)} a step",)
    held = () if row.slots_per_head is None else (f"{slots(row.slots_per_head)} slots a head",)
    return [
        Cell(row.score, group.score(row), style("score"), _notes(group.interval(row), row.error)),
        _against(group, row),
        Cell(
            row.bytes_ratio, MISSING if row.bytes_ratio is None else f"{row.bytes_ratio:.3f}", notes=per_step
        ),
        Cell(row.kv_bytes, byte_text(row.kv_bytes), style("kv_bytes"), held),
        Cell(
            row.tokens_per_second,
            speed(row.tokens_per_second),
            "noisy" if row.noisy else style("tokens_per_second"),
            _notes(_spread(row), "eager" if row.ran_eagerly else ""),
        ),
        Cell(row.samples, MISSING if row.samples is None else str(row.samples)),
    ]


def _against(group: Group, row: Row) -> Cell:
    if row.policy == DENSE or row.difference is None:
        return Cell(None, MISSING)
    difference, _, interval = group.difference(row).partition(" ")
    style = "worse" if row.mark == WORSE else ""
    unjudged = {FEW: "few samples", CHANCE: "dense at chance"}.get(row.mark, "")
    return Cell(
        row.difference,
        f"{row.symbol} {difference}".strip(),
        style,
        _notes(interval.strip("()"), row.changes, unjudged),
    )


def _spread(row: Row) -> str:
    if not row.noisy:
        return ""
    return f"noisy: {speed(row.tokens_per_second_min)} to {speed(row.tokens_per_second_max)}"


def _notes(*notes: str) -> tuple[str, ...]:
    return tuple(note for note in notes if note)


def _best(most: Callable[[list[float]], float], values: Iterable[float | None]) -> float | None:
    """The best of the measured values; None where all are equal, so that nothing stands out for nothing."""
    measured = [value for value in values if value is not None]
    return most(measured) if len(set(measured)) > 1 else None
