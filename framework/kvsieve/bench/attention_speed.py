"""`kvsieve bench attention`: one layer's decode step under every policy, against the best dense installed."""

from __future__ import annotations

import dataclasses
import gc
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import specs
from ..compare.environment import Load
from ..errors import UserError
from ..hf import placement
from . import baselines, memory
from .contenders import Contender, asked_for, contenders, every_policy, random_calibration
from .layer_step import ROOM, PolicyStep, Tokens
from .record import Cell, Known
from .shapes import Heads
from .timing import (
    Bandwidth,
    Measure,
    Stopwatch,
    captured,
    describe_failure,
    interleave,
    nothing,
    ratio,
    summary,
)

_HOPELESS = 4.0  # a dense candidate so many times slower than the best of a first look is not timed further


class Sizes(NamedTuple):
    """One cell of the measurement."""

    heads: Heads
    batch: int
    context: int

    def __str__(self) -> str:
        return f"B={self.batch} T={self.context} heads {self.heads}"


@dataclasses.dataclass(frozen=True)
class AttentionPlan:
    """The settings of `kvsieve bench attention` and `growth`."""

    device: torch.device
    dtype: torch.dtype
    cells: Sequence[Sizes]
    policies: Sequence[str]  # as on the command line
    layouts: Sequence[str]
    dense: Sequence[str]  # families of dense attention; none: all that run here
    seconds: float  # of timing, for each row
    graphs: bool  # capture each step as a CUDA graph
    implementation: str | None  # of the ops; None: the device's
    skip_too_large: bool  # cells that do not fit are left out and said so, else an error


def run(plan: AttentionPlan, say: Callable[[str], None], known: Known) -> Iterator[Cell]:
    """Measure every cell of the plan: its record, again after each row, as soon as that is there.

    What is `known` of a cell is not measured again.

    Raises:
        UserError: before anything is allocated, for settings that do not exist or do not fit.
    """
    families = baselines.families(plan.device, list(plan.dense))
    with tempfile.TemporaryDirectory() as folder:
        todo = []
        for cell in plan.cells:
            if cell.context < 2:
                raise UserError(
                    f"--context must be at least 2 tokens (one cached, one new), not {cell.context}"
                )
            field = _contenders(plan, cell, Path(folder), say)
            try:
                memory.check(_need(plan, cell, field, families), plan.device, f"the cell {cell}")
            except UserError as error:
                if not plan.skip_too_large:
                    raise
                say(f"left out: {error}")
            else:
                todo.append((cell, field))
        watch = Stopwatch(plan.device)
        for cell, field in todo:
            sizes = {"batch": cell.batch, "context": cell.context, "heads": cell.heads._asdict()}
            before = known(sizes) or {}
            if before.get("complete"):
                yield before
                continue
            say(f"{cell} ...")
            rows = before.get("rows", [])
            try:
                for found in _measure(plan, cell, field, families, watch, rows, say):
                    yield sizes | found
            except Exception as error:
                gc.collect()  # frees the tensors of an exhausted memory
                yield sizes | {"failed": describe_failure(error)["not_run"], "rows": rows}


def _contenders(
    plan: AttentionPlan, cell: Sizes, folder: Path, say: Callable[[str], None]
) -> list[Contender]:
    size = cell.heads.size
    given = plan.layouts, size, cell.context, plan.dtype.itemsize, plan.device
    return asked_for(
        plan.policies,
        lambda: every_policy(size, random_calibration(folder, cell.heads)),
        lambda policy: contenders([policy], *given),
        lambda why: say(f"left out at T={cell.context}: {why}"),
    )


def _need(plan: AttentionPlan, cell: Sizes, field: Sequence[Contender], families: Sequence[str]) -> int:
    plain = memory.plain_bytes(cell.batch, cell.context, cell.heads, plan.dtype)
    slots = cell.context + ROOM
    given = cell.batch, slots, cell.heads, plan.dtype, plan.device
    held = max(memory.cache_bytes(contender.policy, *given) for contender in field)
    # A policy with a budget holds the whole context for a moment, when it is filled.
    filling = 2 * plain
    ours = plain if baselines.OURS in families else 0
    others = plain * sum(name in ("flashinfer", "flash-attn") for name in families)
    return plain + held + filling + ours + others + 2**31


