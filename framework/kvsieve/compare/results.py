"""Results of a comparison: a row for every cell, groups of rows that may be compared, and summary.csv."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

from ..errors import UserError
from . import files
from .statistics import ALIKE, BETTER, CHANCE, FEW, LEVEL, WORSE

DENSE = "dense"
MISSING = "\N{EN DASH}"
FAILED = "failed"
SYMBOLS = {
    BETTER: "\N{BLACK UP-POINTING TRIANGLE}",
    WORSE: "\N{BLACK DOWN-POINTING TRIANGLE}",
    ALIKE: "",
    FEW: "",
    CHANCE: "",
}
NOISY = 0.2  # spread of the batches' tokens/s, as a share of their median, above which a speed means little


# Model, task, its parameters, context, run.
GroupKey = tuple[str, str, str, int, str]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """One policy on one task: everything about a row but its numbers."""

    model: str
    task: str  # its title
    task_parameters: Mapping[str, Any]  # all but context and samples
    context: int  # tokens in a prompt
    policy: str
    policy_label: str  # `sparq 1/8`, `sparq r=8 k=64`: tells it from the other policies of its group
    parameters: str  # all of the policy's: `r=8 k=64 local=16 ...`
    not_default: str  # those that are not its defaults
    budget: str  # as asked for, `1/8`, `memory 1/4`, `tokens 512`; empty: it was given by its parameters
    metric: str
    higher_is_better: bool
    chance: float | None  # the score of a model that knows nothing
    run: str = ""  # of runs that are shown apart, this one


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row(Subject):
    """One line of summary.csv. None: not measured, or not to be said from these samples."""

    score: float | None = None  # mean over the samples
    score_low: float | None = None  # its 95 % interval
    score_high: float | None = None
    chance_p: float | None = None  # of a score at chance, for bounded scores; of others the interval says it
    samples: int | None = None
    difference: float | None = None  # score - dense score, over the samples that both have
    difference_low: float | None = None  # its 95 % interval
    difference_high: float | None = None
    pairs: int | None = None  # samples that both have
    lost: int | None = None  # of these, answers that dense had right and the policy wrong (0/1 scores only)
    won: int | None = None  # and the other way round
    p_value: float | None = None  # of no difference from dense
    # better, worse, indistinguishable, few (too few samples), chance (`Group.at_chance`); empty: not compared
    mark: str = ""
    bytes_per_step: float | None = None  # read by attention, per sequence
    bytes_ratio: float | None = None  # of what dense attention would have read
    bytes_written_per_step: float | None = None
    kv_bytes: float | None = None  # held per sequence
    slots_per_head: float | None = None  # held at the end, mean over KV heads, layers and samples
    tokens_per_second: float | None = None  # median over the full batches
    tokens_per_second_min: float | None = None
    tokens_per_second_max: float | None = None
    machine: str = ""  # of runs on several: each one's, `NVIDIA H200: 1,200; NVIDIA A100: 700`, none above
    ran_eagerly: str = ""  # on a GPU: why its steps were not one CUDA graph each
    error: str = ""  # of a cell that failed: the first line of why

    @property
    def missing(self) -> str:
        """The text in place of a score that there is not."""
        return FAILED if self.error else MISSING

    @property
    def noisy(self) -> bool:
        """Whether the batches' speeds differ too much for their median to mean anything."""
        middle, low, high = self.tokens_per_second, self.tokens_per_second_min, self.tokens_per_second_max
        return bool(middle and low is not None and high is not None and (high - low) / middle > NOISY)

    @property
    def speed(self) -> str:
        """Tokens per second; of several machines, each one's."""
        return self.machine or speed(self.tokens_per_second)

    @property
    def symbol(self) -> str:
        """A triangle that points up or down for what is better or worse than dense."""
        return SYMBOLS.get(self.mark, "")

    @property
    def changes(self) -> str:
        """`lost 3, won 0 of 16`; empty where answers are not right or wrong."""
        return "" if self.lost is None else f"lost {self.lost}, won {self.won} of {self.pairs}"

    @classmethod
    def parse(cls, line: Mapping[str, str | None]) -> Self:
        """From a line of summary.csv; columns that an older version did not write stay empty."""
        text = {name: (value or "").strip() for name, value in line.items() if isinstance(value, str | None)}
        text.setdefault("budget", text.get("compression", ""))  # its name in version 0.1
        how = text["budget"] or text.get("parameters", "")
        text.setdefault("policy_label", f"{text.get('policy', '')} {how}".strip())
        text.setdefault("not_default", text.get("parameters", ""))
        return cls(
            **{field.name: _parsed(field, text.get(field.name, "")) for field in dataclasses.fields(cls)}
        )


