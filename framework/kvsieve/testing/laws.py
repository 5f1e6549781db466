"""The laws that every policy obeys.

Each takes a policy that leaves something out of 40 tokens (tight), and one that does not (loose).
"""

from __future__ import annotations

import dataclasses
import functools
import traceback
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from .. import contract, registration, specs, transfer
from ..attention import decode_step
from ..cache.kv import Scoring
from ..cache.layer import LayerCache
from ..cache.rotary import Rotary
from ..cache.slots import Slots
from ..entries import MEMORY, TOKENS
from ..errors import UserError
from ..policy import Policy, Positions
from .rollout import Inputs, one_step, read_prompts
from .rollout import rollout as plain_rollout
from .spy import Spy, parts
from .waits import FindsWaits

Law = Callable[[Policy, Policy], None]

_THETA = 10_000.0  # random keys may as well be rotated ones
_ROTARY = Rotary.of_theta(_THETA, 16)


def rollout(policy: Policy, *inputs: Any, **how: Any) -> torch.Tensor:
    """Run `Inputs`, with rotary embeddings, token ids and surprise for policies that want them."""
    how |= {"rope_theta": _THETA, "ids": _ids(inputs[2]), "surprise": _surprise(inputs[2])}
    return plain_rollout(policy, *inputs, **how)


def _ids(keys: torch.Tensor) -> torch.Tensor:
    """Ids `[B, T]`, 0 to 4, for tokens with random keys `[B, K, T, D]`; a token's is in its key."""
    return (keys[:, 0, :, 0].abs() * 1000).long() % 5


def _surprise(keys: torch.Tensor) -> torch.Tensor:
    """Surprise `[B, T]` of tokens with random keys `[B, K, T, D]`."""
    return keys[:, 0, :, 1].abs()


def _layer(policy: Policy) -> LayerCache:
    """An empty layer for `Inputs.random()`, without rollout."""
    layer = LayerCache(policy)
    layer.scoring, layer.group = Scoring(0.25), 2
    layer.turn_by(_ROTARY)
    return layer


def _read(layer: LayerCache, inputs: Inputs, pad_left: bool = False) -> None:
    prompt = inputs.prefill_queries.shape[2]
    prompts = inputs.prefill_queries, inputs.keys[:, :, :prompt], inputs.values[:, :, :prompt]
    read_prompts(
        layer,
        *prompts,
        inputs.lengths.tolist(),
        ids=_ids(prompts[1]),
        surprise=_surprise(prompts[1]),
        rotary=_ROTARY,
        pad_left=pad_left,
    )


def _law(check: Law) -> Law:
    """Make a law of a check: what a policy raises in it is told with the law and the hook that raised it."""

    @functools.wraps(check)
    def law(tight: Policy, loose: Policy) -> None:
        try:
            check(tight, loose)
        except (AssertionError, UserError):
            raise
        except Exception as error:
            where = f", in {hook}" if (hook := _raised_in(error)) else ""
            raise AssertionError(
                f"{check.__name__}: {tight.name} raised {type(error).__name__}{where}: {error}"
            ) from error

    return law


def _raised_in(error: Exception) -> str:
    """The innermost method of a policy of somebody's that an error came through; empty: none."""
    found = ""
    for frame, line in traceback.walk_tb(error.__traceback__):
        policy, method = frame.f_locals.get("self"), frame.f_code.co_name
        if isinstance(policy, Policy) and not isinstance(policy, Spy) and hasattr(Policy, method):
            file = Path(frame.f_code.co_filename).name
            found = f"{type(policy).__name__}.{method} (line {line} of {file})"
    return found


@_law
def it_can_be_registered(tight: Policy, loose: Policy) -> None:
    """The class is a frozen dataclass of plain data with a name, whose methods fit together."""
    for policy in (tight, loose):
        try:
            registration.check("policies", type(policy))
        except (TypeError, ValueError) as error:
            raise AssertionError(f"{type(policy).__name__} cannot be registered: {error}") from error


