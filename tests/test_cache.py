"""Slots, lengths, positions and columns stay together through every sequence of appends, evictions and
reorderings.
"""

import contextlib
import gc
import weakref
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import kvsieve
from kvsieve import KeyLayout, KVCache, Policy, UserError, make_policy, transfer
from kvsieve.attention import decode_step, prefill
from kvsieve.cache.kv import Scoring
from kvsieve.cache.layer import LayerCache
from kvsieve.cache.layouts import KINDS, by_token
from tests.models import random_prompts, tiny_llama
from tests.policies import TIGHT

HEADS, SIZE = 2, 4


@dataclass(frozen=True)
class Tagging(Policy):
    """Evicts in an arbitrary but fixed order and writes each token's position into a column and a vector
    column.
    """

    budget: int | None = None
    key_layout: KeyLayout = KeyLayout()  # noqa: RUF009  (frozen)
    name: ClassVar[str] = "tagging"
    columns = {"tag": torch.float32, "pair": (torch.float64, 2)}
    summaries = {"last": (torch.float32, "D"), "count": torch.int64}

    @property
    def keeps(self):
        return self.budget

    def on_append(self, kv, new):
        kv["tag"] = torch.where(kv.live(), kv.positions + 0.5, 0)
        kv["pair"] = (kv["tag"][..., None] * torch.tensor([1.0, -1.0])).double()
        kv["count"] = kv["count"] + new.counts[:, None]

    def priority(self, kv):
        scrambled = (kv.positions * 7919 + torch.arange(HEADS)[:, None] * 31) % 101
        return scrambled.float().masked_fill(kv.newest(1), torch.inf)


def key_of(row: int, token: int) -> float:
    return row * 1000.0 + token


def tokens(rows: list[int], starts: list[int], new: int) -> torch.Tensor:
    """Keys `[B, HEADS, new, SIZE]` that say which token of which row they are."""
    table = [[key_of(row, start + i) for i in range(new)] for row, start in zip(rows, starts, strict=True)]
    return torch.tensor(table)[:, None, :, None].expand(-1, HEADS, -1, SIZE).clone()


class Slots:
    """Drives a LayerCache and knows what must be in it: the rows' names, the tokens that each has seen."""

    def __init__(self, rows: int, budget: int | None, layout: str) -> None:
        self.layer = LayerCache(Tagging(budget, KeyLayout(layout)))
        self.layer.scoring = Scoring(0.5)
        self.rows, self.seen = list(range(rows)), [0] * rows

    def prompt(self, sizes: list[int], left: bool) -> None:
        longest = max(sizes)
        valid = torch.zeros(len(sizes), longest, dtype=torch.bool)
        keys = torch.full((len(sizes), HEADS, longest, SIZE), torch.nan)  # padding may be anything
        for b, size in enumerate(sizes):
            place = slice(longest - size, longest) if left else slice(0, size)
            valid[b, place] = True
            keys[b, :, place] = tokens([self.rows[b]], [self.seen[b]], size)[0]
            self.seen[b] += size
        self.layer.update(keys, -keys)
        prefill(self.layer, torch.zeros(len(sizes), HEADS, 1, longest, SIZE), valid)

    def step(self, active: list[bool]) -> None:
        keys = tokens(self.rows, self.seen, 1)
        self.layer.update(keys, -keys)
        self.seen = [seen + is_active for seen, is_active in zip(self.seen, active, strict=True)]
        decode_step(self.layer, torch.zeros(len(active), HEADS, 1, SIZE), torch.tensor(active)[:, None])

    def reorder(self, order: list[int]) -> None:
        self.layer.reorder_cache(torch.tensor(order))
        self.rows, self.seen = [self.rows[i] for i in order], [self.seen[i] for i in order]

    def check(self) -> None:
        kv, slots, budget = self.layer.kv, self.layer.slots, self.layer.policy.keeps
        tag, pair, keys = kv["tag"], kv["pair"], kv.keys
        channels = by_token(slots.channels, slots.used)
        for b, (row, seen) in enumerate(zip(self.rows, self.seen, strict=True)):
            assert int(kv.seen[b]) == seen
            assert kv["count"][b].tolist() == [seen] * HEADS
            for k in range(HEADS):
                length = int(kv.lengths[b, k])
                assert length == (seen if budget is None else min(seen, budget))
                assert length <= kv.slots_in_use
                held = kv.positions[b, k, :length].tolist()
                assert len(set(held)) == length
                assert all(0 <= token < seen for token in held)
                assert seen - 1 in held  # the newest is never the one to go
                wanted = torch.tensor([key_of(row, token) for token in held])
                assert torch.equal(keys[b, k, :length, 0], wanted)
                assert torch.equal(channels[b, k, :length, SIZE - 1], wanted)
                assert torch.equal(slots.values[b, k, :length, 0], -wanted)
                assert torch.equal(tag[b, k, :length], torch.tensor(held) + 0.5)
                assert torch.equal(pair[b, k, :length, 1].float(), -torch.tensor(held) - 0.5)
        assert all(t.isfinite().all() for t in slots.stored().values())