@dataclasses.dataclass(frozen=True)
class Group:
    """The rows that may be compared with each other: one task with all its parameters, at one context."""

    rows: list[Row]
    told: tuple[str, ...] = ()  # parameters that tell it from other groups of the same task
    model: str = ""  # its short name, where the run has several

    @property
    def task(self) -> str:
        """`needle`; `needle distractors=7 on tiny` where the run has other needles, and other models."""
        parameters = self.rows[0].task_parameters
        told = [f"{name}={_plain(parameters.get(name))}" for name in self.told]
        where = [f"on {self.model}" if self.model else "", f"in {run}" if (run := self.rows[0].run) else ""]
        return " ".join(filter(None, [self.rows[0].task, *told, *where]))

    @property
    def context(self) -> str:
        return f"{self.rows[0].context:,}"

    @property
    def column(self) -> str:
        """The heading of a column: `needle 1024`."""
        return f"{self.rows[0].task} {self.rows[0].context}{self.task.removeprefix(self.rows[0].task)}"

    @property
    def metric(self) -> str:
        return self.rows[0].metric or "score"

    @property
    def higher_is_better(self) -> bool:
        return self.rows[0].higher_is_better

    @cached_property
    def dense(self) -> Row | None:
        return next((row for row in self.rows if row.policy == DENSE and row.score is not None), None)

    @cached_property
    def at_chance(self) -> bool:
        """Whether dense attention itself is not shown to do better than a model that knows nothing."""
        if self.dense is None or self.dense.chance is None:
            return False
        dense, chance = self.dense, self.dense.chance
        edge = dense.score_low if self.higher_is_better else dense.score_high
        if edge is None or (dense.chance_p is not None and dense.chance_p < 1 - LEVEL):
            edge = dense.score
        assert edge is not None
        above = edge - chance
        return (above if self.higher_is_better else -above) <= 1e-9

    @property
    def contenders(self) -> list[Row]:
        """The rows of which one may be the best: sparse, judged, and not worse than dense."""
        return [row for row in self.rows if row.policy != DENSE and row.mark not in (WORSE, CHANCE)]

    def count(self, row: Row) -> str:
        """`n=16` where not all rows of the group have as many samples; else empty."""
        uneven = len({one.samples for one in self.rows if one.samples is not None}) > 1
        return f"n={row.samples}" if uneven and row.samples is not None else ""

    def score(self, row: Row) -> str:
        """The text of a row's score; `failed` where its cell failed before there was one."""
        return row.missing if row.score is None else self.text(row.score)

    def text(self, score: float | None) -> str:
        """A score with as many decimals as the scores of its group need."""
        return MISSING if score is None else f"{score:.{self._digits}f}"

    def interval(self, row: Row) -> str:
        """`0.810 to 1.000`; empty where there is none."""
        if row.score_low is None or row.score_high is None:
            return ""
        return f"{self.text(row.score_low)} to {self.text(row.score_high)}"

    def difference(self, row: Row) -> str:
        """`-0.81 (-0.95 to -0.53)`, to two digits of the half width; empty where not compared."""
        if row.difference is None:
            return ""
        low, high = row.difference_low, row.difference_high
        if low is None or high is None:
            return f"{row.difference:+.{self._digits}f}"
        half = (high - low) / 2
        digits = max(0, 1 - math.floor(math.log10(half))) if half > 0 else self._digits
        return f"{row.difference:+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"

    @property
    def _digits(self) -> int:
        return 1 if any((row.score or 0) >= 10 for row in self.rows) else 3


