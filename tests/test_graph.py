"""A decode step can become one CUDA graph: it never looks at the device, and traces into one graph over
growing steps."""

import contextlib
import gc
import weakref
from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kvsieve
from kvsieve import KVCache, Policy, graph, make_policy
from kvsieve.attention import decode_step
from kvsieve.loop import Decoding, Runner
from kvsieve.sampling import Sampler
from kvsieve.testing import FindsWaits, Inputs, LayerCache, rollout, strict
from tests.families.zoo import FAMILIES
from tests.models import random_prompts, tiny_llama
from tests.policies import FIRST_LAYER_DENSE, TIGHT

POLICIES = {
    name: TIGHT[name]
    for name in (
        *("dense", "sparq", "sparq_logits", "sparq_double", "sparq_blocked", "h2o", "local_window"),
        *("tova", "snapkv", "streaming_llm", "anllm", "sirllm", "hip_every_step", "infllm"),
    )
}
POLICIES["dense_layers"] = FIRST_LAYER_DENSE
STEPS = 20


def generation(policy, temperature=None, ends=(), model=None):
    model, prompts = model or tiny_llama(), random_prompts(24, 17)
    sampler = Sampler(temperature, None, None, 0, None, prompts, model.device, ends)
    made = Decoding(Runner(model, prompts, policy, STEPS), sampler, eager=True)
    made.begin()
    made.runner.cache.fix_shapes(made.runner.room)
    return made


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("temperature", [None, 0.7])
def test_a_step_never_looks_at_the_device(policy, temperature):
    made = generation(policy, temperature, ends=[60])
    with kvsieve.transfer.measure(), FindsWaits() as trace, torch.no_grad():
        made.step()
    assert trace.found == []


class Counts(TorchDispatchMode):
    """Counts the operators of torch that run inside."""

    def __init__(self):
        super().__init__()
        self.operators = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.operators += 1
        return func(*args, **(kwargs or {}))


# Of one layer's step. What a policy does not declare costs its step nothing: a new part of the contract does
# not change these numbers. A change of the step itself may.
OPERATORS = {"dense": 54, "sparq": 231, "h2o": 101, "local_window": 73}


@pytest.mark.parametrize("name", OPERATORS)
def test_a_step_costs_only_what_its_policy_declares(name):
    inputs, layer = Inputs.random(), LayerCache(TIGHT[name])
    rollout(TIGHT[name], *Inputs.random((80, 80, 80)))  # the ops' workspaces are large enough from here on
    rollout(TIGHT[name], *inputs, layer=layer)
    layer.update(inputs.keys[:, :, -1:], inputs.values[:, :, -1:])
    with torch.no_grad(), Counts() as counted:
        decode_step(layer, inputs.step_queries[:, :, -1].unflatten(1, (2, 2)))
    assert counted.operators == OPERATORS[name]


def test_the_trace_finds_what_it_looks_for():
    x = torch.arange(3)
    with FindsWaits() as trace:
        x.sum().item()
        x[x > 1]
    assert trace.found == ["_local_scalar_dense", "index"]


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_steps_of_constant_shape_give_the_same_tokens(policy):
    made = generation(policy)
    got = [made.state.tokens.clone()]
    shapes = set()
    for _ in range(STEPS - 1):
        made.advance()
        made.runner.cache.count_fed()
        got.append(made.state.tokens.clone())
        shapes.add(tuple(layer.slots.values.shape for layer in made.runner.cache.policy_layers))
    wanted = list(kvsieve.decode(tiny_llama(), random_prompts(24, 17), policy, max_new_tokens=STEPS))
    assert torch.equal(torch.stack(got), torch.stack(wanted))
    assert len(shapes) == 1
    assert made.runner.cache.get_seq_length() == 24 + STEPS - 1


INSIDE = {name: make_policy("inside_windows", inner=TIGHT[name]) for name in ("dense", "sparq")}
# The windows are of 9 tokens: fewer are kept of them.
INSIDE["h2o"] = make_policy("inside_windows", inner={"h2o": {"budget": 5, "recent": 2}})


@pytest.mark.parametrize("policy", INSIDE.values(), ids=INSIDE)
@pytest.mark.parametrize("family", ["gemma3", "gpt_oss", "mistral (windows)", "llama4", "gemma3n"])
def test_steps_of_layers_with_a_window_have_constant_shapes(family, policy):
    model = kvsieve.prepare(next(each for each in FAMILIES if each.name == family).build())
    made = generation(policy, model=model, ends=[60])
    assert graph.why_not(made.runner.cache, SimpleNamespace(device=torch.device("cuda"))) is None
    got, places = [made.state.tokens.clone()], []
    for _ in range(STEPS - 1):
        with FindsWaits() as trace, torch.no_grad():
            made.step()
        made.runner.cache.count_fed()
        assert trace.found == []
        got.append(made.state.tokens.clone())
        places.append(made.runner.cache.places())
    assert all(each == places[0] for each in places)
    wanted = list(
        kvsieve.decode(model, random_prompts(24, 17), policy, max_new_tokens=STEPS, eos_token_id=[60])
    )
    assert torch.equal(torch.stack(got)[: len(wanted)], torch.stack(wanted))


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
def test_one_compiled_graph_serves_all_steps(policy):
    one_compiled_graph_serves_all_steps(policy)