@_law
def tight_leaves_something_out(tight: Policy, loose: Policy) -> None:
    """Of 40 tokens `tight` reads fewer than all: else no other law has anything to test."""
    policy, inputs = tight.for_layer(0, 1), Inputs.random()
    if type(policy) is Policy or policy.plan([inputs.prefill_queries.shape[2]]) is not None:
        return  # dense attention itself; or one that may drop between turns, and here is one
    spy = Spy(policy)
    rollout(spy, *inputs)
    steps, heads = inputs.step_queries.shape[2], inputs.keys.shape[1]
    seen = heads * sum(int(inputs.lengths.sum()) + len(inputs.lengths) * (step + 1) for step in range(steps))
    assert _tokens_read(spy) < seen, (
        f"{tight} reads all of 40 tokens and those that follow: `tight` must leave something out, so give it "
        "a smaller budget"
    )


@_law
def answers_fit_the_contract(tight: Policy, loose: Policy) -> None:
    """`select`, `priority` and `cut` answer with the right shapes and types, with live slots, each once, and
    with numbers.
    """
    with contract.strict():
        for policy in (tight, loose):
            rollout(policy, *Inputs.random())


@_law
def a_loose_budget_is_dense(tight: Policy, loose: Policy) -> None:
    """A policy that leaves nothing out computes dense attention."""
    inputs = Inputs.random()
    _same(rollout(loose, *inputs), rollout(Policy(), *inputs), f"{loose} differs from dense attention")


@_law
def the_budget_is_respected(tight: Policy, loose: Policy) -> None:
    """Storage never exceeds the budget after the prompt; chosen slots are live, distinct and as counted."""
    spy = Spy(tight.for_layer(0, 1))
    layer, inputs = LayerCache(spy), Inputs.random()
    rollout(spy, *inputs, layer=layer)
    if spy.keeps is not None:
        steps = inputs.step_queries.shape[2]
        most = spy.keeps if spy.overwrites else spy.keeps + steps
        assert int(layer.kv.lengths.max()) <= most, f"{tight} holds {int(layer.kv.lengths.max())} tokens"
        if spy.overwrites:
            assert layer.slots.capacity <= most, f"{tight} has storage for {layer.slots.capacity} tokens"
    for selection, lengths in zip(spy.notes.selections, spy.notes.lengths, strict=True):
        if selection is None:
            continue
        for b, k in _heads(lengths):
            chosen = []
            for part in parts(selection):
                count = int(part.counts[b, k])
                assert count <= part.slots.shape[2], f"{tight} counts {count} of {part.slots.shape[2]} slots"
                chosen += part.slots[b, k, :count].tolist()
            assert len(set(chosen)) == len(chosen), f"{tight} chose a slot twice: {chosen}"
            assert all(0 <= slot < lengths[b, k] for slot in chosen), (
                f"{tight} chose a slot that holds no token"
            )


@_law
def the_cut_is_what_is_held(tight: Policy, loose: Policy) -> None:
    """After the prompt the cache holds the tokens that `cut` chose, or as many as the policy keeps, with
    their own keys, and no storage for others.
    """
    inputs = Inputs.random()
    prompt = inputs.prefill_queries.shape[2]
    for policy in (tight, loose):
        spy = Spy(policy.for_layer(0, 1))
        layer = _layer(spy)
        _read(layer, inputs)
        kv, (chosen,) = layer.kv, spy.notes.cuts
        most = prompt if policy.keeps is None else policy.keeps
        makes_room = chosen is None and policy.plan([prompt]) is not None
        for b, k in _heads(kv.lengths):
            held = kv.positions[b, k, : int(kv.lengths[b, k])].tolist()
            if makes_room:
                assert len(held) <= int(inputs.lengths[b])
            elif chosen is None:
                assert len(held) == min(int(inputs.lengths[b]), most), f"{policy} holds {len(held)} tokens"
            else:
                assert held == chosen[b][k], f"{policy} holds {held}, but its cut chose {chosen[b][k]}"
            keys, own = kv.keys[b, k, : len(held)], inputs.keys[b, k, held]
            if policy.positions is Positions.CACHE:
                # Turned forth to their places; turned back, they are what they were.
                back = _ROTARY.turned(keys, torch.tensor(held) - torch.arange(len(held)))
                _same(back, own, f"{policy}: keys are not those of their tokens at their places")
            elif policy.positions is Positions.OWN:
                # Turned as it pleases the policy, which leaves their lengths.
                _same(keys.norm(dim=-1), own.norm(dim=-1), f"{policy}: tokens have other tokens' keys")
            else:
                assert torch.equal(keys, own), f"{policy}: tokens have other tokens' keys"
        largest = int(kv.lengths.max())
        assert layer.slots.capacity == largest, f"{policy} has storage for {layer.slots.capacity} tokens"


