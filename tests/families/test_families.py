"""Every family, at 24 tokens: with nothing left out, exactly what transformers computes with its own cache
and attention.

Stock is an untouched copy of the model. A row of a batch is compared with that row alone wherever stock
itself cannot serve the batch (padding on the right).
"""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch

import kvsieve
from kvsieve import make_policy, transfer
from kvsieve.loop import Runner

from ..policies import LOOSE
from .zoo import FAMILIES, VOCABULARY, WINDOW

NEW = 24
LENGTHS = 13, 7, 10  # of the prompts; the windows are shorter than the longest
EXACT = {name: LOOSE[name] for name in ("dense", "sparq")}
EXACT["inside_windows"] = make_policy("inside_windows", inner=LOOSE["sparq"])
FEW = 8  # where all that matters shows early


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def case(request):
    family = request.param
    stock = family.build()
    random = torch.Generator().manual_seed(1)
    rows = [torch.randint(3, VOCABULARY, (n,), generator=random).tolist() for n in LENGTHS]
    return SimpleNamespace(
        family=family,
        rows=rows,
        stock=stock,
        model=kvsieve.prepare(copy.deepcopy(stock)),
        alone=functools.cache(lambda b: greedy(stock, torch.tensor([rows[b]]))),
        together=functools.cache(lambda: greedy(stock, *padded(rows, "left"))),
    )


def padded(rows, side):
    width = max(map(len, rows))
    pads = [[0] * (width - len(row)) for row in rows]
    order = (lambda pad, row: pad + row) if side == "left" else (lambda pad, row: row + pad)
    mask = [order(pad, [1] * len(row)) for pad, row in zip(pads, rows, strict=True)]
    ids = [order(pad, row) for pad, row in zip(pads, rows, strict=True)]
    return torch.tensor(ids), torch.tensor(mask)


def greedy(model, ids, mask=None, cache=None, new=NEW):
    """New tokens `[B, N]` and their logits `[B, N, V]` by `generate`."""
    out = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=cache,
        max_new_tokens=new,
        do_sample=False,
        return_dict_in_generate=True,
        output_logits=True,
    )
    assert torch.equal(out.sequences[:, : ids.shape[1]], ids)
    return out.sequences[:, ids.shape[1] :], torch.stack(out.logits, 1)


def loop(model, rows, policy, new=NEW):
    """The same by the decode loop."""
    runner = Runner(model, rows, policy, new)
    logits = [runner.prefill()]
    for step in range(new - 1):
        logits.append(runner.run(logits[-1].argmax(-1), runner.sizes + step))
    return torch.stack(logits, 1).argmax(-1), torch.stack(logits, 1)


def forwards(model, ids, mask, policy):
    """Call the model itself, with padding on the right: a row's next token follows its last real one."""
    cache, sizes, steps = kvsieve.KVCache(model, policy), mask.sum(1), []
    with torch.no_grad():
        out = model(
            ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0), past_key_values=cache
        )
        logits = out.logits[torch.arange(len(ids)), sizes - 1]
        for step in range(NEW):
            steps.append(logits)
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            tokens, positions = logits.argmax(-1)[:, None], (sizes + step)[:, None]
            logits = model(tokens, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[
                :, -1
            ]
    return torch.stack(steps, 1).argmax(-1), torch.stack(steps, 1)


def assert_same(got, stock):
    assert torch.equal(got[0], stock[0])
    assert (got[1] - stock[1]).abs().max() < 1e-4


def each_alone(case):
    found = [case.alone(b) for b in range(len(case.rows))]
    return tuple(torch.cat(part) for part in zip(*found, strict=True))


def test_the_policy_acts_on_the_layers_that_see_everything(case):
    layers = kvsieve.KVCache(case.model).policy_layers
    assert tuple(layer.index for layer in layers) == case.family.policy_layers


def test_the_policy_acts_on_all_layers_that_are_held_if_asked(case):
    cache = kvsieve.KVCache(case.model, EXACT["inside_windows"])
    assert cache.policy_layers == cache.kv_layers
    assert len(cache.kv_layers) >= len(case.family.policy_layers)


def test_without_a_kvcache_nothing_changes(case):
    tokens, logits = case.together()
    assert_same(greedy(case.model, *padded(case.rows, "left"), new=FEW), (tokens[:, :FEW], logits[:, :FEW]))


@pytest.fixture(params=EXACT)
def policy(case, request):
    if case.family.in_windows and request.param == "sparq":
        pytest.skip("it would never act, and is refused: see test_refusals.py")
    if case.family.policy_layers == (0, 1) and request.param == "inside_windows":
        pytest.skip("no windows")
    return EXACT[request.param]


class TestExactly:
    def test_one_row(self, case, policy):
        assert_same(loop(case.model, case.rows[:1], policy), case.alone(0))
        cache = kvsieve.KVCache(case.model, policy)
        assert_same(greedy(case.model, torch.tensor(case.rows[:1]), cache=cache), case.alone(0))

    def test_padded_on_the_left(self, case, policy):
        assert_same(loop(case.model, case.rows, policy), case.together())
        cache = kvsieve.KVCache(case.model, policy)
        assert_same(greedy(case.model, *padded(case.rows, "left"), cache), case.together())

    def test_padded_on_the_right(self, case, policy):
        ids, mask = padded(case.rows, "right")
        assert_same(greedy(case.model, ids, mask, kvsieve.KVCache(case.model, policy)), each_alone(case))
        if "linear" not in case.family.special:  # such layers would count the padding in
            assert_same(forwards(case.model, ids, mask, policy), each_alone(case))


def test_leaving_tokens_out_changes_the_logits(case):
    policy = make_policy("inside_windows", inner={"sparq": {"r": 2, "k": 4, "local": 1}})
    logits = loop(case.model, case.rows, policy, 2)[1]
    stock = case.together()[1]
    assert (logits[:, 0] - stock[:, 0]).abs().max() < 1e-4  # the first token comes from the dense prefill
    assert (logits[:, 1] - stock[:, 1]).abs().max() > 1e-3  # and the second from the policy


def test_windowed_layers_are_metered(case):
    cache = kvsieve.KVCache(case.model)
    windows = [layer for layer in cache.kv_layers if layer.window is not None]
    borrowers = (
        case.family.layers
        - len(cache.layers)
        + sum(type(layer).__name__ == "DummyLayer" for layer in cache.layers)
    )
    with transfer.measure() as meter:
        list(kvsieve.decode(case.model, case.rows, max_new_tokens=FEW, eos_token_id=(), cache=cache))
    first = cache.kv_layers[0]
    # Bytes of a token: keys and values.
    number = 2 * first.kv.lengths.shape[1] * first.kv.head_size * 4
    full, windowed = 0, 0
    for length in LENGTHS:
        for step in range(1, FEW):  # the first new token comes from the prefill
            seen = length + step
            full += seen * number
            # llama4's chunks: the tokens since the last multiple of the chunk, counted from the row's first
            chunk = (seen - 1) % WINDOW + 1 if case.family.config == "Llama4TextConfig" else min(WINDOW, seen)
            windowed += chunk * number
    readers = len(cache.policy_layers) + borrowers // 2, len(windows) + borrowers // 2
    assert meter.read == meter.dense_read == readers[0] * full + readers[1] * windowed
    assert meter.written == (len(cache.policy_layers) + len(windows)) * len(LENGTHS) * (FEW - 1) * number
    assert meter.steps == len(LENGTHS) * (FEW - 1)