def test_one_compiled_graph_serves_all_steps_of_sparq():
    one_compiled_graph_serves_all_steps(POLICIES["sparq"])


def one_compiled_graph_serves_all_steps(policy):
    torch._dynamo.reset()
    gc.collect()  # caches of earlier tests, which may watch the same model
    made = generation(policy)
    compiled = []

    def count(module, inputs):
        compiled.append(module)
        return module.forward

    with torch.no_grad():
        got = [made.state.tokens.clone()]
        made.step()  # workspaces are allocated in the first, as on a GPU
        got.append(made.state.tokens.clone())
        step = torch.compile(made.step, fullgraph=True, backend=count)
        for _ in range(STEPS - 2):
            step()
            got.append(made.state.tokens.clone())
    wanted = list(kvsieve.decode(tiny_llama(), random_prompts(24, 17), policy, max_new_tokens=STEPS))
    assert torch.equal(torch.stack(got), torch.stack(wanted))
    assert len(compiled) == 1


def test_what_cannot_be_captured_says_why():
    @dataclass(frozen=True)
    class Peeking(Policy):
        name: ClassVar[str] = "peeking"
        capturable: ClassVar[bool] = False

    model = tiny_llama()
    gpu = SimpleNamespace(device=torch.device("cuda"))
    assert graph.why_not(KVCache(model), gpu) is None
    assert "graphs need a GPU" in graph.why_not(KVCache(model), model)
    assert "policy peeking declares" in graph.why_not(KVCache(model, Peeking()), gpu)
    with strict():
        assert "strict mode" in graph.why_not(KVCache(model), gpu)
    gpu.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    assert "on several devices" in graph.why_not(KVCache(model), gpu)


def decoded(prompts, policy, **given):
    tokens = kvsieve.decode(tiny_llama(), random_prompts(*prompts), policy, max_new_tokens=STEPS, **given)
    return torch.stack(list(tokens))


@pytest.mark.parametrize("policy", INSIDE.values(), ids=INSIDE)
@pytest.mark.parametrize("family", ["gpt_oss", "llama4", "gemma3n"])
def test_a_cache_with_windows_that_is_reset_replays_its_step(recorded, family, policy):
    model = kvsieve.prepare(next(each for each in FAMILIES if each.name == family).build())
    cache = KVCache(model, policy, capacity=50)
    given = {"max_new_tokens": STEPS, "eos_token_id": ()}
    for prompts in [(24, 17), (30, 9), (7, 8)]:  # the last are within the window
        cache.reset()
        tokens = kvsieve.decode(model, random_prompts(*prompts), policy, cache=cache, **given)
        got = torch.stack(list(tokens))
        alone = kvsieve.decode(model, random_prompts(*prompts), policy, eager=True, **given)
        assert torch.equal(got, torch.stack(list(alone)))
    assert recorded.captured == 1


# A policy and the way to choose a token have nothing to do with each other.
CHOICES = [(name, temperature) for name in POLICIES for temperature in (None, 0.7)]
OFTEN = {(name, None) for name in POLICIES} | {(name, 0.7) for name in ("dense", "sparq", "h2o")}


@pytest.mark.parametrize(
    ("name", "temperature"),
    [pytest.param(*choice, marks=() if choice in OFTEN else pytest.mark.slow) for choice in CHOICES],
)
def test_a_cache_that_is_reset_replays_its_step(recorded, name, temperature):
    model, policy = tiny_llama(), POLICIES[name]
    cache = KVCache(model, policy, capacity=50)
    batches = [(24, 17), (30, 9), (7, 8)]  # the last are below the budgets
    for seed, prompts in enumerate(batches):
        cache.reset()
        tokens = kvsieve.decode(
            model,
            random_prompts(*prompts),
            policy,
            max_new_tokens=STEPS,
            cache=cache,
            temperature=temperature,
            seed=seed,
        )
        got = torch.stack(list(tokens))
        assert cache.eager_because is None
        assert torch.equal(got, decoded(prompts, policy, temperature=temperature, seed=seed, eager=True))
    assert recorded.captured == 1


@pytest.mark.parametrize("name", ["dense", "sparq", "h2o", "snapkv"])
def test_another_turn_follows_a_captured_decode(recorded, name):
    model, policy, made = tiny_llama(), POLICIES[name], []
    for eager in (False, True):
        cache = KVCache(model, policy)
        answer = kvsieve.decode(model, random_prompts(24), policy, max_new_tokens=5, cache=cache, eager=eager)
        said = torch.tensor([[*random_prompts(24)[0], *map(int, answer), *random_prompts(7, seed=3)[0]]])
        given = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        made.append(model.generate(said, past_key_values=cache, **given))
        assert [layer.kv.steps for layer in cache.kv_layers] == [7, 7]
    assert torch.equal(*made)
    cache.reset()
    tokens = kvsieve.decode(model, random_prompts(24), policy, max_new_tokens=STEPS, cache=cache)
    assert torch.equal(torch.stack(list(tokens)), decoded((24,), policy, eager=True))