def _measure(
    plan: AttentionPlan,
    cell: Sizes,
    field: Sequence[Contender],
    families: Sequence[str],
    watch: Stopwatch,
    rows: list[dict[str, Any]],
    say: Callable[[str], None],
) -> Iterator[Cell]:
    """The record of a cell: of the dense attentions and the `rows` there are, then with one more each time.

    One policy after the other is timed, in the same rounds as the best dense attention: caches of all at once
    would not fit.
    """
    tokens = Tokens.random(cell.batch, cell.context, cell.heads, plan.dtype, plan.device)
    reference = PolicyStep(specs.make_policy("dense"), tokens, fixed=_graphs(plan))
    candidates, notes = _dense_candidates(plan, cell, families, tokens, reference, watch)
    bandwidth, load = Bandwidth(watch), Load()
    times = interleave(candidates | bandwidth.measures, plan.seconds)
    notes |= {name: summary(times[name]) | notes[name] for name in candidates}
    best = min(candidates, key=lambda name: notes[name]["median"])
    base = reference.traffic()
    dense_moved = base["read"] + base["written"]
    found: dict[str, Any] = {
        "dtype": str(plan.dtype).removeprefix("torch."),
        "bandwidth": bandwidth.found(times),
        "best_dense": {
            "name": best,
            "seconds": notes[best],
            "bytes": dense_moved,
            "bytes_per_second": dense_moved / notes[best]["median"],
        },
        "dense": notes,
        "load": load.since(),
        "rows": rows,
        "not_run": {},
        "complete": False,
    }
    yield found
    there = {(row["policy"], row["layout"]) for row in rows}
    for contender in field:
        if (contender.label, contender.layout) in there:
            continue
        try:
            row = _row(plan, contender, tokens, watch, candidates[best], dense_moved)
        except Exception as error:  # of one policy, which costs the others nothing
            gc.collect()
            found["not_run"][contender.name] = describe_failure(error)["not_run"]
            say(f"  {contender.name} was not measured: {found['not_run'][contender.name]}")
        else:
            say(f"  {contender.name}: {row['speedup']:.2f}x of {row['limit']:.2f}x")
            row |= {"best_dense": best}
            row["share_of_copy_bandwidth"] = row["bytes_per_second"] / found["bandwidth"]["copy"]
            found["rows"].append(row)
        yield found
    yield found | {"complete": True}


def _row(
    plan: AttentionPlan,
    contender: Contender,
    tokens: Tokens,
    watch: Stopwatch,
    dense: Measure,
    dense_moved: int,
) -> dict[str, Any]:
    capturable = contender.policy.capturable
    step = PolicyStep(contender.policy, tokens, fixed=_graphs(plan) and capturable)
    graph, load = _Capture(plan, step.run, step.prepare, capturable), Load()
    times = interleave({"policy": watch.measure(graph.run, step.prepare), "dense": dense}, plan.seconds)
    disturbed = load.since()
    traffic, seconds, against = step.traffic(), summary(times["policy"]), summary(times["dense"])
    moved = traffic["read"] + traffic["written"]
    speedup, limit = ratio(times["policy"], times["dense"]), dense_moved / moved
    return {
        "policy": contender.label,
        "parameters": contender.parameters,
        "layout": contender.layout,
        "seconds": seconds,
        "bytes": traffic,
        "bytes_held": step.layer.slots.memory(),
        "bytes_per_second": moved / seconds["median"],
        "speedup": speedup,
        "speedup_of_minima": against["min"] / seconds["min"],
        "limit": limit,
        "share_of_limit": speedup / limit,
        "load": disturbed,
        "graph": graph.note,
    }


def _graphs(plan: AttentionPlan) -> bool:
    return plan.graphs and plan.device.type == "cuda"


def _dense_candidates(
    plan: AttentionPlan,
    cell: Sizes,
    families: Sequence[str],
    tokens: Tokens,
    reference: PolicyStep,
    watch: Stopwatch,
) -> tuple[dict[str, Measure], dict[str, Any]]:
    """The dense attentions worth timing, and notes: how each ran, or why it did not."""
    reference.prepare()
    expected = reference.run()
    found: dict[str, Measure] = {}
    looks: dict[str, float] = {}
    notes: dict[str, Any] = {}

    def consider(name: str, run: Callable[[], object], prepare: Callable[[], None]) -> None:
        step = _Capture(plan, run, prepare)
        measure = watch.measure(step.run, prepare)
        looks[name] = measure()
        if looks[name] < 2 * _HOPELESS * min(looks.values()):
            looks[name] = min(looks[name], measure(), measure())
        slower = looks[name] / min(looks.values())
        if slower > _HOPELESS:
            notes[name] = {"not_run": f"at a first look {slower:.1f} times slower than the best"}
        else:
            found[name], notes[name] = measure, {"graph": step.note}

    if baselines.OURS in families:
        consider(baselines.OURS, reference.run, reference.prepare)
    repeated = cell.heads.group * memory.plain_bytes(cell.batch, cell.context, cell.heads, plan.dtype)
    fits = 4 * repeated < placement.free_memory(plan.device)  # scaled, and in float32, on the way
    for name, build in baselines.builders(list(families), tokens, fits):
        try:
            attend = build(tokens)
            if baselines.agrees(attend(), expected):
                consider(name, attend, nothing)
            else:
                notes[name] = {"not_run": "gives another result"}
        except Exception as error:  # a backend that does not take these sizes or types says so in its own way
            notes[name] = describe_failure(error)
    if not found:
        raise UserError(f"none of the dense attentions {', '.join(families)} runs here: {notes}")
    return found, notes


class _Capture:
    """A step as a CUDA graph where that is wanted and can be, and a note that says which."""

    def __init__(
        self,
        plan: AttentionPlan,
        run: Callable[[], object],
        prepare: Callable[[], None],
        capturable: bool = True,
    ) -> None:
        self.run, self.note = run, "no GPU" if plan.device.type != "cuda" else "--eager"
        if not _graphs(plan):
            return
        if not capturable:  # its steps are not alike: a graph would be one of them again and again
            self.note = "the policy declares that it cannot be captured"
            return
        try:
            self.run, self.note = captured(run, prepare, plan.device), "captured"
        except UserError as error:
            self.note = str(error)
