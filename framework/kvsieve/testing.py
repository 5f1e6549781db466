"""What an author tests a policy with: `rollout` runs it on tensors, without a model, and the laws hold for every
policy.

    import pytest
    from kvsieve.testing import LAWS

    @pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
    def test_my_policy(law):
        law(tight=MyPolicy(budget=16), loose=MyPolicy(budget=4096))

`tight` must leave something out of 40 tokens; `loose` must leave out nothing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from . import ops, specs, transfer
from .attention import decode_step, prefill
from .cache.layer import LayerCache, NewTokens
from .cache.layouts import KeyLayout, by_token
from .errors import UserError
from .policy import Observe, Policy, Selection, Shape


def rollout(
    policy: Policy,
    prefill_queries: torch.Tensor | None,
    step_queries: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    lengths: torch.Tensor | None = None,
    scale: float | None = None,
    kv: LayerCache | None = None,
) -> torch.Tensor:
    """Attention outputs `[B, H, N, D]` of N decode steps of one layer under a policy.

    Args:
        policy: the policy, or a wrapper, of whose layers the first of one is taken.
        prefill_queries: `[B, H, P, D]`; None for policies that do not look at them.
        step_queries: `[B, H, N, D]`, one a step.
        keys, values: `[B, K, P + N, D]`: the prompt's, then one more token a step.
        lengths: `[B]`: row b's prompt is its first `lengths[b]` tokens, right-padded to P; None: all P.
        scale: of the logits; None is `D ** -0.5`.
        kv: an empty `LayerCache(policy)` to look into afterwards.

    Raises:
        UserError: shapes that do not fit together, or no prefill queries for a policy that observes attention mass.
    """
    rows, heads, steps, size = step_queries.shape
    kv_heads, prompt = keys.shape[1], keys.shape[2] - steps
    policy = policy.for_layer(0, 1)
    if prompt < 1 or heads % kv_heads or values.shape[:3] != keys.shape[:3]:
        raise UserError(
            f"keys {list(keys.shape)} and values {list(values.shape)} must be [B, K, P + N, D] with P >= 1, and the "
            f"H = {heads} query heads of step_queries {list(step_queries.shape)} a multiple of K"
        )
    if prefill_queries is None:
        if policy.observes is not Observe.NONE:
            raise UserError(f"{policy.name} observes the attention of the prompt: give prefill_queries")
        prefill_queries = step_queries.new_zeros(rows, heads, prompt, size)
    kv = kv or LayerCache(policy)
    kv.scoring = {"scale": size**-0.5 if scale is None else scale, "softcap": None, "sinks": None}
    valid = None
    if lengths is not None:
        valid = torch.arange(prompt, device=keys.device) < lengths.to(keys.device)[:, None]

    def grouped(query: torch.Tensor) -> torch.Tensor:
        return query.unflatten(1, (kv_heads, heads // kv_heads))

    kv.update(keys[:, :, :prompt], values[:, :, :prompt])
    prefill(kv, grouped(prefill_queries), valid)
    outputs = []
    for token in range(steps):
        at = slice(prompt + token, prompt + token + 1)
        kv.update(keys[:, :, at], values[:, :, at])
        outputs.append(decode_step(kv, grouped(step_queries[:, :, token])))
    return torch.stack(outputs, 3).flatten(1, 2)


class Inputs(NamedTuple):
    """Random queries, keys and values of a ragged batch, as `rollout` takes them."""

    prefill_queries: torch.Tensor
    step_queries: torch.Tensor
    keys: torch.Tensor
    values: torch.Tensor
    lengths: torch.Tensor

    @classmethod
    def random(cls, lengths: tuple[int, ...] = (40, 33, 3), steps: int = 6, seed: int = 0) -> Inputs:
        """B rows of these prompt lengths, H = 4, K = 2, D = 16; logits spread enough that tokens differ."""
        random = torch.Generator().manual_seed(seed)

        def normal(heads: int, tokens: int) -> torch.Tensor:
            return torch.randn(len(lengths), heads, tokens, 16, generator=random)

        prompt = max(lengths)
        queries, new = 2 * normal(4, prompt), 2 * normal(4, steps)
        return cls(queries, new, normal(2, prompt + steps), normal(2, prompt + steps), torch.tensor(lengths))

    def row(self, b: int) -> Inputs:
        """Row b alone, without padding."""
        length, prompt = int(self.lengths[b]), self.prefill_queries.shape[2]
        tokens = [*range(length), *range(prompt, self.keys.shape[2])]
        keys, values = self.keys[b : b + 1, :, tokens], self.values[b : b + 1, :, tokens]
        queries, new = self.prefill_queries[b : b + 1, :, :length], self.step_queries[b : b + 1]
        return Inputs(queries, new, keys, values, self.lengths[b : b + 1])


# -------------------------------------------------------------------- the laws
def a_loose_budget_is_dense(tight: Policy, loose: Policy) -> None:
    """A policy that leaves nothing out computes dense attention."""
    inputs = Inputs.random()
    _same(rollout(loose, *inputs), rollout(Policy(), *inputs), f"{loose} differs from dense attention")


def the_budget_is_respected(tight: Policy, loose: Policy) -> None:
    """Storage never exceeds the budget once the prompt is in; chosen slots are live, distinct and within the count."""
    spy = _Spy(tight.for_layer(0, 1))
    kv = LayerCache(spy)
    inputs = Inputs.random()
    rollout(spy, *inputs, kv=kv)
    budget = tight.for_layer(0, 1).slots_kept()
    if budget is not None:
        assert kv.capacity <= budget, f"{tight} holds {kv.capacity} slots"
        assert int(kv.lengths.max()) <= budget
    for selection, lengths in zip(spy.selections, spy.lengths, strict=True):
        if selection is None:
            continue
        for b, k in _heads(lengths):
            count = int(selection.counts[b, k])
            chosen = selection.slots[b, k, :count].tolist()
            assert count <= selection.slots.shape[2], (
                f"{tight} counts {count} of {selection.slots.shape[2]} slots"
            )
            assert len(set(chosen)) == count, f"{tight} chose a slot twice: {chosen}"
            assert all(0 <= slot < lengths[b, k] for slot in chosen), (
                f"{tight} chose a slot that holds no token"
            )


def questions_change_nothing(tight: Policy, loose: Policy) -> None:
    """`select` and `priority` do not modify the cache."""
    spy = _Spy(tight.for_layer(0, 1))
    rollout(spy, *Inputs.random())
    assert not spy.changes, f"{tight}: {spy.changes[0]}"


def same_run_same_result(tight: Policy, loose: Policy) -> None:
    """Nothing is remembered outside the cache: a second run gives the same numbers, bit for bit."""
    inputs = Inputs.random()
    assert torch.equal(rollout(tight, *inputs), rollout(tight, *inputs)), (
        f"{tight} gave two results for one input"
    )


def rows_do_not_meet(tight: Policy, loose: Policy) -> None:
    """A row of a ragged batch gets what it gets alone."""
    inputs = Inputs.random()
    together = rollout(tight, *inputs)
    for b in range(len(inputs.lengths)):
        _same(
            together[b : b + 1], rollout(tight, *inputs.row(b)), f"{tight}: row {b} depends on its neighbours"
        )


def padding_side_does_not_matter(tight: Policy, loose: Policy) -> None:
    """Left-padded and right-padded prompts give the same."""
    inputs = Inputs.random()
    prompt = inputs.prefill_queries.shape[2]
    policy = tight.for_layer(0, 1)
    kv = LayerCache(policy)
    kv.scoring = {"scale": 0.25, "softcap": None, "sinks": None}
    shifts = [prompt - int(length) for length in inputs.lengths]

    def left(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([row.roll(shift, 1) for row, shift in zip(x[:, :, :prompt], shifts, strict=True)])

    valid = torch.arange(prompt) >= torch.tensor(shifts)[:, None]
    kv.update(left(inputs.keys), left(inputs.values))
    prefill(kv, left(inputs.prefill_queries).unflatten(1, (2, 2)), valid)
    kv.update(inputs.keys[:, :, prompt : prompt + 1], inputs.values[:, :, prompt : prompt + 1])
    output = decode_step(kv, inputs.step_queries[:, :, 0].unflatten(1, (2, 2))).flatten(1, 2)
    _same(output, rollout(tight, *inputs)[:, :, 0], f"{tight} depends on the side of the padding")


def traffic_is_what_was_read(tight: Policy, loose: Policy) -> None:
    """The meter charges each chosen slot's key and value once, and nothing else is read by attention."""
    inputs = Inputs.random()
    spy = _Spy(tight.for_layer(0, 1))
    with transfer.measure() as meter:
        rollout(spy, *inputs)
    size = inputs.values.shape[3] * inputs.values.element_size()
    read = sum(
        int((lengths if selection is None else selection.counts).sum())
        for selection, lengths in zip(spy.selections, spy.lengths, strict=True)
    )
    assert meter.by_kind.get("values", 0) >= read * size, f"{tight} read {read} values, the meter has fewer"
    direct = sum(spy.direct_reads.values())
    assert meter.by_kind["values"] + meter.by_kind["keys"] == 2 * read * size + direct, (
        f"{tight}: traffic is off"
    )
    assert not spy.leaks, f"{tight}: {spy.leaks[0]}"


