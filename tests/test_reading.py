"""Prompts that are read by a plan: passes, probes, room, cuts in between, and what can follow."""

import functools
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM

import kvsieve
from kvsieve import KVCache, Observe, Pass, Policy, Positions, UserError, make_policy
from kvsieve.loop import Runner
from tests.families.zoo import FAMILIES
from tests.models import random_prompts, tiny_llama
from tests.policies import TIGHT, of_two_layers

PROMPTS = random_prompts(30, 17, 9)


def run(prompts, policy=None, model=None, **options):
    options.setdefault("max_new_tokens", 6)
    model = model or tiny_llama()
    return torch.stack(list(kvsieve.decode(model, prompts, policy, eos_token_id=(), **options)), 1)


@dataclass(frozen=True)
class Planned(Policy):
    """Passes of `chunk` tokens; before every one but the first, a probe of the prompt's end."""

    chunk: int = 8
    probe: int = 0
    name: ClassVar[str] = "planned"

    def plan(self, segments):
        size = sum(segments)
        passes = []
        for first in range(0, size, self.chunk):
            if first and self.probe:
                passes.append(Pass(size - self.probe, size, stays=False, before=((5, 7), range(2))))
            passes.append(Pass(first, min(first + self.chunk, size)))
        return passes


@dataclass(frozen=True)
class KeepsBest(Planned):
    """Makes room before every pass: the tokens with the largest keys stay, and those just read."""

    room: int = 12
    name: ClassVar[str] = "keeps_best"
    columns = {"norm": torch.float32}

    def plan(self, segments):
        first, *others = super().plan(segments)
        return [first, *(each._replace(room=self.room) for each in others)]

    def on_append(self, kv, new):
        kv.write("norm", new, new.keys.norm(dim=-1))

    def priority(self, kv):
        return kv["norm"].masked_fill(kv.fresh(), torch.inf)


# -------------------------------------------------------------------- passes and probes
@pytest.mark.parametrize("chunk", [None, 3])
@pytest.mark.parametrize("policy", [Planned(), Planned(probe=5), Planned(5, probe=1)], ids=str)
def test_passes_read_what_one_pass_reads_and_probes_leave_no_trace(policy, chunk):
    wanted, got = KVCache(tiny_llama()), KVCache(tiny_llama(), policy)
    dense = run(PROMPTS, cache=wanted)
    assert torch.equal(run(PROMPTS, policy, cache=got, prefill_chunk=chunk), dense)
    for there, here in zip(wanted.policy_layers, got.policy_layers, strict=True):
        assert torch.equal(here.kv.lengths, there.kv.lengths)
        assert torch.equal(here.kv.seen, there.kv.seen)
        live = there.kv.live()
        assert torch.equal(here.kv.positions[live], there.kv.positions[live])
        torch.testing.assert_close(here.kv.keys[live], there.kv.keys[live], atol=1e-5, rtol=1e-5)


def test_score_reads_by_the_plan_too():
    answers = [[1, 2, 3], [4], [5, 6]]
    wanted = kvsieve.score(tiny_llama(), PROMPTS, answers)
    for got, dense in zip(
        kvsieve.score(tiny_llama(), PROMPTS, answers, Planned(probe=2)), wanted, strict=True
    ):
        torch.testing.assert_close(got, dense, atol=1e-5, rtol=1e-5)


@dataclass(frozen=True)
class SeesProbes(Planned):
    """Notes what its first layer is shown in probes."""

    name: ClassVar[str] = "sees_probes"
    observes = Observe.MASS
    summaries = {"tokens": torch.int64}
    found: ClassVar[list[Any]] = []

    def on_append(self, kv, new):
        kv["tokens"] = kv["tokens"] + new.counts[:, None]

    def on_attend(self, kv, mass):
        if kv.probing:
            self.found.append((kv.span.clone(), kv.fresh().sum(2)[:, 0], kv.seen.clone(), mass.sum((1, 2))))


def test_a_probe_is_observed_with_the_tokens_before_it_and_summaries_come_back():
    SeesProbes.found.clear()
    cache = KVCache(tiny_llama(), SeesProbes(probe=3))
    run([PROMPTS[1], PROMPTS[2]], cache=cache, max_new_tokens=1)
    first, _, second, _ = SeesProbes.found  # two layers each; the shorter row has one probe only
    assert first[0].tolist() == [[14, 17], [0, 0]]
    assert second[0].tolist() == [[14, 17], [6, 9]]
    assert first[1].tolist() == [3 + 4, 0]
    assert second[1].tolist() == [3 + 4, 3 + 4]
    assert second[2].tolist() == [16 + 7, 8 + 7]
    torch.testing.assert_close(second[3], torch.full((2,), 7.0 * 2))  # a query's weight is 1; K = 2
    assert cache.policy_layers[0].kv["tokens"].tolist() == [[17, 17], [9, 9]]