@dataclasses.dataclass(frozen=True)
class Results:
    """All rows of a run, in its order."""

    rows: list[Row]

    @cached_property
    def groups(self) -> list[Group]:
        """Tasks in the order of the run, the contexts of each from short to long."""
        found: dict[GroupKey, list[Row]] = {}
        for row in self.rows:
            found.setdefault(group_key(row), []).append(row)
        order = list(dict.fromkeys(key[:3] for key in found))
        keys = sorted(found, key=lambda key: (order.index(key[:3]), key[3]))
        told, short = self._told(), short_models(row.model for row in self.rows)
        return [Group(found[key], told[found[key][0].task], short[key[0]]) for key in keys]

    @cached_property
    def numbers(self) -> dict[int, int]:
        """The place of a row in `rows`, by its identity: rows may be equal."""
        return {id(row): number for number, row in enumerate(self.rows)}

    @cached_property
    def policies(self) -> list[str]:
        """Dense first, then as they first appear."""
        names = dict.fromkeys(row.policy for row in self.rows)
        return sorted(names, key=lambda name: name != DENSE)

    @cached_property
    def pivot(self) -> dict[str, dict[int, Row]]:
        """A line for every policy label, with its row in each of `groups` by index; dense first."""
        lines: dict[str, dict[int, Row]] = {}
        for index, group in enumerate(self.groups):
            for row in group.rows:
                lines.setdefault(row.policy_label, {})[index] = row
        return dict(sorted(lines.items(), key=lambda line: next(iter(line[1].values())).policy != DENSE))

    def _told(self) -> dict[str, tuple[str, ...]]:
        """By task: the parameters that not all of its rows share."""
        by_task: dict[str, list[Mapping[str, Any]]] = {}
        for row in self.rows:
            by_task.setdefault(row.task, []).append(row.task_parameters)
        return {
            task: tuple(
                name
                for name in dict.fromkeys(name for one in given for name in one)
                if len({_plain(one.get(name)) for one in given}) > 1
            )
            for task, given in by_task.items()
        }


def short_models(models: Iterable[str]) -> dict[str, str]:
    """By model: the last part of its name, or all of it where that is another's, too; empty for one alone."""
    names = list(dict.fromkeys(models))
    last = [name.rstrip("/").rpartition("/")[2] or name for name in names]
    if len(names) == 1:
        return {names[0]: ""}
    return {name: end if last.count(end) == 1 else name for name, end in zip(names, last, strict=True)}


def group_key(subject: Subject) -> GroupKey:
    """Rows of equal keys may be compared."""
    parameters = json.dumps(dict(subject.task_parameters), sort_keys=True)
    return subject.model, subject.task, parameters, subject.context, subject.run


def write_csv(path: Path, rows: Iterable[Row]) -> None:
    """Write the rows as summary.csv, in one move.

    Raises:
        UserError: the file cannot be written.
    """
    files.write(path, "".join(csv_lines(rows)))


def csv_lines(rows: Iterable[Row]) -> list[str]:
    """The lines of summary.csv: the names of the columns, then the rows; `error` where a cell failed."""
    rows = list(rows)
    failed = any(row.error for row in rows)
    names = [field.name for field in dataclasses.fields(Row) if failed or field.name != "error"]
    lines = []
    for values in [names, *([_written(getattr(row, name)) for name in names] for row in rows)]:
        out = io.StringIO(newline="")
        csv.writer(out).writerow(values)
        lines.append(out.getvalue())
    return lines


def read_csv(path: Path) -> list[Row]:
    """The rows of a summary.csv, an older version's too.

    Raises:
        UserError: the file cannot be read, or a value is none of its column.
    """
    text = files.read(path).decode("utf-8", "replace")
    rows = []
    try:
        for line in csv.DictReader(io.StringIO(text, newline="")):
            rows.append(Row.parse(line))
    except (ValueError, csv.Error) as error:
        raise UserError(f"{path}: line {len(rows) + 2}: {error}") from None
    return rows