def odd_inputs_stay_finite(tight: Policy, loose: Policy) -> None:
    """A zero query (the embedding of a pad token, say), equal keys, and prompts of one token give finite outputs."""
    inputs = Inputs.random((5, 1, 40))
    zero = inputs._replace(step_queries=torch.zeros_like(inputs.step_queries))
    equal = inputs._replace(keys=torch.ones_like(inputs.keys))
    for odd in (inputs, zero, equal, Inputs.random((1,))):
        assert rollout(tight, *odd).isfinite().all(), f"{tight} gave NaN or infinity"


def the_spec_round_trips(tight: Policy, loose: Policy) -> None:
    """`spec()` is plain data from which an equal policy is made; policies are frozen and hashable."""
    for policy in (tight, loose):
        ((name, parameters),) = policy.spec().items()
        assert name == policy.name, f"{policy}.spec() is under {name!r}"
        assert specs.build(type(policy), parameters) == policy, f"{policy} does not survive its spec"
        assert hash(policy) == hash(dataclasses.replace(policy))


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


LAWS: list[Callable[[Policy, Policy], None]] = [
    a_loose_budget_is_dense,
    the_budget_is_respected,
    questions_change_nothing,
    same_run_same_result,
    rows_do_not_meet,
    padding_side_does_not_matter,
    traffic_is_what_was_read,
    odd_inputs_stay_finite,
    the_spec_round_trips,
    a_misspelt_parameter_is_named,
]