def test_a_probe_sees_the_text_that_stands_before_its_tokens():
    """Its keys are those of the whole text fed at once."""
    seen = []

    @dataclass(frozen=True)
    class Looks(Policy):
        def plan(self, segments):
            return [Pass(0, 9), Pass(2, 5, stays=False, before=((5, 7), range(7, 9)))]

        def on_append(self, kv, new):
            seen.append(new.keys.clone())

    prompt = PROMPTS[2]
    run([prompt], Looks(), max_new_tokens=1)
    probed = seen[2:]  # of two layers
    cache = KVCache(tiny_llama())
    run([[*prompt, 5, 7, *prompt[7:9], *prompt[2:5]]], cache=cache, max_new_tokens=1)
    for layer, keys in zip(cache.policy_layers, probed, strict=True):
        torch.testing.assert_close(layer.kv.keys[:, :, 9:], keys, atol=1e-5, rtol=1e-5)


# -------------------------------------------------------------------- room, cuts and steps
@pytest.mark.parametrize("chunk", [None, 3])
def test_only_the_best_stay_before_a_pass(chunk):
    policy = KeepsBest(8, room=12)
    cache = KVCache(tiny_llama(), policy)
    together = run(PROMPTS, policy, cache=cache, prefill_chunk=chunk)
    for row, prompt in zip(together, PROMPTS, strict=True):
        assert torch.equal(row, run([prompt], policy)[0])
    kv = cache.policy_layers[0].kv
    # Prompts of 30, 17 and 9 tokens end with passes of 6, 1 and 1; five tokens were fed since.
    assert kv.lengths.tolist() == [[12 + 6 + 5] * 2, [12 + 1 + 5] * 2, [8 + 1 + 5] * 2]
    # A pass ago, the whole of it was fresh: tokens 16 to 23 of the first row.
    held = set(kv.positions[0, 0].tolist())
    assert set(range(16, 35)) <= held


def test_room_is_what_a_slow_definition_keeps():
    """One layer's keys do not depend on what was dropped: they can be compared."""
    policy, prompt = KeepsBest(8, room=10), PROMPTS[0]
    cache, dense = KVCache(tiny_llama(), policy), KVCache(tiny_llama())
    run([prompt], cache=cache, max_new_tokens=1)
    run([prompt], cache=dense, max_new_tokens=1)
    norms = dense.policy_layers[0].kv.keys.norm(dim=-1)[0]
    for head in range(2):
        held: list[int] = []
        for first in range(0, 30, 8):
            if first:
                old = [t for t in held if t < first - 8]
                best = sorted(old, key=lambda t: -norms[head, t])[: 10 - 8]
                held = sorted([*best, *range(first - 8, first)])
            held += range(first, min(first + 8, 30))
        assert cache.policy_layers[0].kv.positions[0, head].tolist() == held


def test_storage_is_for_what_is_held_and_one_pass():
    policy, long = KeepsBest(8, room=12), random_prompts(200)
    cache = KVCache(tiny_llama(), policy, capacity=12 + 8 + 2)
    run(long, cache=cache, max_new_tokens=2)
    assert max(layer.slots.capacity for layer in cache.policy_layers) <= 12 + 8 + 2
    assert Runner(tiny_llama(), long, policy, 2).reading.peak == 12 + 8


@dataclass(frozen=True)
class ReadsThenAsks(Policy):
    """Cuts the context to its newest tokens, and reads the question over what is left."""

    keep: int = 6
    name: ClassVar[str] = "reads_then_asks"

    def plan(self, segments):
        if len(segments) != 2:
            raise UserError("reads_then_asks needs segments: a context and a question")
        context, size = segments[0], sum(segments)
        return [Pass(0, context), Pass(0, 3, stays=False), Pass(context, size, cut=True)]

    def cut(self, kv):
        return kv.newest(self.keep) if int(kv.seen.max()) == 12 else None