@_law
def memory_is_for_what_is_held(tight: Policy, loose: Policy) -> None:
    """After the prompt a layer has storage for the tokens that stay, and for what is declared beside them.

    Head by head; as of the longest head where columns, a key layout or a search go with the slots.
    """
    inputs = Inputs.random()
    prompt = inputs.prefill_queries.shape[2]
    keys, values = inputs.keys[:, :, :prompt], inputs.values[:, :, :prompt]
    for given in (tight, loose):
        policy = given.for_layer(0, 1)
        layer = _layer(policy)
        _read(layer, inputs)
        lengths = layer.kv.lengths
        storage = Slots(policy.key_layout, policy.columns, policy.summaries)
        storage.allocate(keys, values, int(lengths.max()), layer.group)
        most = storage.memory()
        if layer.packs and (len(set(layer.limits)) > 1 or bool((lengths != lengths[:, :1]).any())):
            rooms = sum(
                limit or length
                for row in lengths.tolist()
                for length, limit in zip(row, layer.limits, strict=True)
            )
            free = lengths.numel() * int(lengths.max()) - rooms
            most -= free * 2 * values.shape[3] * values.element_size()
        held = layer.slots.memory()
        assert held <= most, f"{given} holds {held} bytes for tokens (and what goes with them) of {most}"


@_law
def questions_change_nothing(tight: Policy, loose: Policy) -> None:
    """`select`, `priority` and `cut` do not modify the cache."""
    spy = Spy(tight.for_layer(0, 1))
    rollout(spy, *Inputs.random())
    assert not spy.notes.changes, f"{tight}: {spy.notes.changes[0]}"


@_law
def same_run_same_result(tight: Policy, loose: Policy) -> None:
    """Nothing is remembered outside the cache: a second run gives the same numbers, bit for bit."""
    inputs = Inputs.random()
    assert torch.equal(rollout(tight, *inputs), rollout(tight, *inputs)), (
        f"{tight} gave two results for one input"
    )


@_law
def rows_do_not_meet(tight: Policy, loose: Policy) -> None:
    """A row of a ragged batch gets what it gets alone."""
    inputs = Inputs.random()
    together = rollout(tight, *inputs)
    for b in range(len(inputs.lengths)):
        _same(
            together[b : b + 1], rollout(tight, *inputs.row(b)), f"{tight}: row {b} depends on its neighbours"
        )


@_law
def padding_side_does_not_matter(tight: Policy, loose: Policy) -> None:
    """Left-padded and right-padded prompts give the same."""
    inputs = Inputs.random()
    prompt = inputs.prefill_queries.shape[2]
    policy = tight.for_layer(0, 1)
    layer = _layer(policy)
    _read(layer, inputs, pad_left=True)
    new = slice(prompt, prompt + 1)
    token = inputs.step_queries[:, :, 0], inputs.keys[:, :, new], inputs.values[:, :, new]
    layer.ids = _ids(inputs.keys[:, :, new])
    output = one_step(layer, *token, _ROTARY).flatten(1, 2)
    _same(output, rollout(tight, *inputs)[:, :, 0], f"{tight} depends on the side of the padding")