def check_policy(tight: Policy, loose: Policy) -> None:
    """All laws at once; raises AssertionError with the first that is broken."""
    for law in LAWS:
        law(tight, loose)


def _same(got: torch.Tensor, wanted: torch.Tensor, complaint: str) -> None:
    worst = (got - wanted).abs().max().item()
    assert worst < 1e-4, f"{complaint} (by {worst:.2g})"


def _heads(lengths: torch.Tensor) -> list[tuple[int, int]]:
    return [(b, k) for b in range(lengths.shape[0]) for k in range(lengths.shape[1])]


@dataclasses.dataclass(frozen=True)
class _Spy(Policy):
    """Behaves as `inner` and takes notes."""

    inner: Policy
    selections: list[Selection | None] = dataclasses.field(default_factory=list)
    lengths: list[torch.Tensor] = dataclasses.field(default_factory=list)
    changes: list[str] = dataclasses.field(default_factory=list)
    leaks: list[str] = dataclasses.field(default_factory=list)
    direct_reads: dict[str, int] = dataclasses.field(default_factory=dict)

    @property
    def columns(self) -> Mapping[str, Shape]:
        return self.inner.columns

    @property
    def summaries(self) -> Mapping[str, Shape]:
        return self.inner.summaries

    @property
    def observes(self) -> Observe:
        return self.inner.observes

    @property
    def key_layout(self) -> KeyLayout:
        return self.inner.key_layout

    def slots_kept(self) -> int | None:
        return self.inner.slots_kept()

    def select(self, query: torch.Tensor, kv: LayerCache) -> Selection | None:
        before = kv.meter.by_kind if kv.meter else {}
        selection = self._unchanged(kv, "select", lambda: self.inner.select(query, kv))
        for kind in ("keys", "values"):
            read = (kv.meter.by_kind if kv.meter else {}).get(kind, 0) - before.get(kind, 0)
            self.direct_reads[kind] = self.direct_reads.get(kind, 0) + read
        self.selections.append(selection)
        self.lengths.append(kv.lengths.clone())
        if selection is not None:
            self._look_for_leaks(query, kv, selection)
        return selection

    def priority(self, kv: LayerCache) -> torch.Tensor:
        return self._unchanged(kv, "priority", lambda: self.inner.priority(kv))

    def on_append(self, kv: LayerCache, new: NewTokens) -> None:
        self.inner.on_append(kv, new)

    def on_attend(self, kv: LayerCache, mass: torch.Tensor) -> None:
        self.inner.on_attend(kv, mass)

    def on_prefill(self, kv: LayerCache) -> None:
        self.inner.on_prefill(kv)

    def _unchanged(self, kv: LayerCache, question: str, ask: Callable[[], Any]) -> Any:
        before = kv.snapshot()
        answer = ask()
        for name, tensor in kv.snapshot().items():
            if not torch.equal(tensor, before[name]):
                self.changes.append(f"{question} changed {name!r}")
        return answer

    def _look_for_leaks(self, query: torch.Tensor, kv: LayerCache, selection: Selection) -> None:
        """Attention over the selection must not change when every slot outside it is spoilt."""
        chosen = torch.zeros(*kv.lengths.shape, kv.used, dtype=torch.bool)
        for b, k in _heads(kv.lengths):
            chosen[b, k, selection.slots[b, k, : int(selection.counts[b, k])]] = True
        meter, kv.meter = kv.meter, None
        clean, _ = ops.attend(query, kv, selection)
        saved = kv.live_keys.clone(), kv.live_values.clone()
        junk = by_token(saved[0], kv.used).masked_fill(~chosen[..., None], 1e4)
        ops.reference.append(kv.live_keys, junk, torch.arange(kv.used).expand(chosen.shape))
        kv.live_values.masked_fill_(~chosen[..., None], 1e4)
        spoilt, _ = ops.attend(query, kv, selection)
        kv.live_keys.copy_(saved[0])
        kv.live_values.copy_(saved[1])
        kv.meter = meter
        if not torch.equal(clean, spoilt):
            self.leaks.append("attention depends on slots outside the selection")
