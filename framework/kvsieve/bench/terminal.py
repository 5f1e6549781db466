"""The table that a benchmark prints."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

Column = Callable[[dict[str, Any]], str]

_JUDGED: dict[str, Column] = {
    "faster": lambda row: f"{row['speedup']:.2f}x",
    "limit": lambda row: f"{row['limit']:.2f}x",
    "reached": lambda row: f"{row['share_of_limit']:.0%}",
}
_COLUMNS: dict[str, dict[str, Column]] = {
    "attention": {
        "time": lambda row: duration(row["seconds"]["median"]),
        "GB/s": lambda row: f"{row['bytes_per_second'] / 1e9:.3g}",
        "of copy": lambda row: f"{row['share_of_copy_bandwidth']:.0%}",
        **_JUDGED,
    },
    "decode": {
        "tokens/s": lambda row: f"{row['tokens_per_second']:.3g}",
        "attention": lambda row: duration(row["attention_seconds"]),
        **_JUDGED,
        "than HF": lambda row: _optional(row["speedup_over_transformers"]),
    },
}


def tables(benchmark: str, cells: Sequence[dict[str, Any]]) -> Iterator[Table]:
    """One for each cell, with a line for each policy and key layout."""
    columns = _COLUMNS[benchmark]
    for cell in cells:
        if "failed" in cell:
            continue
        # 80 columns are enough for it.
        shown = Table(
            box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 0), header_style="bold"
        )
        shown.title, shown.title_justify = Text(_title(cell)), "left"
        shown.add_column("policy", min_width=13, max_width=22)
        shown.add_column("keys", no_wrap=True)
        for heading in columns:
            shown.add_column(heading, justify="right", no_wrap=True)
        for row in cell["rows"]:
            shown.add_row(Text(row["policy"]), row["layout"], *(column(row) for column in columns.values()))
        yield shown


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


def _optional(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"
