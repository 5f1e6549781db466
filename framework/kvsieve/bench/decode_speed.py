"""`kvsieve bench decode`: tokens a second of a whole model by policy, and where the rest of the time goes."""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

from .. import specs
from ..compare.environment import Load
from ..errors import UserError
from ..hf import placement
from ..hf.models import config_of
from ..policy import Policy
from . import memory
from .contenders import (
    Contender,
    asked_for,
    contenders,
    default_policies,
    every_policy,
    random_calibration,
)
from .model_step import Models, OurSteps, StepsWithoutAttention, StockGenerate, steps_after
from .record import Cell, Known
from .shapes import check_positions, heads_of, model_config
from .timing import Measure, attempt, describe_failure, interleave, ratio, summary

REST, TRANSFORMERS = "without attention", "transformers"


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """The settings of `kvsieve bench decode`. Sizes not given come from the device."""

    device: torch.device
    dtype: torch.dtype
    model: str | None  # the user's own: a folder or an id; None: of a shape, with random weights
    shape: str
    layers: int | None  # of the shape; None: all
    batches: Sequence[int]
    contexts: Sequence[int]
    policies: Sequence[str]  # as on the command line; none: the defaults
    layouts: Sequence[str]
    read: bool  # the prompts are read and timed, else the cache is filled with random tokens
    steps: int  # decode steps in one timing
    seconds: float  # of timing, for each cell
    graphs: bool  # one CUDA graph a step
    implementation: str | None  # of the ops; None: the device's
    skip_too_large: bool  # cells that do not fit are left out and said so, else an error

    @property
    def name(self) -> str:
        return self.model or self.shape


class Sizes(NamedTuple):
    """One cell of the measurement."""

    batch: int
    context: int
    field: list[Contender]
    together: bool  # whether all caches fit at once, so that all are timed in the same rounds

    def __str__(self) -> str:
        return f"B={self.batch} T={self.context}"


def run(plan: DecodePlan, say: Callable[[str], None], known: Known) -> Iterator[Cell]:
    """Measure every cell of the plan; one record a cell, as soon as it is there.

    A complete cell that is `known` is not measured again.

    Raises:
        UserError: before anything is allocated, for a model or settings that do not exist or do not fit.
    """
    if plan.model is None:
        config = model_config(plan.shape, plan.layers, max(plan.contexts) + steps_after(plan.steps))
    else:
        config = config_of(plan.model)
    with tempfile.TemporaryDirectory() as folder:
        cells = []
        for batch in plan.batches:
            for context in plan.contexts:
                try:
                    cells.append(_planned(plan, config, batch, context, Path(folder), say))
                except UserError as error:
                    if not plan.skip_too_large:
                        raise
                    say(f"left out: {error}")
        models: Models | None = None
        for cell in cells:
            sizes = {"batch": cell.batch, "context": cell.context}
            before = known(sizes)
            if before and before.get("complete"):
                yield before
                continue
            if models is None:
                say(
                    f"loading {plan.name} ..."
                    if plan.model
                    else f"making {plan.shape} with random weights ..."
                )
                models = _models(plan, config)
            say(f"{cell} ...")
            yield sizes | attempt(functools.partial(_measure, plan, cell, models, say))


def _models(plan: DecodePlan, config: PreTrainedConfig) -> Models:
    if plan.model is None:
        return Models.random(config, plan.dtype, plan.device)
    return Models.loaded(plan.model, plan.dtype, plan.device)


def _planned(
    plan: DecodePlan,
    config: PreTrainedConfig,
    batch: int,
    context: int,
    folder: Path,
    say: Callable[[str], None],
) -> Sizes:
    if context < 2:
        raise UserError(f"--context must be at least 2 tokens (one cached, one new), not {context}")
    check_positions(config, plan.name, context + steps_after(plan.steps))
    text = config.get_text_config(decoder=True)
    heads, layers = heads_of(config), text.num_hidden_layers
    caches = DynamicCache(config=text).layers
    ours = {
        i: layer for i, layer in enumerate(caches) if type(layer) in (DynamicLayer, DynamicSlidingWindowLayer)
    }
    if not plan.read and len(ours) < layers:
        raise UserError(f"{plan.name} has layers with a cache of their own, which only --prefill fills")
    dense = Contender("dense", specs.make_policy("dense"), "single")
    given = plan.layouts, heads.size, context, plan.dtype.itemsize, plan.device, plan.read
    field = asked_for(
        plan.policies or default_policies(heads.size),
        lambda: every_policy(heads.size, random_calibration(folder, heads, layers), layers),
        lambda policy: contenders([policy], *given),
        lambda why: say(f"left out at T={context}: {why}"),
    )
    field = [dense, *(contender for contender in field if contender != dense)]
    slots = context + steps_after(plan.steps)
    room = {i: min(slots, getattr(layer, "sliding_window", slots)) for i, layer in ours.items()}
    held = [
        sum(
            memory.cache_bytes(
                c.policy.for_layer(i, layers) if room[i] == slots or c.policy.in_windows else dense.policy,
                batch,
                room[i],
                heads,
                plan.dtype,
                plan.device,
            )
            for i in ours
        )
        for c in field
    ]
    plain = memory.plain_bytes(batch, slots, heads, plan.dtype)
    fixed = _weights(config) * plan.dtype.itemsize + 3 * plain + 2**31
    if plan.read:  # the activations of a layer
        inner = getattr(text, "intermediate_size", None) or 4 * text.hidden_size
        fixed += batch * context * (3 * inner + 4 * text.hidden_size) * plan.dtype.itemsize
    stock = layers * plain
    memory.check(fixed + max([stock, *held]), plan.device, f"{plan.name} at B={batch} T={context}")
    together = fixed + stock + sum(held) <= placement.free_memory(plan.device)
    return Sizes(batch, context, field, together)