@settings(max_examples=60, deadline=None)
@given(
    data=st.data(),
    rows=st.integers(1, 3),
    budget=st.none() | st.integers(1, 20),
    layout=st.sampled_from(KINDS),
)
def test_slots_and_what_belongs_to_them_stay_together(data, rows, budget, layout):
    slots = Slots(rows, budget, layout)
    slots.prompt(
        data.draw(st.lists(st.integers(1, 20), min_size=rows, max_size=rows)), data.draw(st.booleans())
    )
    slots.check()
    for _ in range(data.draw(st.integers(1, 8))):
        action = data.draw(st.sampled_from(["step", "step", "prompt", "reorder"]))
        if action == "step":
            slots.step(data.draw(st.lists(st.booleans(), min_size=rows, max_size=rows)))
        elif action == "prompt":  # a conversation goes on: some rows may have nothing to add
            sizes = data.draw(
                st.lists(st.integers(0, 5), min_size=rows, max_size=rows).filter(lambda s: max(s) > 1)
            )
            slots.prompt(sizes, data.draw(st.booleans()))
        else:
            slots.reorder(data.draw(st.lists(st.integers(0, rows - 1), min_size=rows, max_size=rows)))
        slots.check()


def test_storage_is_for_the_budget_not_for_the_context():
    model, prompts = tiny_llama(), random_prompts(200, 150)
    dense = KVCache(model, make_policy("dense"), capacity=210)
    window = KVCache(model, make_policy("local_window", budget=20, sinks=2))
    for cache in (dense, window):
        list(kvsieve.decode(model, prompts, cache.policy, max_new_tokens=10, cache=cache))
    per_token = 2 * 2 * 8 * 4 * 2 * 2  # keys and values, KV heads, head size, float32, layers, rows
    assert dense.memory() == 210 * per_token
    assert window.memory() == 20 * per_token


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv", "adakv"])
def test_after_a_cut_storage_is_for_what_was_kept_and_what_comes(name):
    model, prompts = tiny_llama(), random_prompts(200, 150)
    cache = KVCache(model, make_policy(name, budget=20, window=4), capacity=210)
    held = []
    for _ in kvsieve.decode(model, prompts, max_new_tokens=10, cache=cache):
        held.append(cache.memory())
    per_slot = 2 * 8 * 4  # keys and values, head size, float32; of one layer, row and KV head
    kept = [(layer.kv.lengths - 9).flatten().tolist() for layer in cache.policy_layers]
    if name != "adakv":  # packed, because its heads keep different numbers
        assert all(min(counts) == max(counts) for counts in kept)
    assert held[0] == sum(map(sum, kept)) * per_slot
    assert held[-1] == sum(count + 10 for counts in kept for count in counts) * per_slot
    if name == "snapkv":
        assert kept == [[20] * 4] * 2


def test_the_whole_context_is_never_held_for_all_layers():
    """When layer 1 begins its prefill, layer 0 is down to its budget."""
    model, held = tiny_llama(), []

    @dataclass(frozen=True)
    class Watching(Policy):
        name: ClassVar[str] = "watching"
        keeps: int = 10

        def priority(self, kv):
            held.append([layer.slots.capacity for layer in cache.policy_layers if layer.is_initialized])
            return kv.positions.float()

    cache = KVCache(model, Watching())
    list(kvsieve.decode(model, random_prompts(100), cache=cache, max_new_tokens=1))
    assert held == [[100], [10, 100]]


