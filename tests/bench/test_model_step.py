"""Steps of a whole model from a filled cache: the loop's own, and transformers' own."""

import pytest
import torch
from transformers import Qwen2Config
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvsieve import Policy
from kvsieve.bench import memory
from kvsieve.bench.model_step import Models, OurSteps, StepsWithoutAttention, StockGenerate
from kvsieve.bench.shapes import model_config
from kvsieve.cache.kv_cache import ATTENTION
from kvsieve.hf.interface import attention_forward


@pytest.fixture(scope="module")
def models():
    return Models.random(model_config("tiny", 1, 64), torch.float32, torch.device("cpu"))


def fed(model, calls):
    """Which `[B, Q]` and position every forward of this model is given, from now on."""
    return model.model.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(
            (tuple(kwargs["input_ids"].shape), kwargs["position_ids"].tolist())
        ),
        with_kwargs=True,
    )


def test_both_models_have_one_set_of_weights(models):
    ours, stock = models.ours.parameters(), models.stock.parameters()
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(ours, stock, strict=True))
    assert models.stock.config._attn_implementation == "sdpa"


def test_our_steps_begin_where_the_context_ends_and_can_be_repeated(models):
    steps, calls = OurSteps(models.ours, Policy(), batch=2, context=20, steps=3, eager=False), []
    hook = fed(models.ours, calls)
    for _ in range(3):
        steps.prepare()
        steps.run()
        assert steps.runner.cache.policy_layers[0].kv.lengths.tolist() == [[22, 22], [22, 22]]
    hook.remove()
    assert calls == 3 * [((2, 1), [[position]] * 2) for position in (19, 20, 21)]
    assert "GPU" in steps.note


def test_layers_that_transformers_keeps_go_back_with_the_others():
    config = Qwen2Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=8, use_sliding_window=True,
        layer_types=["sliding_attention", "full_attention"],
    )  # fmt: skip
    qwen = Models.random(config, torch.float32, torch.device("cpu"))
    steps = OurSteps(qwen.ours, Policy(), batch=1, context=20, steps=3, eager=True, read=True)
    found = []
    for _ in range(2):
        steps.prepare()
        before = [layer.get_seq_length() for layer in steps.runner.cache.layers]
        steps.run()
        found.append((before, [layer.get_seq_length() for layer in steps.runner.cache.layers]))
    assert found == 2 * [([19, 19], [22, 22])]
    assert steps.prefill_seconds > 0
    without = StepsWithoutAttention(qwen.ours, batch=1, steps=2, eager=True)
    without.run()


def test_memory_is_what_is_in_use_at_most_over_what_there_was():
    peak = memory.Peak(torch.device("cpu"))
    if peak.bytes() is None:
        pytest.skip("this system does not say")
    torch.ones(2**26)  # 256 MiB, given back at once
    assert 2**27 < peak.bytes() < 2**29
    peak.forget()
    assert peak.bytes() < 2**27


def test_transformers_is_fed_one_token_a_step_too(models):
    steps, calls = StockGenerate(models, batch=2, context=20, steps=3), []
    hook = fed(models.stock, calls)
    measure = steps.measure()
    assert [measure() > 0 for _ in range(2)] == [True, True]
    hook.remove()
    assert {shape for shape, _ in calls} == {(2, 1)}
    assert [positions[0][0] for _, positions in calls] == 2 * [19, 20, 21, 22]


def test_steps_without_attention_leave_the_cache_alone_and_attention_in_place(models):
    steps = StepsWithoutAttention(models.ours, batch=1, steps=2, eager=False)
    steps.run()
    assert ALL_ATTENTION_FUNCTIONS[ATTENTION] is attention_forward
    assert steps.runner.cache.policy_layers[0].kv.lengths.tolist() == [[1, 1]]
    assert OurSteps(models.ours, Policy(), 1, 8, 1, eager=True).traffic()[0] > 0
