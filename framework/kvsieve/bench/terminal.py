"""The table that a benchmark prints."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from rich import box
from rich.table import Table
from rich.text import Text

from .record import disturbance


class Column(NamedTuple):
    show: Callable[[dict[str, Any]], str]  # of a row
    meaning: str


_COLUMNS: dict[str, dict[str, Column]] = {
    "attention": {
        "time": Column(lambda row: duration(row["seconds"]["median"]), "of one step, median of the rounds"),
        "GB/s": Column(lambda row: f"{row['bytes_per_second'] / 1e9:.3g}", "bytes read and written in it"),
        "of copy": Column(lambda row: f"{row['share_of_copy_bandwidth']:.0%}", "of a copy's GB/s"),
        "faster": Column(lambda row: f"{row['speedup']:.2f}x", "than the best dense attention"),
        "limit": Column(lambda row: f"{row['limit']:.2f}x", "as much faster if only bytes counted"),
        "reached": Column(lambda row: f"{row['share_of_limit']:.0%}", "faster / limit"),
    },
    "decode": {
        "tokens/s": Column(lambda row: f"{row['tokens_per_second']:.3g}", "of all rows together"),
        "attention": Column(lambda row: duration(row["attention_seconds"]), "its part of a step"),
        "faster": Column(lambda row: f"{row['speedup']:.2f}x", "than our own dense decoding"),
        "limit": Column(lambda row: f"{row['limit']:.2f}x", "as much faster if only bytes counted"),
        "than HF": Column(
            lambda row: _if_known("{:.2f}x".format, row["speedup_over_transformers"]),
            "faster than transformers' generate",
        ),
        "prefill": Column(
            lambda row: _if_known(duration, row["prefill_seconds"]), "reading the prompts, timed once"
        ),
        "peak": Column(lambda row: _if_known(size, row["bytes_peak"]), "of memory, beside the weights"),
    },
}
_COLUMNS["growth"] = _COLUMNS["attention"]


def table(benchmark: str, cell: dict[str, Any]) -> Table:
    """A line for each policy and key layout of a cell, and what the columns mean; 80 columns wide."""
    columns = _COLUMNS[benchmark]
    shown = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0), header_style="bold")
    shown.title, shown.title_justify = Text(_title(cell)), "left"
    shown.add_column("policy", min_width=13, max_width=22)
    shown.add_column("keys", no_wrap=True)
    for heading in columns:
        shown.add_column(heading, justify="right", no_wrap=True)
    for row in cell["rows"]:
        values = (column.show(row) for column in columns.values())
        marked = disturbance([row if "load" in row else cell])
        shown.add_row(Text(row["policy"] + " *" * bool(marked)), row["layout"], *values)
    legend = "; ".join(f"{heading}: {column.meaning}" for heading, column in columns.items())
    if why := disturbance([cell]):
        legend += f"\n* not to be quoted: {why}"
    shown.caption, shown.caption_justify = Text(legend), "left"
    return shown


def _title(cell: dict[str, Any]) -> str:
    """The sizes, and the baseline that the rows are compared with."""
    title = f"B={cell['batch']} T={tokens(cell['context'])}"
    if "best_dense" in cell:
        best, heads = cell["best_dense"], "x".join(str(size) for size in cell["heads"].values())
        speed = f"{duration(best['seconds']['median'])}, {best['bytes_per_second'] / 1e9:.3g} GB/s"
        return f"{title} heads {heads}; best dense: {best['name']}, {speed}"
    stock = cell["transformers"]
    speed = f"{cell['batch'] / stock['median']:.3g} tokens/s" if "median" in stock else stock["not_run"]
    rest = duration(cell["without_attention"]["median"])
    return f"{title}; all but attention: {rest} a step; transformers (HF): {speed}"


def tokens(count: int) -> str:
    return f"{count // 1024}k" if count % 1024 == 0 else str(count)


def duration(seconds: float) -> str:
    """Three digits."""
    for unit, size in (("s", 1), ("ms", 1e-3)):
        if seconds >= 0.9995 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds * 1e6:.3g} us"


def size(count: float) -> str:
    """Bytes, three digits."""
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB"


def _if_known(shown: Callable[[float], str], value: float | None) -> str:
    return "-" if value is None else shown(value)