@_law
def pieces_of_a_prompt_change_nothing(tight: Policy, loose: Policy) -> None:
    """A prompt that is fed in pieces gives what it gives as a whole."""
    inputs = Inputs.random()
    whole = rollout(tight, *inputs)
    for chunk in (1, 7, 39):
        _same(
            rollout(tight, *inputs, prefill_chunk=chunk), whole, f"{tight} depends on prefill_chunk = {chunk}"
        )


@_law
def traffic_is_what_was_read(tight: Policy, loose: Policy) -> None:
    """The meter charges each chosen slot's key and value once, and nothing else is read by attention."""
    inputs = Inputs.random()
    spy = Spy(tight.for_layer(0, 1))
    with transfer.measure() as meter:
        rollout(spy, *inputs)
    size = inputs.values.shape[3] * inputs.values.element_size()
    read = _tokens_read(spy)
    assert meter.by_kind.get("values", 0) >= read * size, f"{tight} read {read} values, the meter has fewer"
    counted = meter.by_kind.get("values", 0) + meter.by_kind.get("keys", 0)
    assert counted == 2 * read * size + spy.notes.direct_reads, f"{tight}: traffic is off"
    assert not spy.notes.leaks, f"{tight}: {spy.notes.leaks[0]}"


@_law
def nothing_is_read_behind_the_meter(tight: Policy, loose: Policy) -> None:
    """Keys, values, columns and summaries are touched through the view and the ops alone, which count."""
    for policy in (tight, loose):
        spy = Spy(policy.for_layer(0, 1))
        with transfer.measure():
            rollout(spy, *Inputs.random())
        assert not spy.notes.unmetered, f"{policy}: {spy.notes.unmetered[0]}"


@_law
def leaving_out_saves_bytes(tight: Policy, loose: Policy) -> None:
    """A policy that leaves tokens out reads no more than dense attention does, its own columns included."""
    with transfer.measure() as meter:
        rollout(tight, *Inputs.random())
    share = meter.read / meter.dense_read
    assert share <= 1, f"{tight} reads {share:.2f} of dense attention's bytes: {meter.by_kind}"


@_law
def a_step_never_waits_for_the_device(tight: Policy, loose: Policy) -> None:
    """No `.item()`, no shape that depends on data, unless the policy declares that it is not `capturable`."""
    policy = tight.for_layer(0, 1)
    if not policy.capturable:
        return
    inputs, layer = Inputs.random(), LayerCache(policy)
    rollout(policy, *inputs, layer=layer)
    layer.update(inputs.keys[:, :, -1:], inputs.values[:, :, -1:])
    layer.ids = _ids(inputs.keys[:, :, -1:])
    with transfer.measure(), FindsWaits() as trace:
        decode_step(layer, inputs.step_queries[:, :, -1].unflatten(1, (2, 2)))
    assert not trace.found, (
        f"{tight} waits for the device in a step ({trace.found[0]}): compute with tensors, or declare "
        "capturable = False"
    )


@_law
def a_budget_is_what_it_promises(tight: Policy, loose: Policy) -> None:
    """Asked for a share of the memory or for tokens, a policy holds or reads no more, columns included.

    If it can be asked, and reads a prompt as a whole; to half a head, where heads are full or not. Files and
    what is inside are those of `tight`.
    """
    inputs = Inputs.random((128,), steps=1)
    heads, prompt, size = inputs.keys.shape[1], inputs.prefill_queries.shape[2], 2 * inputs.keys.shape[3] * 4
    for kind, amount in ((MEMORY, Fraction(1, 2)), (TOKENS, 48)):
        try:
            policy = specs.build(type(tight), {kind: amount} | _beside(tight), 16, prompt, itemsize=4)
            policy.check(16)
        except UserError:
            continue  # it says that it cannot
        if policy.plan([prompt]) is not None:
            continue
        if kind == MEMORY:
            layer = _layer(policy.for_layer(0, 1))
            _read(layer, inputs)
            share = layer.slots.memory() / (heads * prompt * size)
            whole_heads = 0 if policy.keeps_per_head(0, range(heads)) is None else 0.5 / heads
            assert share <= amount + whole_heads, (
                f"{policy} holds {share:.3f} of dense attention's memory, not {amount}"
            )
            continue
        with transfer.measure() as meter:
            rollout(policy, *inputs)
        read = meter.by_kind["values"] / (heads * size / 2)
        grows = policy.drops and not (policy.overwrites and policy.keeps)
        assert read <= amount + grows, f"{policy} reads {read:.1f} tokens at a step, not {amount}"


