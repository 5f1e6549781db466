"""Columns with an entry per page of slots, and reading a part of a column: held, moved and metered so."""

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import kvsieve
from kvsieve import KEYS, KVCache, Paged, Policy, UserError, Wrapper, make_policy, ops, transfer
from kvsieve.testing import Inputs, LayerCache, rollout
from kvsieve.testing.laws import nothing_is_read_behind_the_meter
from tests.models import random_prompts, tiny_llama

PAGE = 4


@dataclass(frozen=True)
class Bounded(Policy):
    """Dense, with the bounds of every page."""

    name: ClassVar[str] = "bounded"
    columns = {"low": Paged((KEYS, "D"), PAGE), "high": Paged((KEYS, "D"), PAGE)}

    def on_append(self, kv, new):
        ops.widen_bounds(kv, "low", "high", new)


@dataclass(frozen=True)
class Reads(Bounded):
    """Reads columns, keys or values of its choice at every step, and selects all."""

    what: tuple[str, ...] = ()
    name: ClassVar[str] = "reads"

    def select(self, query, kv):
        for what in self.what:
            name, _, part = what.partition(" ")
            if part:
                pages = torch.arange(int(part)).expand(*kv.lengths.shape, -1)
                assert kv.at(name, pages, torch.full_like(kv.lengths, int(part))).shape[2] == int(part)
            else:
                assert kv[name].shape[2] == -(-kv.slots_in_use // PAGE)


def bounds_of(keys, length):
    """The page bounds of one row's first `length` keys [K, T, D]: two of [K, N, D]."""
    pages = keys[:, :length].split(PAGE, 1)
    return torch.stack([page.amin(1) for page in pages], 1), torch.stack([page.amax(1) for page in pages], 1)


def run(policy, dtype=torch.float32, **given):
    inputs = Inputs.random()
    inputs = Inputs(*(x.to(dtype) if x.is_floating_point() else x for x in inputs))
    layer = LayerCache(policy)
    rollout(policy, *inputs, layer=layer, **given)
    return layer, inputs


def check(layer, inputs, rows=(0, 1, 2)):
    for b, row in enumerate(rows):
        one = inputs.row(row)
        length = one.keys.shape[2]
        low, high = bounds_of(one.keys[0], length)
        assert torch.equal(layer.kv["low"][b, :, : low.shape[1]], low)
        assert torch.equal(layer.kv["high"][b, :, : high.shape[1]], high)


@pytest.mark.parametrize("chunk", [None, 1, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_entry_a_page_of_the_keys_type_that_grows_with_the_cache(chunk, dtype):
    layer, inputs = run(Bounded(), dtype, prefill_chunk=chunk)  # storage grows: it was made for a piece
    assert layer.kv["low"].shape == (3, 2, -(-46 // PAGE), 16)
    assert layer.kv["low"].dtype == dtype
    assert layer.slots.stored()["low"].shape[2] == -(-layer.slots.capacity // PAGE)
    check(layer, inputs)


def test_a_reset_forgets_and_the_next_batch_begins_anew():
    layer, inputs = run(Bounded())
    layer.reset()
    assert not layer.slots.stored()["low"].any()
    rollout(layer.policy, *inputs._replace(lengths=inputs.lengths.flip(0)), layer=layer)
    layer.reset()
    rollout(layer.policy, *inputs, layer=layer)
    check(layer, inputs)


def test_rows_are_reordered_with_their_pages():
    layer, inputs = run(Bounded())
    layer.reorder_cache(torch.tensor([2, 0, 0]))
    check(layer, inputs, rows=(2, 0, 0))


def test_fixed_shapes_stand_at_the_capacity():
    layer, inputs = run(Bounded())
    layer.fix_shapes(50)
    assert layer.kv["low"].shape[2] == -(-layer.slots.capacity // PAGE)
    places = layer.slots.places()
    layer.update(inputs.keys[:, :, -1:], inputs.values[:, :, -1:])
    new = layer.take_token()
    layer.policy.on_append(layer.kv, new)
    layer.write_token(new)
    assert layer.slots.places() == places


def test_memory_counts_pages():
    layer, dense = (run(policy)[0].slots for policy in (Bounded(), Policy()))
    rows_and_heads = 3 * 2
    more = 2 * -(-layer.capacity // PAGE) * 16 * 4 * rows_and_heads
    assert layer.memory() - dense.memory() == more


@pytest.mark.parametrize(
    ("what", "entries", "tokens"),
    [
        ((), 2, 0),  # the newest page of each, widened
        (("low",), 12 + 1, 0),  # read whole: the page that was widened is counted once
        (("low", "high", "low"), 24, 0),
        (("low", "low 5"), 13, 0),  # a part of what is read whole costs nothing more
        (("low 5", "low"), 13, 0),
        (("low 5",), 5 + 2, 0),
        (("low 5", "high 3"), 5 + 3 + 2, 0),
        (("keys 7", "values 2"), 2, 9),  # counted beside what attention reads
    ],
    ids=str,
)
def test_a_read_in_part_is_charged_for_that_part(what, entries, tokens):
    inputs = Inputs.random((44,), steps=1)
    with transfer.measure() as meter:
        rollout(Reads(what), *inputs)
    numbers = 2 * 16 * 4  # KV heads, D, float32
    assert meter.by_kind["columns"] == entries * numbers
    assert meter.by_kind["keys"] + meter.by_kind["values"] == (2 * 45 + tokens) * numbers
    assert meter.written == (2 + 2) * numbers  # key, value and one entry of each bound


@pytest.mark.parametrize("layout", ["single", "double", "blocked"])
def test_at_gives_what_stands_there(layout):
    policy = make_policy("sparq", r=4, k=100, layout=layout)
    inputs, layer = Inputs.random((30,), steps=1), LayerCache(policy)
    rollout(policy, *inputs, layer=layer)
    slots = torch.tensor([[[3, 30, 0], [17, 16, 15]]])
    counts = torch.full((1, 2), 3)
    for name, held in (("keys", inputs.keys), ("values", inputs.values)):
        wanted = held.gather(2, slots[..., None].expand(-1, -1, -1, 16))
        assert torch.equal(layer.kv.at(name, slots, counts), wanted)
    assert not layer.kv.at("keys", torch.full_like(slots, 2**40), counts).any()
    with pytest.raises(UserError, match="there is no column 'mean'|unknown column|mean"):
        layer.kv.at("mean", slots, counts)


@dataclass(frozen=True)
class OfHeads(Policy):
    """A number per token and query head, and a vector for each head and page."""

    name: ClassVar[str] = "of_heads"
    columns = {"weight": (torch.float32, "G"), "vectors": Paged((KEYS, "GD"), 8)}
    summaries = {"last": (torch.float32, "GD")}


def test_columns_may_be_as_large_as_the_group():
    inputs, layer = Inputs.random((30,)), LayerCache(OfHeads())
    rollout(OfHeads(), *inputs, layer=layer)
    assert layer.kv["weight"].shape == (1, 2, 36, 2)
    assert layer.kv["vectors"].shape == (1, 2, 5, 32)
    assert layer.kv["last"].shape == (1, 2, 32)
    cache = KVCache(model := tiny_llama(), OfHeads())
    list(kvsieve.decode(model, random_prompts(9), OfHeads(), max_new_tokens=2, cache=cache))
    assert cache.policy_layers[0].kv["weight"].shape[-1] == 2
    with pytest.raises(UserError, match="does not say how many query heads share a KV head"):
        LayerCache(OfHeads()).update(inputs.keys, inputs.values)


@pytest.mark.parametrize("name", ["weight", "vectors"])
def test_entries_are_replaced_and_added_to_where_a_policy_says(name):
    inputs, layer = Inputs.random((30, 11)), LayerCache(OfHeads())
    rollout(OfHeads(), *inputs, layer=layer)
    kv, entries = layer.kv, torch.tensor([[[2, -1, 0], [1, 2, -5]]]).repeat(2, 1, 1)
    kv[name] = torch.ones_like(kv[name])
    size = kv[name].shape[3]
    new = torch.arange(2 * 2 * 3 * size).float().view(2, 2, 3, size) + 7
    wanted, written = kv[name].clone(), {"write_at": 0, "add_at": 1}
    for how, before in written.items():
        for b, k, i in torch.cartesian_prod(*map(torch.arange, (2, 2, 3))).tolist():
            if entries[b, k, i] >= 0:
                wanted[b, k, entries[b, k, i]] = new[b, k, i] + before * wanted[b, k, entries[b, k, i]]
        with transfer.measure() as meter:
            kv._traffic.begin(meter, None)
            getattr(kv, how)(name, entries, new)
            kv._traffic.begin(None, None)
        assert torch.equal(kv[name], wanted)
        numbers = 2 * 4 * size * 4  # rows, entries that are one, float32
        assert (meter.read, meter.written) == (before * numbers, numbers)
    kv._traffic.begin(None, torch.tensor([False, True]))  # the first row has ended
    kv.write_at(name, entries, new)
    kv.add_at(name, entries, new)
    assert torch.equal(kv[name][0], wanted[0])
    assert torch.equal(kv[name][1, 0, 2], 2 * new[1, 0, 0])
    with pytest.raises(UserError, match="unknown column 'last'"):
        kv.write_at("last", entries, new)


def test_one_number_per_token_is_read_in_part_too():
    @dataclass(frozen=True)
    class Norms(Policy):
        name: ClassVar[str] = "norms"
        columns = {"norm": torch.float32}

        def on_append(self, kv, new):
            kv.write("norm", new, new.keys.float().norm(dim=-1))

    inputs, layer = Inputs.random((30,), steps=1), LayerCache(Norms())
    rollout(Norms(), *inputs, layer=layer)
    slots = torch.tensor([[[3, 30, 0], [17, 16, 15]]])
    got = layer.kv.at("norm", slots, torch.full((1, 2), 3))
    torch.testing.assert_close(got, inputs.keys.norm(dim=-1).gather(2, slots))


def test_a_policy_that_keeps_fewer_tokens_cannot_have_pages():
    @dataclass(frozen=True)
    class Pages(Wrapper):
        inner: Policy
        name: ClassVar[str] = "pages"
        own_columns = {"low": Paged(KEYS, 8)}

    LayerCache(Pages(make_policy("sparq")))
    with pytest.raises(UserError, match=r"columns\['pages.low'\] has one entry per page.*keeps 8 tokens"):
        LayerCache(Pages(make_policy("h2o", budget=8, recent=2)))
    with pytest.raises(UserError, match="pages of 0 slots; a page has at least 1"):
        LayerCache(dataclass(frozen=True)(type("Made", (Policy,), {"columns": {"x": Paged(KEYS, 0)}}))())
    with pytest.raises(UserError, match=r"summaries\['x'\] must be"):
        LayerCache(dataclass(frozen=True)(type("Made", (Policy,), {"summaries": {"x": Paged(KEYS, 4)}}))())


def test_a_token_has_no_entry_of_its_own_in_a_page():
    @dataclass(frozen=True)
    class Writes(Bounded):
        def on_append(self, kv, new):
            kv.write("low", new, new.keys)

    with pytest.raises(UserError, match="'low' has one entry per page"):
        rollout(Writes(), *Inputs.random())


def test_the_law_finds_pages_that_are_read_behind_the_meter():
    @dataclass(frozen=True)
    class Sly(Bounded):
        name: ClassVar[str] = "sly"

        def select(self, query, kv):
            assert kv._slots.column("low").sum() < 0

    nothing_is_read_behind_the_meter(Reads(("low 2", "high")), Bounded())
    with pytest.raises(AssertionError, match="select touches low behind the meter"):
        nothing_is_read_behind_the_meter(Sly(), Bounded())


def test_pages_in_a_model_that_decodes():
    model, prompts = tiny_llama(), random_prompts(21, 9, 1)
    cache = KVCache(model, Bounded())
    got = list(kvsieve.decode(model, prompts, Bounded(), max_new_tokens=9, cache=cache, prefill_chunk=5))
    wanted = list(kvsieve.decode(model, prompts, max_new_tokens=9))
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))
    for layer in cache.policy_layers:
        for b, length in enumerate((29, 17, 9)):
            low, _ = bounds_of(layer.kv.keys[b], length)
            assert torch.equal(layer.kv["low"][b, :, : low.shape[1]], low)