def test_a_grown_cache_equals_a_preallocated_one():
    model, prompts = tiny_llama(), random_prompts(5, 3)
    policy = make_policy("sparq", r=3, k=6, local=2)
    grown, preallocated = KVCache(model, policy), KVCache(model, policy, capacity=25)
    ran = [
        torch.stack(list(kvsieve.decode(model, prompts, policy, max_new_tokens=20, cache=cache)))
        for cache in (grown, preallocated)
    ]
    assert torch.equal(*ran)


def test_a_full_cache_says_what_it_holds_and_what_is_needed():
    model = tiny_llama()
    cache = KVCache(model, capacity=6)
    with pytest.raises(UserError, match="holds 6 tokens a row .capacity., and 7 are needed"):
        kvsieve.decode(model, random_prompts(5), max_new_tokens=3, cache=cache)
    for capacity in (0, 2.5, "6"):
        with pytest.raises(
            UserError, match="capacity must be a whole number of tokens a row, at least 1, not"
        ):
            KVCache(model, capacity=capacity)
    with pytest.raises(UserError, match="cache must be a kvsieve.KVCache, not 'DynamicCache'"):
        kvsieve.read(model, random_prompts(5), transformers.DynamicCache())


def test_a_cache_needs_a_prepared_model():
    from transformers import LlamaForCausalLM

    with pytest.raises(UserError, match=r"kvsieve\.prepare"):
        KVCache(
            LlamaForCausalLM(
                tiny_llama().config.__class__(**{**tiny_llama().config.to_dict(), "dtype": None})
            )
        )


def test_reset_makes_it_fresh():
    model, prompts = tiny_llama(), random_prompts(9)
    cache = KVCache(model, make_policy("h2o", budget=6, recent=2))
    first = list(kvsieve.decode(model, prompts, cache=cache, max_new_tokens=5))
    cache.reset()
    assert torch.equal(
        torch.stack(first), torch.stack(list(kvsieve.decode(model, prompts, cache=cache, max_new_tokens=5)))
    )


def test_a_cache_belongs_to_one_decode_until_it_ends():
    model, prompts = tiny_llama(), random_prompts(9)
    cache = KVCache(model)
    first, second = (kvsieve.decode(model, prompts, cache=cache, max_new_tokens=5) for _ in range(2))
    next(first)
    with pytest.raises(UserError, match="another decode is using this cache"):
        next(second)
    assert len(list(first)) == 4  # and the first was not disturbed
    with pytest.raises(UserError, match="already holds tokens"):
        kvsieve.decode(model, prompts, cache=cache, max_new_tokens=5)


def test_a_reset_cache_is_free_for_another_decode_and_the_first_is_told():
    model, prompts = tiny_llama(), random_prompts(9)
    cache = KVCache(model)
    first = kvsieve.decode(model, prompts, cache=cache, max_new_tokens=5)
    next(first)
    cache.reset()
    second = list(kvsieve.decode(model, prompts, cache=cache, max_new_tokens=5))
    assert len(second) == 5
    with pytest.raises(UserError, match="was reset while it was running"):
        next(first)


def test_a_decode_that_is_given_up_frees_the_cache():
    model, prompts = tiny_llama(), random_prompts(9)
    cache = KVCache(model)
    tokens = kvsieve.decode(model, prompts, cache=cache, max_new_tokens=5)
    next(tokens)
    tokens.close()
    with pytest.raises(UserError, match="already holds tokens"):
        list(kvsieve.decode(model, prompts, cache=cache, max_new_tokens=5))
    cache.reset()
    assert len(list(kvsieve.decode(model, prompts, cache=cache, max_new_tokens=5))) == 5


def test_a_cache_filled_in_inference_mode_can_be_reset_outside_of_it():
    model, prompts = tiny_llama(), random_prompts(9)
    cache = KVCache(model, make_policy("h2o", budget=6, recent=2))
    with torch.inference_mode():
        first = torch.stack(list(kvsieve.decode(model, prompts, cache=cache, max_new_tokens=5)))
    cache.reset()
    again = torch.stack(list(kvsieve.decode(model, prompts, cache=cache, max_new_tokens=5)))
    assert torch.equal(first, again)


