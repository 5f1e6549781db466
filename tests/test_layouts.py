"""A key layout changes where the keys stand in memory, and nothing else."""

import functools

import pytest
import torch

import kvsieve
from kvsieve import KeyLayout, KVCache, UserError, make_policy, transfer
from kvsieve.cache.layouts import BLOCKS, KINDS, by_token
from kvsieve.testing import LayerCache, rollout
from tests.models import random_prompts, tiny_llama
from tests.test_oracle import TOLERANCE, right_padded, steps

OTHERS = [("double", 16), *(("blocked", block) for block in BLOCKS)]


@pytest.mark.parametrize("case", ["mha_ragged", "gqa"])
@pytest.mark.parametrize(("layout", "block"), OTHERS)
def test_the_authors_numbers_in_every_layout(case, layout, block):
    given = steps(case)
    r, k, local = given["r_k_l"].tolist()
    policy = make_policy("sparq", r=r, k=k, local=local, layout=layout, block=block)
    keys, values = (right_padded(given[name], given["left_padding"], 1) for name in ("keys", "values"))
    lengths = keys.shape[2] - 1 - given["left_padding"]
    got = rollout(policy, None, given["query"], keys, values, lengths=lengths)
    torch.testing.assert_close(got, given["sparq_paper_mean_value"], atol=TOLERANCE, rtol=TOLERANCE)


@functools.cache
def run(layout, block=16, steps=40):
    """Tokens, cache and meter of a run long enough to grow the cache and to fill several blocks."""
    model, prompts = tiny_llama(), random_prompts(21, 9, 1)
    policy = make_policy("sparq", r=3, k=6, local=2, layout=layout, block=block)
    cache = KVCache(model, policy)
    with transfer.measure() as meter:
        made = list(
            kvsieve.decode(model, prompts, policy, max_new_tokens=steps, cache=cache, prefill_chunk=5)
        )
    return torch.stack(made), cache, meter


@pytest.mark.parametrize(("layout", "block"), OTHERS)
def test_the_same_tokens_and_the_same_bytes_read(layout, block):
    tokens, _, meter = run("single")
    same_tokens, _, same_meter = run(layout, block)
    assert torch.equal(tokens, same_tokens)
    assert same_meter.by_kind == meter.by_kind


def test_the_second_copy_is_held_and_written():
    (_, single, meter), (_, double, double_meter) = run("single"), run("double")
    keys = [layer.slots.capacity for layer in single.policy_layers]
    padded = [-(-capacity // 128) * 128 for capacity in keys]  # a channel's row is whole memory sectors
    a_token = 3 * 2 * 8 * 4  # rows, KV heads, head size, float32
    assert double.memory() - single.memory() == sum(padded) * a_token
    written_keys = len(keys) * meter.steps * 2 * 8 * 4
    assert double_meter.written - meter.written == written_keys


@pytest.mark.parametrize("block", BLOCKS)
def test_blocks_hold_one_copy(block):
    (_, single, meter), (_, blocked, blocked_meter) = run("single"), run("blocked", block)
    a_token = 3 * 2 * 8 * 4
    assert 0 <= blocked.memory() - single.memory() < 2 * block * a_token  # the last block may be begun
    assert blocked_meter.written == meter.written


def test_by_default_a_device_has_its_fastest_layout_and_the_memory_is_told():
    auto, double = make_policy("sparq").key_layout, KeyLayout("double")
    assert auto.on(torch.device("cpu")) == double
    assert auto.on(torch.device("cuda", 1)) == KeyLayout("blocked")
    assert double.on(torch.device("cuda")) == double
    (tokens, by_default, meter), (same, asked, other) = run("auto"), run("double")
    assert torch.equal(tokens, same)
    assert (by_default.memory(), meter.written) == (asked.memory(), other.written)
    assert make_policy("sparq").spec() == make_policy("sparq", layout="auto").spec()  # on every device alike


@pytest.mark.parametrize("layout", KINDS)
def test_rows_can_be_reordered(layout):
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 40, 8), torch.randn(2, 2, 40, 8)
    queries = torch.randn(2, 4, 4, 8)
    layer = LayerCache(make_policy("sparq", r=3, k=6, local=2, layout=layout))
    rollout(layer.policy, None, queries, keys, values, lengths=torch.tensor([30, 7]), layer=layer)
    before = layer.kv.keys.clone()
    layer.reorder_cache(torch.tensor([1, 1]))
    assert torch.equal(layer.kv.keys, before[[1, 1]])
    contiguous = {"single": 3, "double": 2, "blocked": 3}[layout]  # still in its layout
    assert layer.slots.channels.stride(contiguous) == 1


@pytest.mark.parametrize("layout", KINDS)
@pytest.mark.parametrize("budget", [5, 16, 23])
def test_evicting_works_in_every_layout(layout, budget):
    """Compaction and overwriting keep every copy right."""
    from kvsieve_policies.h2o import H2O

    class Laid(H2O):
        key_layout = KeyLayout(layout)

    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 50, 8), torch.randn(2, 2, 50, 8)
    prompt, queries = torch.randn(2, 4, 40, 8), torch.randn(2, 4, 10, 8)
    lengths = torch.tensor([40, 11])
    layer = LayerCache(Laid(budget=budget, recent=2))
    got = rollout(layer.policy, prompt, queries, keys, values, lengths=lengths, layer=layer)
    wanted = rollout(H2O(budget=budget, recent=2), prompt, queries, keys, values, lengths=lengths)
    torch.testing.assert_close(got, wanted)
    assert torch.equal(by_token(layer.slots.channels, layer.slots.used), layer.kv.keys)


def test_what_is_no_layout_is_refused_with_the_legal_ones():
    with pytest.raises(UserError, match=r"'auto', 'single', 'double' or 'blocked' \(got 'doubled'\)"):
        make_policy("sparq", layout="doubled")
    with pytest.raises(UserError, match=r"did you mean 'double'[?] Legal: auto, blocked, double, single"):
        KeyLayout("doubled")
    with pytest.raises(UserError, match="16, 32, 64 tokens, not 20"):
        make_policy("sparq", layout="blocked", block=20)