def test_a_cut_in_between_is_as_reading_twice():
    policy, (prompt, other) = ReadsThenAsks(), random_prompts(16, 20)
    prompts, segments = [prompt, other], [[12, 4], [12, 8]]
    together = run(prompts, policy, segments=segments)
    for b, row in enumerate(prompts):
        cache = KVCache(tiny_llama(), policy)
        kvsieve.read(tiny_llama(), [row[:13]], cache, segments=[[12, 1]])
        assert int(cache.policy_layers[0].kv.lengths.max()) == 6
        assert torch.equal(run([row[12:]], cache=cache)[0], together[b])


@dataclass(frozen=True)
class LastTokenSelects(Policy):
    """Feeds the last token of the prompt as a step, and reads the newest tokens only."""

    name: ClassVar[str] = "last_token_selects"
    steps: ClassVar[list[int]] = []

    def plan(self, segments):
        size = sum(segments)
        return [Pass(0, size - 1), Pass(size - 1, size, step=True)]

    def select(self, query, kv):
        self.steps.append(kv.steps)
        slots = torch.arange(kv.slots_in_use - 3, kv.slots_in_use).expand(*kv.lengths.shape, -1)
        return kvsieve.Selection(slots, torch.full_like(kv.lengths, 3))


def test_a_pass_of_one_token_may_be_a_decode_step():
    policy, prompt = LastTokenSelects(), PROMPTS[0]
    policy.steps.clear()
    runner = Runner(tiny_llama(), [prompt], policy, 3)
    got = runner.prefill()
    assert policy.steps == [1, 1]  # two layers
    twice = Runner(tiny_llama(), [prompt[:-1]], LastTokenAlone(), 3)
    twice.prefill()
    wanted = twice.run(torch.tensor(prompt[-1:]), torch.tensor([29]))
    torch.testing.assert_close(got, wanted)


@dataclass(frozen=True)
class LastTokenAlone(LastTokenSelects):
    """The same, read as a whole."""

    name: ClassVar[str] = "last_token_alone"

    def plan(self, segments):
        return None


def test_rows_whose_passes_differ_in_kind_are_read_together():
    """One row probes while the other reads; each gets what it gets alone."""
    policy = Planned(4, probe=2)
    prompts = random_prompts(21, 7, 4)
    assert torch.equal(run(prompts, policy), run(prompts))
    policy = KeepsBest(4, probe=2, room=5)
    together = run(prompts, policy)
    for row, prompt in zip(together, prompts, strict=True):
        assert torch.equal(row, run([prompt], policy)[0])


# -------------------------------------------------------------------- all layers together
@dataclass(frozen=True)
class KeepsAcrossLayers(Policy):
    """Keeps the tokens with the largest keys of all layers and heads, and the newest."""

    share: float = 0.5
    name: ClassVar[str] = "keeps_across_layers"
    cuts_together = True
    asked: ClassVar[list[Any]] = []

    def cut_together(self, layers):
        self.asked.append([kv.slots_in_use for kv in layers])
        norms = [kv.keys.norm(dim=-1).masked_fill(~kv.live(), -1) for kv in layers]
        every = torch.stack(norms).flatten()
        least = every.topk(int(self.share * every.numel())).values[-1]
        return [(norm >= least) | kv.newest(1) for norm, kv in zip(norms, layers, strict=True)]


