"""The tables that a comparison prints: policies by tasks; on request each task with all its numbers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .markdown import MARKS, megabytes
from .results import (
    DENSE,
    MISSING,
    Group,
    Results,
    Row,
    bytes_range,
    chance_note,
    eager_notes,
    failure_notes,
    noise_note,
)
from .statistics import BETTER, FEW, WORSE

# Columns of a task's table, those left out of a narrow terminal last.
_COLUMNS = ["policy", "score", "against dense", "bytes read", "tokens/s", "KV MB", "95 % interval", "answers"]
_ORDER = [
    "context",
    "policy",
    "score",
    "95 % interval",
    "against dense",
    "answers",
    "bytes read",
    "KV MB",
    "tokens/s",
]


def show(results: Results, console: Console, *, details: bool = False) -> None:
    """Print policies by tasks; with `details` a table for each task, too."""
    if not results.rows:
        console.print("No sample was measured.")
        return
    for table in overview(results, console):
        console.print(table)
    for note in failure_notes(results):
        console.print(note, style="red", markup=False, soft_wrap=True)
    if any(row.symbol for row in results.rows):
        console.print(MARKS, style="dim", soft_wrap=False)
    if note := chance_note(results):
        console.print(note, style="dim", markup=False)
    if any(row.mark == FEW for row in results.rows):
        few = list(dict.fromkeys(g.column for g in results.groups if any(row.mark == FEW for row in g.rows)))
        console.print(
            f"Too few samples to tell policies from dense: {', '.join(few)}.", style="dim", markup=False
        )
    if not details:
        return
    console.print()
    for task in dict.fromkeys(group.task for group in results.groups):
        console.print(task_table([group for group in results.groups if group.task == task], console))
    for note in [noise_note(results.rows), *eager_notes(results.rows)]:
        if note:
            console.print(note, markup=False)


def overview(results: Results, console: Console) -> Iterator[Table]:
    """A line for every policy, a column for every task; in as many tables as the width asks for."""
    left = list(range(len(results.groups)))
    while left:
        shown = len(left)
        table = _overview(results, left)
        while shown > 1 and not _fits(table, console):
            shown -= 1
            table = _overview(results, left[:shown])
        yield table
        left = left[shown:]


def task_table(groups: Sequence[Group], console: Console) -> Table:
    """All numbers of one task at its contexts; the least important columns make room in a narrow terminal."""
    columns = _COLUMNS if any(row.changes for group in groups for row in group.rows) else _COLUMNS[:-1]
    count = len(columns)
    table = _task_table(groups, columns)
    while count > 2 and not _fits(table, console):
        count -= 1
        table = _task_table(groups, columns[:count])
    if count < len(columns):
        table.caption = f"No room here for {', '.join(columns[count:])}: see summary.md."
    return table


def _overview(results: Results, shown: Sequence[int]) -> Table:
    table = _empty("")
    _add_policy_column(table, results.pivot)
    table.add_column("bytes\nread", justify="right", no_wrap=True)
    for index in shown:
        heading = results.groups[index].column.replace(" ", "\n")
        table.add_column(escape(heading), justify="right", no_wrap=True)
    for label, rows in results.pivot.items():
        table.add_row(
            escape(label),
            bytes_range(rows.values()),
            *(_short(results.groups[i], rows.get(i)) for i in shown),
        )
    return table


def _short(group: Group, row: Row | None) -> str:
    if row is None or row.score is None:
        return MISSING if row is None else f"[red]{row.missing}[/red]" if row.error else row.missing
    score = _coloured(row, f"{row.score:.3g} {row.symbol or ' '}")
    return f"{group.count(row)} {score}".lstrip()


def _task_table(groups: Sequence[Group], columns: Sequence[str]) -> Table:
    better = "higher" if groups[0].higher_is_better else "lower"
    table = _empty(f"[bold]{escape(groups[0].task)}[/bold]: {escape(groups[0].metric)}, {better} is better")
    kept = [name for name in _ORDER if name == "context" or name in columns]
    for name in kept:
        if name == "policy":
            _add_policy_column(table, [row.policy_label for group in groups for row in group.rows])
        else:
            table.add_column(name, justify="right", no_wrap=True)
    for group in groups:
        best = _best(group)
        for i, row in enumerate(group.rows):
            cells = _cells(group, row, best) | {"context": str(row.context) if i == 0 else ""}
            table.add_row(*(cells[name] for name in kept), end_section=i == len(group.rows) - 1)
    return table


def _cells(group: Group, row: Row, best: float | None) -> dict[str, str]:
    score = f"{group.count(row)} {group.score(row)}".lstrip()
    against = MISSING if row.policy == DENSE else group.difference(row) or MISSING
    return {
        "policy": escape(row.policy_label),
        "score": f"[green]{score}[/green]" if row in group.contenders and row.score == best else score,
        "95 % interval": group.interval(row) or MISSING,
        "against dense": _coloured(row, f"{against} {row.symbol or ('?' if row.mark == FEW else ' ')}"),
        "answers": row.changes,
        "bytes read": MISSING if row.bytes_ratio is None else f"{row.bytes_ratio:.3f}",
        "KV MB": megabytes(row.kv_bytes),
        "tokens/s": f"[dim]noisy {row.speed}[/dim]" if row.noisy else escape(row.speed),
    }


def _best(group: Group) -> float | None:
    scores = [row.score for row in group.contenders if row.score is not None]
    return (max if group.higher_is_better else min)(scores, default=None)


def _coloured(row: Row, text: str) -> str:
    colour = {WORSE: "red", BETTER: "green"}.get(row.mark)
    return f"[{colour}]{text}[/{colour}]" if colour else text


def _empty(title: str) -> Table:
    return Table(
        title=title or None, title_justify="left", title_style="", caption_justify="left",
        box=box.SIMPLE_HEAD, pad_edge=False, padding=0,
    )  # fmt: skip


def _add_policy_column(table: Table, labels: Iterable[str]) -> None:
    """Long labels continue on a second line."""
    table.add_column("policy", width=min(28, max(map(len, ["policy", *labels]))), overflow="fold")


def _fits(table: Table, console: Console) -> bool:
    """Whether no cell would be cut."""
    unbounded = console.options.update(max_width=10_000)
    return table.__rich_measure__(console, unbounded).maximum <= console.width
