"""model.generate() with a policy: a feature agrees with the decode loop and stock, or is refused before any
work.
"""

import copy

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM, TextStreamer

import kvsieve
from kvsieve import KVCache, UserError, make_policy
from kvsieve.reference_model.tokenizer import byte_tokenizer
from tests.families.zoo import FAMILIES
from tests.models import random_prompts, tiny_llama
from tests.policies import of_two_layers

NAMES = ["dense", "sparq", "h2o", "local_window"]
NAMES += ["tova", "snapkv", "pyramidkv", "adakv", "expected_attention", "streaming_llm"]
# The others that need no plan: all of it is tried on them by `make slow`, and the essence always.
SLOWLY = ["duo_attention", "anllm", "quest", "double_sparsity", "loki", "twilight", "hip", "infllm"]
SLOWLY += ["refresh_sparq"]
POLICIES = {name: of_two_layers(name) for name in NAMES + SLOWLY}
# Nothing is left out: exactly dense. The anchors of anllm always leave something out.
ROOMY = {name: of_two_layers(name, "loose") for name in NAMES + SLOWLY if name != "anllm"}


def of_each(policies, slowly=SLOWLY):
    """Run a test under each of these policies."""
    marks = {name: pytest.mark.slow if name in slowly else () for name in policies}
    return pytest.mark.parametrize(
        "policy", [pytest.param(policy, marks=marks[name], id=name) for name, policy in policies.items()]
    )


each_policy, each_roomy_policy = of_each(POLICIES), of_each(ROOMY)
every_policy = of_each(POLICIES, ())


def of_each_but(*names):
    return of_each({name: policy for name, policy in POLICIES.items() if name not in names})


PROMPT = torch.tensor(random_prompts(13))
ROWS = random_prompts(13, 7, 10)
IDS = torch.tensor([[0] * (13 - len(row)) + row for row in ROWS])
MASK = torch.tensor([[0] * (13 - len(row)) + [1] * len(row) for row in ROWS])
RIGHT_IDS = torch.tensor([row + [0] * (13 - len(row)) for row in ROWS])
RIGHT_MASK = torch.tensor([[1] * len(row) + [0] * (13 - len(row)) for row in ROWS])


@pytest.fixture(scope="module")
def model():
    return tiny_llama()


@pytest.fixture(scope="module")
def windowed():
    return kvsieve.prepare(next(family for family in FAMILIES if family.name == "gemma2").build())


@pytest.fixture(scope="module")
def borrowing():
    return kvsieve.prepare(next(family for family in FAMILIES if family.name == "gemma3n").build())


def generate(model, ids, cache=None, **options):
    options = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0, **options}
    return model.generate(ids, past_key_values=cache, **options)


def log_probability(model, policy, sequences, prompt):
    """Of the new tokens of each sequence, fed one at a time through the decode path."""
    width = prompt.shape[1]
    starts, ends = [s[:width].tolist() for s in sequences], [s[width:].tolist() for s in sequences]
    return torch.stack([row.sum() for row in kvsieve.score(model, starts, ends, policy)])


# ---------------------------------------------------------------- greedy, sampling, several sequences, beams
@every_policy
def test_greedy_search_is_what_the_decode_loop_does(model, policy):
    got = generate(model, IDS, KVCache(model, policy), attention_mask=MASK)[:, 13:]
    assert torch.equal(got, torch.stack(list(kvsieve.decode(model, ROWS, policy, max_new_tokens=10)), 1))


@each_roomy_policy
def test_sampling_draws_what_stock_draws(model, policy):
    def draw(cache):
        torch.manual_seed(3)
        return generate(model, IDS, cache, attention_mask=MASK, do_sample=True, temperature=1.5, top_p=0.9)

    assert torch.equal(draw(KVCache(model, policy)), draw(None))


@each_policy
def test_every_sampled_sequence_of_a_prompt_follows_the_policy(model, policy):
    torch.manual_seed(3)
    out = generate(
        model,
        PROMPT,
        KVCache(model, policy),
        do_sample=True,
        temperature=2.0,
        num_return_sequences=3,
        output_logits=True,
        return_dict_in_generate=True,
    )
    new = out.sequences[:, 13:]
    assert len({tuple(row.tolist()) for row in new}) == 3
    logs = torch.stack(out.logits, 1).log_softmax(-1).gather(2, new[..., None]).sum((1, 2))
    torch.testing.assert_close(logs, log_probability(model, policy, out.sequences, PROMPT), atol=1e-4, rtol=0)


@each_roomy_policy
def test_beam_search_finds_what_stock_finds(model, policy):
    beams = {"num_beams": 3, "num_return_sequences": 2}
    got = generate(model, IDS, KVCache(model, policy), attention_mask=MASK, **beams)
    assert torch.equal(got, generate(model, IDS, attention_mask=MASK, **beams))