def test_what_a_batch_leaves_behind_never_reaches_the_next():
    """Storage that stays after a reset is finite, even if the last batch was not."""
    model = tiny_llama()
    cache = KVCache(model, make_policy("sparq", r=3, k=6, local=2), capacity=40)
    layers = cache.policy_layers
    list(kvsieve.decode(model, random_prompts(20), cache=cache, max_new_tokens=5))
    for layer in layers:
        layer.slots.values.fill_(torch.nan)
        layer.slots.keys.fill_(torch.inf)
    cache.reset()
    cache.expect_prompt(9)
    got = torch.stack(list(kvsieve.decode(model, random_prompts(9), cache=cache, max_new_tokens=5)))
    wanted = kvsieve.decode(model, random_prompts(9), cache.policy, max_new_tokens=5)
    assert torch.equal(got, torch.stack(list(wanted)))
    assert all(t.isfinite().all() for layer in layers for t in layer.slots.stored().values())


@pytest.mark.parametrize("name", ["dense", "h2o", "citrus", "sirllm", "adakv", "infllm"])
def test_a_reset_cache_serves_batches_of_any_size(name):
    model, policy = tiny_llama(), TIGHT[name]
    cache = KVCache(model, policy)
    for prompts in (random_prompts(20, 17, 9), random_prompts(18, 12), random_prompts(15)):
        wanted = torch.stack(list(kvsieve.decode(model, prompts, policy, max_new_tokens=4)))
        got = torch.stack(list(kvsieve.decode(model, prompts, cache=cache, max_new_tokens=4)))
        assert torch.equal(got, wanted)
        cache.reset()


class Fails(Policy):
    """Fails in the second layer of the second step, or there in the prompt."""

    name = "fails"
    in_prompt: bool | None = None  # None: never

    def on_append(self, kv, new):
        _ = kv.keys  # counted in a step, and not in a prompt
        Fails.calls += 1
        if Fails.in_prompt is not None and Fails.calls == (2 if Fails.in_prompt else 6):
            raise RuntimeError("no more memory")


@pytest.mark.parametrize("in_prompt", [True, False])
def test_a_decode_that_fails_leaves_nothing_behind_in_a_reset_cache(in_prompt):
    model, prompts, counts = tiny_llama(), random_prompts(9, 7), []
    cache, meter = KVCache(model, Fails()), transfer.Meter()
    for when in (None, in_prompt, None):
        Fails.calls, Fails.in_prompt = 0, when
        meter.reset()
        with transfer.measure(meter), contextlib.suppress(RuntimeError):
            list(kvsieve.decode(model, prompts, cache=cache, max_new_tokens=5))
        counts.append((meter.steps, meter.read, meter.written))
        cache.reset()
    assert counts[0] == counts[2] != counts[1]


def test_a_cache_for_fewer_layers_is_refused():
    model, small = tiny_llama(), tiny_llama()
    cache = KVCache(small)
    del cache.layers[1]
    with pytest.raises(UserError, match="the cache has 1 layers, and the model asks for layer 1"):
        list(kvsieve.decode(model, random_prompts(9), cache=cache, max_new_tokens=5))


def test_a_cache_cannot_be_cropped():
    with pytest.raises(UserError, match="cannot be cropped"):
        KVCache(tiny_llama()).crop(3)


def test_plain_forward_through_the_cache_equals_no_cache():
    model = tiny_llama()
    ids = torch.tensor(random_prompts(30))
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        cache = KVCache(model)
        parts = [
            model(ids[:, part], past_key_values=cache).logits
            for part in (slice(0, 12), slice(12, 29), slice(29, 30))
        ]
    torch.testing.assert_close(torch.cat(parts, 1), wanted, atol=1e-5, rtol=1e-5)
    assert cache.get_seq_length() == 30


@pytest.mark.filterwarnings("ignore:anllm hides")
def test_the_mask_of_a_prompt_is_let_go_once_the_prompt_is_read():
    model, policy = tiny_llama(), TIGHT["anllm"]
    cache = KVCache(model, policy)
    list(kvsieve.decode(model, random_prompts(20), policy, max_new_tokens=1, cache=cache))
    assert [layer.kv._prompt.visible for layer in cache.policy_layers] == [None, None]


@pytest.mark.parametrize("name", ["dense", "h2o", "sirllm"])
def test_a_cache_that_nobody_holds_is_freed_at_once(name):
    model, policy = tiny_llama(), TIGHT[name]
    cache = KVCache(model, policy)
    list(kvsieve.decode(model, random_prompts(20), policy, max_new_tokens=3, cache=cache))
    layer = weakref.ref(cache.layers[0])
    gc.disable()
    try:
        del cache
        assert layer() is None
    finally:
        gc.enable()
