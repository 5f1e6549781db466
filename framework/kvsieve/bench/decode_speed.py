"""`kvsieve bench decode`: tokens a second of a whole model by policy, and where the rest of the time goes."""

from __future__ import annotations

import dataclasses
import functools
import gc
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from .. import specs
from ..compare.environment import Load
from ..errors import UserError
from ..policy import Policy
from . import memory
from .contenders import Contender, contenders, default_policies
from .model_step import Models, OurSteps, StepsWithoutAttention, StockGenerate
from .record import Cell, Known
from .shapes import heads_of, model_config
from .timing import Measure, attempt, describe_failure, interleave, ratio, summary

REST, TRANSFORMERS = "without attention", "transformers"


@dataclasses.dataclass(frozen=True)
class DecodePlan:
    """The settings of `kvsieve bench decode`. Sizes not given come from the device."""

    device: torch.device
    dtype: torch.dtype
    shape: str
    layers: int | None  # of the shape; None: all
    batches: Sequence[int]
    contexts: Sequence[int]
    policies: Sequence[str]  # as on the command line; none: the defaults
    layouts: Sequence[str]
    steps: int  # decode steps in one timing
    seconds: float  # of timing, for each cell
    graphs: bool  # one CUDA graph a step
    implementation: str | None  # of the ops; None: the device's
    skip_too_large: bool  # cells that do not fit are left out and said so, else an error


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
        UserError: before anything is allocated, for settings that do not exist or do not fit.
    """
    config = model_config(plan.shape, plan.layers, max(plan.contexts) + plan.steps + 1)
    cells = []
    for batch in plan.batches:
        for context in plan.contexts:
            try:
                cells.append(_planned(plan, config, batch, context))
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
            say(f"making {plan.shape} with random weights ...")
            models = Models(config, plan.dtype, plan.device)
        say(f"{cell} ...")
        yield sizes | attempt(functools.partial(_measure, plan, cell, models))


def _planned(plan: DecodePlan, config: Any, batch: int, context: int) -> Sizes:
    if context < 2:
        raise UserError(f"--context must be at least 2 tokens (one cached, one new), not {context}")
    heads, layers = heads_of(config), config.num_hidden_layers
    dense = Contender("dense", specs.make_policy("dense"), "single")
    chosen = plan.policies or default_policies(heads.size)
    field = contenders(chosen, plan.layouts, heads.size, context, plan.dtype.itemsize, plan.device)
    field = [dense, *(contender for contender in field if contender != dense)]
    slots = context + plan.steps + 5
    given = batch, slots, heads, plan.dtype, plan.device
    held = [
        sum(memory.cache_bytes(c.policy.for_layer(layer, layers), *given) for layer in range(layers))
        for c in field
    ]
    plain = memory.plain_bytes(batch, slots, heads, plan.dtype)
    fixed = _weights(config) * plan.dtype.itemsize + 3 * plain + 2**31
    stock = layers * plain
    memory.check(fixed + max([stock, *held]), plan.device, f"{plan.shape} at B={batch} T={context}")
    together = fixed + stock + sum(held) <= memory.free_memory(plan.device)
    return Sizes(batch, context, field, together)


def _weights(config: Any) -> int:
    """Count the model's parameters without allocating them."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())


def _measure(plan: DecodePlan, cell: Sizes, models: Models) -> dict[str, Any]:
    makers: dict[str, Callable[[], OurSteps]] = {
        c.name: functools.partial(
            _our_steps, models.ours, c.policy, cell.batch, cell.context, plan.steps, not plan.graphs
        )
        for c in cell.field
    }
    found, load = _Found(), Load()
    if cell.together:
        _time(plan, cell, models, makers, found, stock=True)
    else:
        for name, make in makers.items():
            _time(plan, cell, models, {name: make}, found, stock=False)
        _time(plan, cell, models, {}, found, stock=True)
    return _record(cell, models, found) | {"load": load.since(), "complete": True}


def _our_steps(
    model: PreTrainedModel, policy: Policy, batch: int, context: int, steps: int, eager: bool
) -> OurSteps:
    """From Python, and that is noted, where a step cannot be captured."""
    try:
        return OurSteps(model, policy, batch, context, steps, eager)
    except UserError as error:
        if eager:
            raise
        found = OurSteps(model, policy, batch, context, steps, eager=True)
        found.note = str(error)
        return found


@dataclasses.dataclass
class _Found:
    """Measurements of each contender, by name."""

    times: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    moved: dict[str, int] = dataclasses.field(default_factory=dict)
    held: dict[str, int] = dataclasses.field(default_factory=dict)
    notes: dict[str, str] = dataclasses.field(default_factory=dict)
    busy: dict[str, float | None] = dataclasses.field(default_factory=dict)
    stock: dict[str, Any] = dataclasses.field(default_factory=dict)


def _time(
    plan: DecodePlan,
    cell: Sizes,
    models: Models,
    makers: dict[str, Callable[[], OurSteps]],
    found: _Found,
    stock: bool,
) -> None:
    """Time these contenders in the same rounds, with a model without attention beside them."""
    made = {name: make() for name, make in makers.items()}
    measures: dict[str, Measure] = {name: steps.measure() for name, steps in made.items()}
    rest = StepsWithoutAttention(models.ours, cell.batch, plan.steps, not plan.graphs)
    measures[REST] = rest.measure()
    if stock:
        try:
            generate = StockGenerate(models, cell.batch, cell.context, plan.steps).measure()
            generate()
            measures[TRANSFORMERS] = generate
        except Exception as error:  # its compiler fails in many ways; our numbers stand without it
            found.stock = describe_failure(error)
    times = interleave(measures, plan.seconds)
    found.times |= {name: [*found.times.get(name, []), *values] for name, values in times.items()}
    for name, steps in made.items():
        found.moved[name], found.held[name] = steps.traffic()
        found.notes[name] = steps.note
        found.busy[name] = steps.busy_seconds()
    del made, measures
    gc.collect()


def _record(cell: Sizes, models: Models, found: _Found) -> dict[str, Any]:
    weights, dense = models.weight_bytes(), cell.field[0].name
    rest = statistics.median(found.times[REST])
    stock = found.times.get(TRANSFORMERS)
    rows = []
    for contender in cell.field:
        times, moved = found.times[contender.name], found.moved[contender.name]
        step, busy = statistics.median(times), found.busy[contender.name]
        speedup = ratio(times, found.times[dense], paired=cell.together)
        limit = (weights + found.moved[dense]) / (weights + moved)
        rows.append(
            {
                "policy": contender.label,
                "parameters": contender.policy.spec(),
                "layout": contender.layout,
                "seconds": summary(times),
                "tokens_per_second": cell.batch / step,
                "attention_seconds": max(0.0, step - rest),
                "rest_seconds": min(step, rest),
                "overhead_share": None if busy is None else 1 - busy / step,
                "bytes_moved": moved,
                "bytes_held": found.held[contender.name],
                "bytes_per_second": (weights + moved) / step,
                "speedup": speedup,
                "speedup_over_transformers": ratio(times, stock, paired=cell.together) if stock else None,
                "limit": limit,
                "share_of_limit": speedup / limit,
                "graph": found.notes[contender.name],
            }
        )
    return {
        "weight_bytes": weights,
        "interleaved": cell.together,
        "without_attention": summary(found.times[REST]),
        "transformers": summary(stock) if stock else found.stock,
        "rows": rows,
    }
