"""The tables that a comparison prints, one for each task."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich import box
from rich.table import Table

from .summary import megabytes, number, policy_label, score_digits

HEADINGS = {
    "context": 7,
    "policy": 17,
    "score": 6,
    "95 % interval": 14,
    "bytes read": 10,
    "KV MB": 6,
    "tokens/s": 8,
}


def tables(rows: list[dict[str, Any]]) -> Iterator[Table]:
    """The lines of summary.csv as a person reads them; the best scores below dense are green."""
    for task in dict.fromkeys(row["task"] for row in rows):
        yield _table([row for row in rows if row["task"] == task])


def _table(rows: list[dict[str, Any]]) -> Table:
    task, metric = rows[0]["task"], rows[0]["metric"]
    better = "higher" if rows[0]["higher_is_better"] else "lower"
    title = f"[bold]{task}[/bold]: {metric}, {better} is better"
    table = Table(
        title=title, title_justify="left", title_style="", box=box.SIMPLE_HEAD, pad_edge=False, padding=0
    )
    for heading, width in HEADINGS.items():
        right = heading != "policy"
        table.add_column(heading, justify="right" if right else "left", min_width=width, no_wrap=right)
    digits = score_digits(rows)
    for context in dict.fromkeys(row["context"] for row in rows):
        group = [row for row in rows if row["context"] == context]
        best = _best(group)
        for i, row in enumerate(group):
            score, low, high = (number(row[name], digits) for name in ("score", "score_low", "score_high"))
            table.add_row(
                str(context) if i == 0 else "",
                policy_label(row),
                f"[green]{score}[/green]" if row["policy"] != "dense" and row["score"] == best else score,
                f"{low} to {high}",
                number(row["bytes_ratio"]),
                megabytes(row["kv_bytes"]),
                number(row["tokens_per_second"], 0),
                end_section=i == len(group) - 1,
            )
    return table


def _best(rows: list[dict[str, Any]]) -> float | None:
    scores = [row["score"] for row in rows if row["policy"] != "dense"]
    return (max if rows[0]["higher_is_better"] else min)(scores, default=None)