def test_rows_that_ended_go_on_in_another_turn():
    made = generation(None, ends=[60])
    made.end_rows([0])
    made.step()
    cache = made.runner.cache
    before = cache.kv_layers[0].kv.seen.tolist()
    assert before == [24, 18]
    made.end()
    made.runner.model(torch.tensor([[5], [6]]), past_key_values=cache)
    assert cache.kv_layers[0].kv.seen.tolist() == [n + 1 for n in before]


def test_another_batch_or_another_way_to_choose_is_captured_anew(recorded):
    cache = KVCache(model := tiny_llama(), capacity=50)
    for prompts, temperature in [((24, 17), None), ((24, 17), 0.5), ((9,), 0.5), ((12,), 0.5)]:
        cache.reset()
        given = {"temperature": temperature, "max_new_tokens": STEPS}
        got = torch.stack(list(kvsieve.decode(model, random_prompts(*prompts), cache=cache, **given)))
        assert torch.equal(got, decoded(prompts, None, temperature=temperature))
    assert recorded.captured == 3 + 4  # those of `decoded`, each in a cache of its own


def test_a_step_is_replayed_by_the_ops_that_it_was_captured_with(recorded):
    cache = KVCache(model := tiny_llama(), POLICIES["sparq"], capacity=50)
    for ops in ("cpu", "reference", "reference"):
        cache.reset()
        with kvsieve.ops.use(ops):
            list(kvsieve.decode(model, random_prompts(24), max_new_tokens=5, cache=cache))
    assert recorded.captured == 2


@pytest.mark.parametrize("ends", [True, False])
def test_out_of_memory_in_a_capture_is_out_of_memory(monkeypatch, ends):
    @contextlib.contextmanager
    def capture(graph, capture_error_mode):
        assert capture_error_mode == "thread_local"  # other threads go on
        try:
            yield
        finally:
            if not ends:
                raise RuntimeError("the capture cannot be ended")

    def step():
        raise errors.pop(0)

    monkeypatch.setattr(torch.cuda, "CUDAGraph", SimpleNamespace)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    errors = [torch.OutOfMemoryError("no room"), RuntimeError("it waits")]
    run = object.__new__(graph.StepGraph)
    run.generators = ()
    with pytest.raises(torch.OutOfMemoryError, match="no room"):
        run._capture(step)
    with pytest.raises(kvsieve.UserError, match="cannot be captured as a CUDA graph; pass eager=True"):
        run._capture(step)


def test_scores_are_those_of_eager_steps(recorded):
    model, policy = tiny_llama(), POLICIES["sparq"]
    cache = KVCache(model, policy, capacity=50)
    for seed in (0, 1):
        cache.reset()
        texts = random_prompts(24, 17, seed=seed), random_prompts(9, 5, seed=seed + 5)
        got = kvsieve.score(model, *texts, policy, cache=cache)
        for row, wanted in zip(got, kvsieve.score(model, *texts, policy, eager=True), strict=True):
            torch.testing.assert_close(row, wanted)
    assert recorded.captured == 1


def test_the_meter_of_a_captured_step_goes_on(recorded):
    model, policy = tiny_llama(), POLICIES["sparq"]
    cache, counted = KVCache(model, policy, capacity=50), []
    meter = kvsieve.transfer.Meter()
    for _ in range(2):
        cache.reset()
        meter.reset()
        with kvsieve.transfer.measure(meter):
            list(kvsieve.decode(model, random_prompts(24), policy, max_new_tokens=STEPS, cache=cache))
        counted.append((meter.read, meter.steps))
    with kvsieve.transfer.measure() as eager:
        decoded((24,), policy, eager=True)
    assert counted == [(eager.read, eager.steps)] * 2
    assert recorded.captured == 1
    with kvsieve.transfer.measure() as other:  # the captured step would count in the first
        cache.reset()
        list(kvsieve.decode(model, random_prompts(24), policy, max_new_tokens=STEPS, cache=cache))
    assert other.read == eager.read


def test_nothing_holds_a_cache_that_nobody_uses(recorded):
    cache = KVCache(model := tiny_llama())
    gone = weakref.ref(cache)
    gc.disable()
    try:
        list(kvsieve.decode(model, random_prompts(24), max_new_tokens=3, cache=cache))
        del cache
        assert gone() is None
    finally:
        gc.enable()


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES)
@pytest.mark.parametrize("temperature", [None, 0.7])
def test_captured_tokens_equal_eager_ones(policy, temperature):
    model = tiny_llama(seed=7).cuda()
    ran = [
        torch.stack(
            list(
                kvsieve.decode(
                    model,
                    random_prompts(24, 17),
                    policy,
                    max_new_tokens=STEPS,
                    temperature=temperature,
                    eager=eager,
                )
            )
        )
        for eager in (True, False)
    ]
    assert torch.equal(*ran)