@every_policy
def test_beams_take_their_slots_along(model, policy):
    """A beam is worth what the policy gives its tokens: its columns and summaries moved with it."""
    out = generate(
        model,
        PROMPT,
        KVCache(model, policy),
        num_beams=4,
        num_return_sequences=4,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    expected = log_probability(model, policy, out.sequences, PROMPT)
    torch.testing.assert_close(out.sequences_scores, expected, atol=1e-4, rtol=0)


# ---------------------------------------------------------------- embeddings instead of tokens
@of_each_but("anllm")  # it goes by token ids, and says so
def test_embeddings_give_what_their_tokens_give(model, policy):
    embeds = model.get_input_embeddings()(IDS).detach()
    cache = KVCache(model, policy)
    got = generate(model, None, cache, inputs_embeds=embeds, attention_mask=MASK)
    assert torch.equal(got, generate(model, IDS, KVCache(model, policy), attention_mask=MASK)[:, 13:])
    whole = model.get_input_embeddings()(PROMPT).detach()
    got = generate(model, None, KVCache(model, policy), inputs_embeds=whole)
    assert torch.equal(got, generate(model, PROMPT, KVCache(model, policy))[:, 13:])


def test_embeddings_padded_on_the_right_or_in_chunks_are_refused_before_any_work(model, monkeypatch):
    embeds = model.get_input_embeddings()(RIGHT_IDS).detach()
    cache = KVCache(model)
    monkeypatch.setattr(model, "forward", lambda *_, **__: pytest.fail("work was done"))
    for ids in (None, RIGHT_IDS):
        with pytest.raises(
            UserError, match="padded on the right cannot come with inputs_embeds: pad on the left"
        ):
            generate(model, ids, cache, inputs_embeds=embeds, attention_mask=RIGHT_MASK)
    with pytest.raises(UserError, match="cannot read inputs_embeds in chunks: leave prefill_chunk_size out"):
        generate(model, None, cache, inputs_embeds=embeds, prefill_chunk_size=4)
    small = KVCache(model, make_policy("dense"), capacity=14)
    with pytest.raises(UserError, match="14"):
        generate(model, None, small, inputs_embeds=embeds)


# ---------------------------------------------------------------- caches that do not fit
def test_a_cache_with_fewer_layers_than_the_model_is_refused(model):
    fewer = copy.deepcopy(model.config)
    fewer.num_hidden_layers = 1
    cache = KVCache(kvsieve.prepare(LlamaForCausalLM(fewer)))
    with pytest.raises(UserError, match="the cache has 1 layers, and the model asks for layer 1"):
        generate(model, PROMPT, cache)


def test_a_cache_cannot_be_cropped(model):
    cache = KVCache(model)
    generate(model, PROMPT, cache)
    with pytest.raises(UserError, match="a KVCache cannot be cropped"):
        cache.crop(5)
    assert cache.get_seq_length() == 13 + 9


# ---------------------------------------------------------------- streaming
@each_policy
def test_streaming_gives_the_tokens_as_they_come(model, policy, capsys):
    tokenizer = byte_tokenizer()
    streamer = TextStreamer(tokenizer, skip_prompt=True)
    out = generate(model, PROMPT, KVCache(model, policy), streamer=streamer)
    assert capsys.readouterr().out.strip() == tokenizer.decode(out[0, 13:]).strip()


# ---------------------------------------------------------------- prefill in chunks
@pytest.mark.parametrize("chunk", [4, 5])  # 13 = 3 * 4 + 1: the last chunk looks like a decode step
@each_policy
def test_chunked_prefill_agrees_with_one_shot(model, policy, chunk):
    logits = {"output_logits": True, "return_dict_in_generate": True}
    whole = generate(model, IDS, KVCache(model, policy), attention_mask=MASK, **logits)
    cache = KVCache(model, policy)
    config = GenerationConfig(
        prefill_chunk_size=chunk, max_new_tokens=10, pad_token_id=0, do_sample=False, **logits
    )
    parts = model.generate(IDS, attention_mask=MASK, past_key_values=cache, generation_config=config)
    assert torch.equal(parts.sequences, whole.sequences)
    torch.testing.assert_close(torch.stack(parts.logits), torch.stack(whole.logits), atol=1e-5, rtol=0)
    if policy.keeps and policy.overwrites:
        budget = policy.keeps
        assert cache.policy_layers[0].slots.capacity == budget


# Data for two layers; a prompt that is read otherwise than dense; no keys that others borrow.
LEFT_OUT = {"duo_attention", "double_sparsity", "loki", "anllm", "infllm"}
# Always those that select, overwrite, cut, cut heads apart, and count positions within the cache.
ALWAYS = {"dense", "sparq", "h2o", "snapkv", "adakv", "streaming_llm"}


@pytest.mark.parametrize("name", ["windowed", "borrowing"])
@of_each({name: POLICIES[name] for name in POLICIES if name not in LEFT_OUT}, POLICIES.keys() - ALWAYS)
def test_chunks_agree_where_layers_have_windows_or_borrow_slots(request, name, policy):
    model = request.getfixturevalue(name)
    options = {"output_logits": True, "return_dict_in_generate": True}
    whole = generate(model, IDS, KVCache(model, policy), attention_mask=MASK, **options)
    stock = generate(model, IDS, attention_mask=MASK, **options)
    parts = generate(model, IDS, KVCache(model, policy), attention_mask=MASK, prefill_chunk_size=4, **options)
    torch.testing.assert_close(
        whole.logits[0], stock.logits[0], atol=1e-4, rtol=0
    )  # nothing evicted before all have read
    torch.testing.assert_close(torch.stack(parts.logits), torch.stack(whole.logits), atol=1e-4, rtol=0)
    looped = torch.stack(
        list(kvsieve.decode(model, ROWS, policy, max_new_tokens=10, eos_token_id=(), prefill_chunk=4)), 1
    )
    assert torch.equal(looped, whole.sequences[:, 13:])


# ---------------------------------------------------------------- a conversation on one cache
@every_policy
def test_a_call_is_the_sum_of_two(model, policy):
    whole = generate(model, IDS, KVCache(model, policy), attention_mask=MASK, max_new_tokens=12)
    cache = KVCache(model, policy)
    first = generate(model, IDS, cache, attention_mask=MASK, max_new_tokens=5)
    mask = torch.cat([MASK, torch.ones(3, 5, dtype=torch.int64)], 1)
    assert torch.equal(generate(model, first, cache, attention_mask=mask, max_new_tokens=7), whole)


@pytest.mark.parametrize("chunk", [None, 2])
@each_roomy_policy
def test_a_second_turn_continues_as_stock_does(model, policy, chunk):
    from transformers import DynamicCache

    def two_turns(cache, **options):
        first = generate(model, PROMPT, cache, max_new_tokens=5)
        said = torch.cat([first, torch.tensor([random_prompts(6, seed=9)[0]])], 1)
        return generate(model, said, cache, max_new_tokens=8, **options)

    if chunk and _transformers_before("5.23"):
        with pytest.raises(UserError, match="cannot continue on a cache in chunks"):
            two_turns(KVCache(model, policy), prefill_chunk_size=chunk)
        return
    expected = two_turns(DynamicCache(config=model.config))
    assert torch.equal(two_turns(KVCache(model, policy), prefill_chunk_size=chunk), expected)


@every_policy
def test_a_turn_is_evicted_when_it_is_complete(model, policy):
    def second_turn(**options):
        cache = KVCache(model, policy)
        first = generate(model, PROMPT, cache, max_new_tokens=5)
        said = torch.cat([first, torch.tensor([random_prompts(6, seed=9)[0]])], 1)
        out = generate(model, said, cache, output_logits=True, return_dict_in_generate=True, **options)
        layer = cache.policy_layers[0]
        assert layer.kv.seen.tolist() == [13 + 5 + 6 + 9]
        grown = 0 if policy.overwrites else 9
        assert (layer.kv.lengths <= (policy.keeps or 99) + grown).all()
        return torch.stack(out.logits)

    whole = second_turn()
    if not _transformers_before("5.23"):
        torch.testing.assert_close(second_turn(prefill_chunk_size=4), whole, atol=1e-5, rtol=0)


def _transformers_before(version):
    import transformers

    return tuple(map(int, transformers.__version__.split(".")[:2])) < tuple(map(int, version.split(".")))


def test_new_tokens_alone_will_do_with_a_mask_over_all(model):
    cache = KVCache(model)
    first = generate(model, PROMPT, cache, max_new_tokens=5)
    said = torch.cat([first, torch.tensor([random_prompts(6, seed=9)[0]])], 1)
    alone = copy.deepcopy(cache)
    expected = generate(model, said, cache)[:, said.shape[1] :]
    new = said[:, alone.get_seq_length() :]
    got = generate(model, new, alone, attention_mask=torch.ones_like(said))
    assert torch.equal(got[:, new.shape[1] :], expected)


class TestConversationsThatCannotGoOn:
    @pytest.fixture
    def cache(self, model):
        cache = KVCache(model, POLICIES["h2o"])
        generate(model, IDS, cache, attention_mask=MASK, max_new_tokens=4)
        return cache

    def test_another_prompt(self, model, cache):
        with pytest.raises(
            UserError, match=r"already holds 16 tokens a row, and only 13 were given.*new cache"
        ):
            generate(model, IDS, cache, attention_mask=MASK)

    def test_a_mask_that_hides_what_is_cached(self, model, cache):
        ids = torch.cat([IDS, IDS], 1)
        with pytest.raises(
            UserError, match=r"shows \[15, 15, 15\] earlier tokens a row, but \[16, 10, 13\] were cached"
        ):
            generate(
                model, ids, cache, attention_mask=torch.ones_like(ids).index_fill(1, torch.tensor([0]), 0)
            )
        mask = torch.ones(3, 20).index_fill(1, torch.tensor([0]), 0)
        with pytest.raises(UserError, match="cannot be masked out"):  # a plain forward asks too
            model(ids[:, :4], attention_mask=mask, past_key_values=cache)

    def test_padding_after_the_new_tokens(self, model, cache):
        ids = torch.cat([IDS, IDS[:, :5]], 1)
        mask = torch.cat([MASK, torch.tensor([[1, 1, 1, 1, 0]] * 3)], 1)
        with pytest.raises(UserError, match="pad the new tokens on the left"):
            generate(model, ids, cache, attention_mask=mask)

    def test_another_number_of_rows(self, model, cache):
        with pytest.raises(UserError, match=r"holds 3 rows, but 1 came.*batch_repeat_interleave"):
            model(PROMPT, past_key_values=cache)

    def test_padding_in_the_middle_of_linear_attention(self):
        model = kvsieve.prepare(next(each for each in FAMILIES if each.name == "qwen3_next").build())
        cache = KVCache(model)
        first = generate(model, RIGHT_IDS, cache, attention_mask=RIGHT_MASK)
        mask = torch.cat([RIGHT_MASK, torch.ones(3, 12, dtype=torch.int64)], 1)
        with pytest.raises(UserError, match="padding on the left only"):
            generate(model, torch.cat([first, first[:, :2]], 1), cache, attention_mask=mask)


# ---------------------------------------------------------------- padding on the right
@each_policy
def test_padding_on_the_right_gives_each_row_what_it_gets_alone(model, policy):
    ids, mask = RIGHT_IDS, RIGHT_MASK
    out = generate(
        model, ids, KVCache(model, policy), attention_mask=mask, num_beams=2, num_return_sequences=2
    )
    assert torch.equal(out[:, :13], ids.repeat_interleave(2, 0))  # the prompts as they were given
    for b, row in enumerate(ROWS):
        alone = torch.tensor([row])
        cache = KVCache(model, policy)
        real = torch.ones_like(alone)
        expected = generate(model, alone, cache, attention_mask=real, num_beams=2, num_return_sequences=2)
        assert torch.equal(out[2 * b : 2 * b + 2, 13:], expected[:, len(row) :])
    # without a mask, pad tokens are taken for padding, as transformers does
    marked = ids.masked_fill(mask == 0, 60)
    guessed = generate(model, marked, KVCache(model, policy), pad_token_id=60, eos_token_id=0)
    given = generate(
        model, marked, KVCache(model, policy), pad_token_id=60, eos_token_id=0, attention_mask=mask
    )
    assert torch.equal(guessed, given)


def test_padding_on_the_right_with_positions_is_refused(model):
    cache = KVCache(model)
    with pytest.raises(UserError, match="padded on the right cannot come with position_ids"):
        generate(
            model,
            RIGHT_IDS,
            cache,
            attention_mask=RIGHT_MASK,
            position_ids=torch.arange(13).expand(3, -1),
        )
    assert cache.get_seq_length() == 0


# ---------------------------------------------------------------- what cannot work
@each_policy
def test_assisted_decoding_is_refused_before_any_work(model, policy):
    cache = KVCache(model, policy)
    with pytest.raises(UserError, match=r"assisted decoding.*takes tokens back out of the cache"):
        generate(model, PROMPT, cache, prompt_lookup_num_tokens=2)
    with pytest.raises(UserError, match="assisted decoding"):
        generate(model, PROMPT, cache, assistant_model=tiny_llama(kv_heads=4))
    assert cache.get_seq_length() == 0


def test_a_cache_without_room_is_refused_before_any_work(model):
    cache = KVCache(model, capacity=20)
    with pytest.raises(UserError, match=r"holds 20 tokens a row \(capacity\), and 21 are needed"):
        generate(model, PROMPT, cache, max_new_tokens=9)
    assert cache.get_seq_length() == 0
    assert generate(model, PROMPT, cache, max_new_tokens=8).shape == (1, 21)  # the last token is never fed


def test_a_copied_model_generates_by_itself(model):
    twin = copy.deepcopy(model)
    assert twin.generate.__self__ is twin
    assert torch.equal(generate(twin, PROMPT, KVCache(twin)), generate(model, PROMPT, KVCache(model)))