def chance_note(results: Results) -> str:
    """Name the tasks by which no policy is judged; empty where there is none."""
    named = [group.column for group in results.groups if group.at_chance]
    if not named:
        return ""
    return f"Dense attention itself is at chance level on {', '.join(named)}: no policy is judged there."


def eager_notes(rows: Iterable[Row]) -> list[str]:
    """Which policies ran from Python on a GPU, and why: their speed is not that of one CUDA graph a step."""
    labels: dict[str, dict[str, None]] = {}
    for row in rows:
        if row.ran_eagerly:
            labels.setdefault(row.ran_eagerly, {})[row.policy_label] = None
    return [f"Not as one CUDA graph a step: {', '.join(who)} ({why})." for why, who in labels.items()]


def failure_notes(results: Results) -> list[str]:
    """A line for each policy and reason: where it failed, and the first line of why."""
    where: dict[tuple[str, str], list[str]] = {}
    for group in results.groups:
        for row in group.rows:
            if row.error:
                where.setdefault((row.policy_label, row.error), []).append(group.column)
    return [f"failed: {label} on {', '.join(columns)}: {error}" for (label, error), columns in where.items()]


def noise_note(rows: Sequence[Row]) -> str:
    """Explain which speeds are noisy; empty where none is."""
    if not any(row.noisy for row in rows):
        return ""
    return (
        f"Noisy: between the batches of one row, tokens/s differ by more than {NOISY:.0%} of their median; "
        "such speeds compare nothing. `kvsieve bench` measures speed."
    )


def load_notes(environment: Mapping[str, Any]) -> list[str]:
    """Why speeds are not to be quoted, from environment.json, of joined runs for each; empty where they are,
    and where older runs did not note it.
    """
    runs = environment.get("runs")
    notes = []
    for name, found in [("", environment), *(runs.items() if isinstance(runs, dict) else ())]:
        load = found.get("load") if isinstance(found, Mapping) else None
        during = load.get("run") if isinstance(load, dict) else None
        if why := during.get("not_to_be_quoted") if isinstance(during, dict) else None:
            notes.append(f"tokens/s{f' of {name}' if name else ''} are not to be quoted: {why}.")
    return notes


def speed(value: float | None) -> str:
    return MISSING if value is None else f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def byte_text(count: float | None) -> str:
    """`2.1 MB`."""
    if count is None:
        return MISSING
    for unit in ("B", "kB", "MB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} GB" if count < 999.5 else f"{count:,.0f} GB"


def bytes_range(rows: Iterable[Row]) -> str:
    """Bytes read over those of dense, `0.50`; `0.07 to 0.30` where tasks differ by more than rounding."""
    ratios = [row.bytes_ratio for row in rows if row.bytes_ratio is not None]
    if not ratios:
        return MISSING
    least, most = min(ratios), max(ratios)
    return f"{ratios[0]:.2f}" if most - least < 0.015 else f"{least:.2f} to {most:.2f}"


def _plain(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _written(value: Any) -> Any:
    """A value in a csv: numbers without the tail of digits that nothing stands behind."""
    if isinstance(value, Mapping):
        return json.dumps(dict(value), sort_keys=True)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:.6g}" if abs(value) < 1e5 else round(value)
    return value


def _parsed(field: dataclasses.Field[Any], text: str) -> Any:
    if field.name == "task_parameters":
        found = json.loads(text or "{}")
        if not isinstance(found, dict):
            raise ValueError(f"task_parameters: {text!r} is no JSON object")
        return found
    if field.name == "higher_is_better":
        return text.lower() not in ("false", "0", "no")
    if field.type == "str":
        return text
    try:
        value = float(text) if text else math.nan
    except ValueError:
        raise ValueError(f"{field.name}: {text!r} is not a number") from None
    if not math.isfinite(value):
        if field.name == "context":
            raise ValueError(f"context: {text!r} is not a number of tokens")
        return None
    return int(value) if "int" in str(field.type) else value