def _weights(config: Any) -> int:
    """Count the model's parameters without allocating them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())


def _measure(plan: DecodePlan, cell: Sizes, models: Models, say: Callable[[str], None]) -> Cell:
    found, load = _Found(), Load()
    if cell.together:
        _time(plan, cell, models, cell.field, found, stock=True)
    else:
        for contender in cell.field:
            _time(plan, cell, models, [contender], found, stock=False)
        _time(plan, cell, models, [], found, stock=True)
    for name, why in found.not_run.items():
        say(f"  {name} was not measured: {why}")
    if cell.field[0].name in found.not_run:
        raise RuntimeError(f"dense: {found.not_run[cell.field[0].name]}")
    return _record(cell, models, found) | {"load": load.since(), "complete": True}


def _our_steps(plan: DecodePlan, cell: Sizes, model: PreTrainedModel, policy: Policy) -> OurSteps:
    """From Python, and that is noted, where a step cannot be captured."""
    given = model, policy, cell.batch, cell.context, plan.steps
    try:
        return OurSteps(*given, eager=not plan.graphs, read=plan.read)
    except UserError as error:
        if not plan.graphs or plan.device.type != "cuda":
            raise
        found = OurSteps(*given, eager=True, read=plan.read)
        found.note = str(error)
        return found


class _Row(NamedTuple):
    """A contender's measurements beside its times."""

    moved: int
    held: int
    prefill: float | None
    peak: int | None
    note: str
    busy: float | None


@dataclasses.dataclass
class _Found:
    """Measurements, by the names of the contenders."""

    times: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    rows: dict[str, _Row] = dataclasses.field(default_factory=dict)
    not_run: dict[str, str] = dataclasses.field(default_factory=dict)
    stock: dict[str, Any] = dataclasses.field(default_factory=dict)


def _time(
    plan: DecodePlan,
    cell: Sizes,
    models: Models,
    field: Sequence[Contender],
    found: _Found,
    stock: bool,
) -> None:
    """Time these contenders in the same rounds, with a model without attention beside them.

    One that fails costs only its own.
    """
    measures: dict[str, Measure] = {}
    for contender in field:
        name = contender.name
        try:
            steps = _our_steps(plan, cell, models.ours, contender.policy)
            measure = steps.measure()
            measure()
            found.rows[name] = _Row(
                *steps.traffic(), steps.prefill_seconds, steps.peak_bytes, steps.note, steps.busy_seconds()
            )
        except Exception as error:
            gc.collect()
            found.not_run[name] = describe_failure(error)["not_run"]
        else:
            measures[name] = measure
    measures[REST] = StepsWithoutAttention(models.ours, cell.batch, plan.steps, not plan.graphs).measure()
    if stock:
        try:
            generate = StockGenerate(models, cell.batch, cell.context, plan.steps).measure()
            generate()
            measures[TRANSFORMERS] = generate
        except Exception as error:  # its compiler fails in many ways; our numbers stand without it
            found.stock = describe_failure(error)
    times = interleave(measures, plan.seconds)
    found.times |= {name: [*found.times.get(name, []), *values] for name, values in times.items()}
    del measures
    gc.collect()


def _record(cell: Sizes, models: Models, found: _Found) -> dict[str, Any]:
    weights, dense = models.weight_bytes(), cell.field[0].name
    dense_moved = found.rows[dense].moved
    rest = statistics.median(found.times[REST])
    stock = found.times.get(TRANSFORMERS)
    rows = []
    for contender in cell.field:
        if contender.name in found.not_run:
            continue
        times, known = found.times[contender.name], found.rows[contender.name]
        step, busy = statistics.median(times), known.busy
        speedup = ratio(times, found.times[dense], paired=cell.together)
        limit = (weights + dense_moved) / (weights + known.moved)
        rows.append(
            {
                "policy": contender.label,
                "parameters": contender.parameters,
                "layout": contender.layout,
                "seconds": summary(times),
                "tokens_per_second": cell.batch / step,
                "attention_seconds": max(0.0, step - rest),
                "rest_seconds": min(step, rest),
                "overhead_share": None if busy is None else 1 - busy / step,
                "prefill_seconds": known.prefill,
                "bytes_moved": known.moved,
                "bytes_held": known.held,
                "bytes_peak": known.peak,
                "bytes_per_second": (weights + known.moved) / step,
                "speedup": speedup,
                "speedup_over_transformers": ratio(times, stock, paired=cell.together) if stock else None,
                "limit": limit,
                "share_of_limit": speedup / limit,
                "graph": known.note,
            }
        )
    return {
        "weight_bytes": weights,
        "interleaved": cell.together,
        "without_attention": summary(found.times[REST]),
        "transformers": summary(stock) if stock else found.stock,
        "rows": rows,
        "not_run": found.not_run,
    }