def _beside(policy: Policy) -> dict[str, Any]:
    """Parameters that stand beside a budget: files, and a policy within."""
    inner = getattr(policy, "inner", None)
    if isinstance(inner, Policy):
        return {"inner": {inner.name: _beside(inner)}}
    return dict(policy.files())


@_law
def odd_inputs_stay_finite(tight: Policy, loose: Policy) -> None:
    """Zero queries (as of a pad token), equal keys and prompts of one token give finite outputs."""
    inputs = Inputs.random((5, 1, 40))
    zero = inputs._replace(step_queries=torch.zeros_like(inputs.step_queries))
    equal = inputs._replace(keys=torch.ones_like(inputs.keys))
    for odd in (inputs, zero, equal, Inputs.random((1,))):
        assert rollout(tight, *odd).isfinite().all(), f"{tight} gave NaN or infinity"


@_law
def the_spec_round_trips(tight: Policy, loose: Policy) -> None:
    """`spec()` is plain data from which an equal policy is made; policies are frozen and hashable."""
    for policy in (tight, loose):
        ((name, parameters),) = policy.spec().items()
        assert name == policy.name, f"{policy}.spec() is under {name!r}"
        assert specs.build(type(policy), parameters) == policy, f"{policy} does not survive its spec"
        assert hash(policy) == hash(dataclasses.replace(policy))


@_law
def a_misspelt_parameter_is_named(tight: Policy, loose: Policy) -> None:
    """A wrong key is answered with the legal ones."""
    ((_, parameters),) = tight.spec().items()
    try:
        specs.build(type(tight), {**parameters, "budgett": 1})
    except UserError as error:
        assert "budgett" in str(error)
        for field in dataclasses.fields(tight):
            assert field.name in str(error), f"{error} does not name {field.name}"
    else:
        raise AssertionError(f"{type(tight).__name__} accepts a parameter that it does not have")


LAWS: list[Law] = [
    it_can_be_registered,
    tight_leaves_something_out,
    answers_fit_the_contract,
    a_loose_budget_is_dense,
    the_budget_is_respected,
    the_cut_is_what_is_held,
    memory_is_for_what_is_held,
    questions_change_nothing,
    same_run_same_result,
    rows_do_not_meet,
    padding_side_does_not_matter,
    pieces_of_a_prompt_change_nothing,
    traffic_is_what_was_read,
    nothing_is_read_behind_the_meter,
    leaving_out_saves_bytes,
    a_step_never_waits_for_the_device,
    a_budget_is_what_it_promises,
    odd_inputs_stay_finite,
    the_spec_round_trips,
    a_misspelt_parameter_is_named,
]


def check_policy(tight: Policy, loose: Policy) -> None:
    """All laws at once; raises AssertionError with the first that is broken, and why."""
    for law in LAWS:
        try:
            law(tight, loose)
        except (AssertionError, UserError) as error:
            reason = str(error).removeprefix(f"{law.__name__}: ")
            raise AssertionError(f"{law.__name__}: {reason}") from error


def _same(got: torch.Tensor, wanted: torch.Tensor, complaint: str) -> None:
    worst = (got - wanted).abs().max().item()
    assert worst < 1e-4, f"{complaint} (by {worst:.2g})"


def _tokens_read(spy: Spy) -> int:
    """By attention, over all steps, rows and KV heads."""
    return sum(
        int(lengths.sum()) if selection is None else sum(int(part.counts.sum()) for part in parts(selection))
        for selection, lengths in zip(spy.notes.selections, spy.notes.lengths, strict=True)
    )


def _heads(lengths: torch.Tensor) -> list[tuple[int, int]]:
    return [(b, k) for b in range(lengths.shape[0]) for k in range(lengths.shape[1])]
