"""Heads that keep different numbers are packed: results as if padded, in less memory, whatever follows."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import kvsieve
from kvsieve import KEYS, KVCache, Observe, Policy, contract, make_policy, ops
from kvsieve.attention import decode_step, prefill
from kvsieve.cache.kv import Scoring
from kvsieve.cache.layer import LayerCache
from kvsieve.loop import Decoding, Runner
from kvsieve.sampling import Sampler
from kvsieve.testing import FindsWaits
from tests.models import random_prompts, tiny_llama

HEADS, SIZE, GROUP = 3, 8, 2


@dataclass(frozen=True)
class Uneven(Policy):
    """Head i keeps the tokens whose number in their row is a multiple of i + 1, and the newest."""

    budget: int | None = None  # then tokens are overwritten, the oldest first
    watches: bool = False
    name: ClassVar[str] = "uneven"
    summaries = {"mass": torch.float32}

    @property
    def keeps(self):
        return self.budget

    @property
    def observes(self):
        return Observe.STEP_MASS if self.watches else Observe.NONE

    def priority(self, kv):
        return kv.positions.float()

    def cut(self, kv):
        every = 1 + torch.arange(HEADS)[:, None]
        stays = (kv.positions % every == 0) | kv.newest(1)
        return kv.live() & stays & (kv.positions >= kv.seen[:, None, None] - (self.budget or 99))

    def on_attend(self, kv, mass):
        kv["mass"] = mass.sum(2)


class Twins:
    """Two layers under the same policy, one of which may pack, that must never differ."""

    def __init__(self, policy: Policy, rows: int) -> None:
        self.packed, self.padded = LayerCache(policy), LayerCache(policy)
        self.padded.packs = False
        for layer in self.both:
            layer.scoring = Scoring(0.4)
        self.rows, self.random = rows, torch.Generator().manual_seed(0)

    @property
    def both(self) -> list[LayerCache]:
        return [self.packed, self.padded]

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(self.rows, HEADS, *shape, generator=self.random)

    def prompt(self, sizes: list[int]) -> None:
        new = max(sizes)
        keys, values, query = self.normal(new, SIZE), self.normal(new, SIZE), self.normal(GROUP, new, SIZE)
        valid = torch.arange(new) < torch.tensor(sizes)[:, None]
        for layer in self.both:
            layer.update(keys, values)
        self.same(*(prefill(layer, query, valid) for layer in self.both))

    def step(self, active: list[bool]) -> None:
        keys, values, query = self.normal(1, SIZE), self.normal(1, SIZE), self.normal(GROUP, SIZE)
        for layer in self.both:
            layer.update(keys, values)
        valid = torch.tensor(active)
        self.same(*(decode_step(layer, query, valid[:, None])[valid] for layer in self.both))

    def reorder(self, order: list[int]) -> None:
        for layer in self.both:
            layer.reorder_cache(torch.tensor(order))

    def same(self, mine: torch.Tensor, padded: torch.Tensor) -> None:
        torch.testing.assert_close(mine, padded, atol=1e-5, rtol=1e-5)
        packed, other = (layer.kv for layer in self.both)
        assert torch.equal(packed.lengths, other.lengths)
        torch.testing.assert_close(packed["mass"], other["mass"])
        live = packed.live()
        for name in ("positions", "keys", "values"):
            got, wanted = (getattr(kv, name)[:, :, : live.shape[2]] for kv in (packed, other))
            assert torch.equal(got[live], wanted[live])
        assert all(tensor.isfinite().all() for tensor in self.packed.slots.stored().values())
        assert self.packed.slots.memory() <= self.padded.slots.memory()


ROWS = st.lists(st.integers(0, 9), min_size=3, max_size=3).filter(lambda sizes: max(sizes) > 1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from([None, 4, 12]), st.booleans(), st.sampled_from(["cpu", "reference"]))
def test_packed_and_padded_layers_never_differ(data, budget, watches, implementation):
    twins = Twins(Uneven(budget, watches), rows=3)
    with ops.use(implementation):
        twins.prompt(data.draw(st.lists(st.integers(1, 20), min_size=3, max_size=3)))
        for _ in range(data.draw(st.integers(1, 6))):
            action = data.draw(st.sampled_from(["step", "step", "prompt", "reorder", "reset"]))
            if action == "step":
                twins.step(data.draw(st.lists(st.booleans(), min_size=3, max_size=3).filter(any)))
            elif action == "prompt":  # a conversation goes on: some rows may have nothing to add
                twins.prompt(data.draw(ROWS))
            elif action == "reorder":
                twins.reorder(data.draw(st.lists(st.integers(0, 2), min_size=3, max_size=3)))
            else:
                for layer in twins.both:
                    layer.reset()
                twins.prompt(data.draw(st.lists(st.integers(1, 20), min_size=3, max_size=3)))


def test_a_packed_layer_grows_for_hundreds_of_steps():
    twins = Twins(Uneven(), rows=2)
    twins.prompt([9, 4])
    for _ in range(300):
        twins.step([True, True])
    slots = twins.packed.slots
    assert slots.packing is not None
    assert slots.memory() < twins.padded.slots.memory()


def test_heads_that_will_all_hold_the_same_number_are_not_packed():
    twins = Twins(Uneven(budget=12), rows=2)
    twins.prompt([20, 12])
    assert twins.packed.kv.lengths.tolist() == [[12, 7, 5], [12, 7, 5]]
    assert twins.packed.slots.packing is None


def test_after_the_cut_memory_is_for_what_was_kept():
    twins = Twins(Uneven(), rows=2)
    twins.prompt([20, 12])
    kept = [20, 11, 8, 12, 7, 5]
    assert twins.packed.kv.lengths.flatten().tolist() == kept
    summaries = 6 * 4
    assert twins.packed.slots.memory() == sum(kept) * 2 * SIZE * 4 + summaries
    assert twins.padded.slots.memory() == 20 * 6 * 2 * SIZE * 4 + summaries


class WithColumns(Uneven):
    columns = {"norm": KEYS}


class Selecting(Uneven):
    def select(self, query, kv):
        return None


class InBlocks(Uneven):
    key_layout = kvsieve.KeyLayout("blocked")


@pytest.mark.parametrize(
    ("policy", "packed"),
    [
        (Uneven(), True),
        (make_policy("adakv"), True),
        (make_policy("dense_layers", layers=[], inner="adakv"), True),
        (WithColumns(), False),
        (Selecting(), False),
        (InBlocks(), False),
    ],
    ids=str,
)
def test_only_what_attention_and_the_cut_alone_read_is_packed(policy, packed):
    assert contract.packs(policy) == packed


@pytest.fixture
def padded(monkeypatch):
    """Runs a function again without packing."""

    def run(function):
        got = function()
        with monkeypatch.context() as patch:
            patch.setattr(contract, "packs", lambda policy: False)
            return got, function()

    return run


POLICY = make_policy("adakv", budget=12, window=4, kernel=3, floor=0.0)


@pytest.mark.parametrize("prefill_chunk", [None, 16])
def test_decoding_gives_the_same_tokens_from_packed_heads(padded, prefill_chunk):
    def run():
        cache = KVCache(model, POLICY)
        tokens = kvsieve.decode(model, prompts, cache=cache, max_new_tokens=20, prefill_chunk=prefill_chunk)
        return torch.stack(list(tokens)), cache

    model, prompts = tiny_llama(), random_prompts(60, 41, 7)
    (got, packed), (wanted, other) = padded(run)
    assert torch.equal(got, wanted)
    assert all(layer.slots.packing is not None for layer in packed.policy_layers)
    assert all(layer.slots.packing is None for layer in other.policy_layers)
    assert packed.memory() < other.memory()


def test_beams_and_a_second_turn_give_the_same_tokens_from_packed_heads(padded):
    def run():
        cache = KVCache(model, POLICY)
        how = {"past_key_values": cache, "do_sample": False, "eos_token_id": None}
        beams = model.generate(first, max_new_tokens=8, num_beams=3, **how)
        cache = KVCache(model, POLICY)
        how["past_key_values"] = cache
        said = model.generate(first, max_new_tokens=5, **how)
        more = torch.tensor(random_prompts(14, 14, seed=3))
        return beams, model.generate(torch.cat([said, more], 1), max_new_tokens=5, **how), cache

    model, first = tiny_llama(), torch.tensor(random_prompts(40, 40))
    (beams, said, cache), (same_beams, same_said, _) = padded(run)
    assert torch.equal(beams, same_beams)
    assert torch.equal(said, same_said)
    assert all(layer.slots.packing is not None for layer in cache.policy_layers)


def test_a_reset_cache_packs_the_next_batch_anew(padded):
    def run():
        cache, said = KVCache(model, POLICY, capacity=70), []
        for seed, sizes in enumerate([(40, 22), (9, 30)]):
            cache.reset()
            prompts = random_prompts(*sizes, seed=seed)
            said.append(torch.stack(list(kvsieve.decode(model, prompts, cache=cache, max_new_tokens=9))))
        return said

    model = tiny_llama()
    for got, wanted in zip(*padded(run), strict=True):
        assert torch.equal(got, wanted)


def test_a_turn_after_which_all_stay_is_packed_again():
    @dataclass(frozen=True)
    class Once(Uneven):
        def cut(self, kv):
            return super().cut(kv) if int(kv.seen.max()) == 20 else None

    twins = Twins(Once(), rows=2)
    twins.prompt([20, 12])
    twins.step([True, True])
    twins.prompt([2, 3])
    assert twins.packed.slots.packing.rooms == [[23, 14, 11], [16, 11, 9]]
    twins.step([True, True])


PACKED = {
    "adakv": POLICY,
    "duo_attention": make_policy("duo_attention", full_heads=[[0], [1]], sinks=2, recent=7),
}
packed_policies = pytest.mark.parametrize("policy", PACKED.values(), ids=PACKED)


@packed_policies
def test_a_step_over_packed_heads_never_looks_at_the_device(policy):
    model, prompts = tiny_llama(), random_prompts(24, 17)
    sampler = Sampler(None, None, None, 0, None, prompts, model.device, [60])
    made = Decoding(Runner(model, prompts, policy, 9), sampler, eager=True)
    made.begin()
    made.runner.cache.fix_shapes(made.runner.room)
    # On a CPU a look costs nothing, and attention takes one; the reference stands for the kernels.
    with ops.use("reference"), kvsieve.transfer.measure(), FindsWaits() as trace, torch.no_grad():
        made.step()
    assert trace.found == []


@packed_policies
def test_captured_steps_over_packed_heads_are_those_of_eager_ones(recorded, policy):
    model = tiny_llama()
    cache = KVCache(model, policy, capacity=50)
    for seed, sizes in enumerate([(30, 21), (30, 21), (9, 26)]):
        cache.reset()
        prompts, how = random_prompts(*sizes, seed=seed), {"max_new_tokens": 20}
        got = torch.stack(list(kvsieve.decode(model, prompts, cache=cache, **how)))
        assert cache.eager_because is None
        wanted = torch.stack(list(kvsieve.decode(model, prompts, policy, eager=True, **how)))
        assert torch.equal(got, wanted)


def test_a_full_cache_is_told_in_a_second_turn_too():
    model = tiny_llama()
    cache = KVCache(model, POLICY, capacity=30)
    list(kvsieve.decode(model, random_prompts(20), cache=cache, max_new_tokens=2))
    with pytest.raises(kvsieve.UserError, match="holds 30 tokens a row"), torch.no_grad():
        model(torch.tensor(random_prompts(40)), past_key_values=cache)