@pytest.mark.parametrize("way", ["decode", "in pieces", "generate"])
def test_layers_are_cut_by_one_decision(way):
    policy, prompt = KeepsAcrossLayers(), PROMPTS[0]
    policy.asked.clear()
    cache, dense, model = KVCache(tiny_llama(), policy), KVCache(tiny_llama()), tiny_llama()
    run([prompt], cache=dense, max_new_tokens=1)
    if way == "generate":
        ids = torch.tensor([prompt])
        model.generate(ids, past_key_values=cache, max_new_tokens=1, do_sample=False)
    else:
        run([prompt], cache=cache, max_new_tokens=1, prefill_chunk=None if way == "decode" else 4)
    assert policy.asked == [[30, 30]]  # once, with all that every layer holds
    norms = torch.stack([layer.kv.keys.norm(dim=-1)[0] for layer in dense.policy_layers])
    least = norms.flatten().topk(30 * 2 * 2 // 2).values[-1]
    for layer, norm in zip(cache.policy_layers, norms, strict=True):
        for head in range(2):
            wanted = [t for t in range(30) if norm[head, t] >= least or t == 29]
            held = layer.kv.positions[0, head][: int(layer.kv.lengths[0, head])]
            assert held.tolist() == wanted


def test_layers_of_another_policy_are_not_asked_together():
    KeepsAcrossLayers.asked.clear()
    run([PROMPTS[0]], make_policy("dense_layers", layers=[0], inner=KeepsAcrossLayers()))
    assert KeepsAcrossLayers.asked == [[30]]


# -------------------------------------------------------------------- kvsieve.read
@pytest.mark.parametrize(
    "policy",
    [Policy(), Planned(probe=2), KeepsBest(), KeepsAcrossLayers(), make_policy("snapkv", budget=8, window=4)],
    ids=lambda policy: policy.name,
)
def test_generate_follows_what_was_read(policy):
    model, cache = tiny_llama(), KVCache(tiny_llama(), policy)
    kvsieve.read(model, PROMPTS, cache, prefill_chunk=11)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in PROMPTS])
    got = model.generate(
        ids, attention_mask=mask, past_key_values=cache, max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert torch.equal(got[:, longest:], run(PROMPTS, policy))


@pytest.mark.parametrize("name", ["snapkv", "tova", "expected_attention"])
def test_what_is_known_of_a_prompt_moves_with_its_rows(name):
    model, policy, rows = tiny_llama(), of_two_layers(name), [1, 0, 0]
    cache = KVCache(model, policy)
    kvsieve.read(model, PROMPTS[:2], cache, leave=2)
    cache.batch_select_indices(torch.tensor([1, 0]))
    cache.batch_select_indices(torch.tensor([0, 1, 1]))
    prompts, longest = [PROMPTS[row] for row in rows], len(PROMPTS[0])
    ids = torch.tensor([[0] * (longest - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in prompts])
    given = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    got = model.generate(ids, attention_mask=mask, past_key_values=cache, **given)
    assert torch.equal(got[:, longest:], run(prompts, policy))


@dataclass(frozen=True)
class CutsByMass(Policy):
    """Keeps the tokens that received most attention, the others' layers counted."""

    name: ClassVar[str] = "cuts_by_mass"
    keeps = 5
    overwrites = False
    observes = Observe.MASS
    columns = {"mass": torch.float32}

    def on_attend(self, kv, mass):
        kv["mass"] += mass

    def cut(self, kv):
        best = kv["mass"].topk(min(5, kv.slots_in_use), 2).indices
        return kv.live() & torch.zeros_like(kv.live()).scatter_(2, best, True)


@pytest.mark.parametrize("policy", [CutsByMass(), TIGHT["h2o"]], ids=lambda policy: policy.name)
def test_borrowed_slots_are_cut_when_all_have_read_them(policy):
    model = kvsieve.prepare(next(family for family in FAMILIES if family.name == "gemma3n").build())
    held = []
    for chunk in (None, 4):
        cache = KVCache(model, policy)
        kvsieve.read(model, [PROMPTS[0]], cache, leave=0, prefill_chunk=chunk)
        (layer,) = cache.policy_layers
        assert layer.kv.lengths.tolist() == [[policy.keeps] * 2]
        held.append(layer.kv.positions.tolist())
        by_hand = KVCache(model, policy)
        by_hand.expect_prompt(30)
        for first in range(0, 30, chunk or 30):
            model(torch.tensor([PROMPTS[0][first : first + (chunk or 30)]]), past_key_values=by_hand)
        # By hand, the prompt ends when the next forward begins; that is not counted either.
        assert one_step(model, cache).read == one_step(model, by_hand).read
        assert by_hand.policy_layers[0].kv.positions.tolist() == layer.kv.positions.tolist()
    assert held[0] == held[1]


def one_step(model, cache):
    with kvsieve.transfer.measure() as meter:
        model(torch.tensor([[5]]), past_key_values=cache)
    return meter


def test_a_document_is_read_once_and_asked_often():
    model, policy = tiny_llama(), make_policy("snapkv", budget=12, window=4)
    context, *questions = random_prompts(40, 5, 8, 3)
    cache = KVCache(model, policy)
    kvsieve.read(model, [context], cache, leave=0)
    assert int(cache.policy_layers[0].kv.lengths.max()) == 12
    answers = [run([question], cache=cache.clone()) for question in questions]
    again = [run([question], cache=cache.clone()) for question in questions]
    for first, second, question in zip(answers, again, questions, strict=True):
        assert torch.equal(first, second)
        clone = cache.clone()
        ids = torch.tensor([context + question])
        got = model.generate(ids, past_key_values=clone, max_new_tokens=6, do_sample=False)
        assert got[0, ids.shape[1] :].tolist() == first[0].tolist()
    together = cache.clone()
    together.batch_repeat_interleave(3)
    assert torch.equal(run(questions, cache=together), torch.cat(answers))
    cache.reset()
    assert torch.equal(run([context], cache=cache), run([context], policy))


def test_a_dense_document_is_continued_as_one_prompt():
    model, (context, question, answer) = tiny_llama(), random_prompts(30, 6, 4)
    cache = KVCache(model)
    kvsieve.read(model, [context], cache, leave=0)
    assert torch.equal(run([question], cache=cache.clone()), run([context + question]))
    (got,) = kvsieve.score(model, [question], [answer], cache=cache)
    (wanted,) = kvsieve.score(model, [context + question], [answer])
    torch.testing.assert_close(got, wanted, atol=1e-5, rtol=1e-5)


def test_the_tokens_that_continue_a_text_are_not_its_first():
    model, (context, question) = tiny_llama(), random_prompts(3, 20)
    cache = KVCache(model, make_policy("sirllm", sinks=1, surprising=60, decay=0.5))
    kvsieve.read(model, [context], cache, leave=0)
    before = [layer.kv["surprise"].clone() for layer in cache.policy_layers]
    run([question], cache=cache)
    for layer, surprise in zip(cache.policy_layers, before, strict=True):
        torch.testing.assert_close(layer.kv["surprise"][:, :, :3], surprise / 2)  # faded by one turn


# -------------------------------------------------------------------- refused before any work
@functools.cache
def windowed():
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        layer_types=["sliding_attention", "full_attention"],
        sliding_window=8,
        initializer_range=0.3,
    )
    return kvsieve.prepare(Gemma2ForCausalLM(config))


class Bad(Policy):
    def __init__(self, *passes):
        object.__setattr__(self, "passes", passes)

    def plan(self, segments):
        return self.passes


@pytest.mark.parametrize(
    ("passes", "complaint"),
    [
        ([Pass(0, 8)], "reads 8 of them"),
        ([Pass(0, 4), Pass(5, 9)], "goes on at token 5 in pass 1, where 4 were read"),
        ([Pass(0, 4, stays=False), Pass(0, 9)], "begins with a probe"),
        ([Pass(0, 10)], "has pass 0 over tokens 0 to 10"),
        ([Pass(0, 4), Pass(4, 9, room=0)], "room for 0 slots before pass 1"),
        ([Pass(0, 4), Pass(4, 9, before=((1,),))], "only a probe"),
        ([Pass(0, 4), Pass(4, 9, step=True)], "a decode step as pass 1"),
        (["all"], "must be a list of kvsieve.Pass"),
    ],
)
def test_a_plan_that_cannot_be_followed_is_refused(passes, complaint):
    with pytest.raises(UserError, match=complaint):
        kvsieve.decode(tiny_llama(), [PROMPTS[2]], Bad(*passes), max_new_tokens=2)


@pytest.mark.parametrize(
    ("segments", "complaint"),
    [
        ([[9]], "given for 1 rows, and there are 3 prompts"),
        ([[30], [17], [5, 5]], r"segments of prompt 2 are \[5, 5\]"),
        ([[30], [17, 0], [9]], r"segments of prompt 1 are \[17, 0\]"),
    ],
)
def test_segments_that_do_not_fit_are_refused(segments, complaint):
    with pytest.raises(UserError, match=complaint):
        kvsieve.decode(tiny_llama(), PROMPTS, max_new_tokens=2, segments=segments)


def test_what_cannot_be_read_so_is_refused():
    model = tiny_llama()
    linear = next(family for family in FAMILIES if family.name == "qwen3_next")
    other = kvsieve.prepare(linear.build())
    with pytest.raises(UserError, match="needs segments"):
        kvsieve.decode(model, PROMPTS, ReadsThenAsks(), max_new_tokens=2)
    with pytest.raises(UserError, match="cut at other passes"):
        kvsieve.decode(model, PROMPTS[:2], CutsEarly(), max_new_tokens=2)
    with pytest.raises(UserError, match="takes them back, and Qwen3NextForCausalLM has layers"):
        kvsieve.decode(other, PROMPTS, Planned(probe=2), max_new_tokens=2)
    with pytest.raises(UserError, match="rows of equal segments, or one at a time"):
        kvsieve.decode(other, PROMPTS, Planned(), max_new_tokens=2)
    with pytest.raises(UserError, match=r"kvsieve\.read"):
        model.generate(torch.tensor([PROMPTS[0]]), past_key_values=KVCache(model, Planned()))
    cache = KVCache(model)
    with pytest.raises(UserError, match="prompt 2 has 9 tokens"):
        kvsieve.read(model, PROMPTS, cache, leave=9)
    kvsieve.read(model, PROMPTS, cache, leave=0)
    with pytest.raises(UserError, match=r"already holds what kvsieve\.read has put there"):
        kvsieve.read(model, PROMPTS, cache)
    with pytest.raises(UserError, match="3 rows were read"):
        kvsieve.decode(model, PROMPTS[:2], cache=cache, max_new_tokens=2)
    with pytest.raises(UserError, match="has no segments"):
        kvsieve.decode(model, PROMPTS, cache=cache, max_new_tokens=2, segments=[[30], [17], [9]])
    with pytest.raises(UserError, match="256"):
        kvsieve.decode(model, PROMPTS, cache=cache, max_new_tokens=220)


@dataclass(frozen=True)
class CutsEarly(Policy):
    """Cuts behind the first four tokens, however long the prompt."""

    name: ClassVar[str] = "cuts_early"

    def plan(self, segments):
        size = sum(segments)
        passes = [Pass(first, min(first + 4, size)) for first in range(0, size, 4)]
        return [passes[0], passes[1]._replace(cut=True), *passes[2:]]


@pytest.mark.parametrize("plan", [Planned(), Planned(7), Planned(5, probe=3), Planned(9, probe=9)])
def test_layers_with_a_window_read_by_a_plan(plan):
    model = windowed()
    assert torch.equal(run(PROMPTS, plan, model), run(PROMPTS, None, model))
    chunked = run(PROMPTS, plan, model, prefill_chunk=3)
    assert torch.equal(chunked, run(PROMPTS, None, model))


@dataclass(frozen=True)
class KeepsBestAtPlaces(KeepsBest):
    """The same, at positions within the cache."""

    name: ClassVar[str] = "keeps_best_at_places"
    positions = Positions.CACHE


def test_probes_beyond_the_models_positions_are_refused():
    policy = make_policy("kvzip", repeat=(1, 2), sinks=1)
    model = tiny_llama()
    limit = model.config.max_position_embeddings
    prompt = random_prompts(limit // 2 + 20)[0]
    with pytest.raises(UserError, match=f"its probes included, and LlamaForCausalLM has {limit} positions"):
        kvsieve.decode(model, [prompt], policy, max_new_tokens=2)


def test_what_is_read_may_count_positions_within_the_cache():
    """One pass of many tokens over what is held, in a clone too: as one decode of the whole text."""
    model, policy, (context, question) = tiny_llama(), KeepsBestAtPlaces(8, room=12), random_prompts(24, 8)
    cache = KVCache(model, policy)
    kvsieve.read(model, [context], cache, leave=0)
    continued = [run([question], cache=each)[0].tolist() for each in (cache.clone(), cache.clone(), cache)]
    assert continued[0] == continued[1] == continued[2]
    together = run(PROMPTS, policy)
    for row, prompt in zip(together, PROMPTS, strict=True):
        assert torch.equal(row, run([prompt], policy)[0])


@pytest.mark.parametrize("policy", [Policy(), KeepsAcrossLayers()], ids=lambda policy: policy.name)
def test_beams_follow_what_was_read(policy):
    """The cache is repeated for them before, as for any conversation."""
    model, (prompt,) = tiny_llama(), random_prompts(20)
    ids = torch.tensor([prompt])
    how = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    cache = KVCache(model, policy)
    kvsieve.read(model, [prompt], cache)
    cache.batch_repeat_interleave(3)
    wanted = model.generate(ids, past_key_values=KVCache(model, policy), **how)
    assert torch.equal(model.generate(ids, past_key_values=cache, **how), wanted)


def test_rows_of_one_length_are_fed_without_a_mask(monkeypatch):
    """No padding, no work for it: as a whole, in pieces, in passes and where a text goes on."""
    model, prompts = tiny_llama(), random_prompts(20, 20)
    forward, masks = model.forward, []

    def watched(*args, attention_mask=None, **kwargs):
        masks.append(attention_mask)
        return forward(*args, attention_mask=attention_mask, **kwargs)

    monkeypatch.setattr(model, "forward", watched)
    cache = KVCache(model)
    run(prompts, prefill_chunk=7, max_new_tokens=2)
    run(prompts, Planned(probe=2), max_new_tokens=2)
    kvsieve.read(model, prompts, cache, leave=0)
    run(random_prompts(5, 5), cache=cache, max_new_tokens=2)
    assert masks == [None] * len(masks)
    run([prompts[0], prompts[1][:9]], max_new_tokens=1)
    assert masks[-1] is not None
