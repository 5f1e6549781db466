"""AnLLM and SirLLM reproduce numbers from their authors' code and papers (tests/data/README.md)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig, LlamaForCausalLM

import kvsieve
from kvsieve import KVCache, UserError, make_policy
from kvsieve.loop import Runner

DATA = Path(__file__).parent / "data" / "seeds"


class Given:
    """A file of the oracle: its tensors by name, what they were made with, and the model."""

    def __init__(self, name):
        with safe_open(DATA / f"{name}.safetensors", "pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            metadata = file.metadata()
        self.methods = json.loads(metadata["methods"])
        model = LlamaForCausalLM(LlamaConfig(**json.loads(metadata["config"])))
        weights = {k.removeprefix("w/"): v.float() for k, v in self.tensors.items() if k.startswith("w/")}
        model.load_state_dict(weights)
        self.model = kvsieve.prepare(model)

    def __getitem__(self, name):
        return self.tensors[name]


@pytest.fixture(scope="module")
def anllm():
    return Given("anllm")


PROMPT, ANCHOR = 36, 5
ANLLM = make_policy("anllm", anchors=[ANCHOR])
trained = pytest.mark.filterwarnings("ignore:anllm hides")


@trained
@pytest.mark.parametrize("chunk", [None, 26, 7, 1])
def test_anllm(anllm, chunk):
    ids, wanted = anllm["ids"].tolist(), anllm["paper/logits"]
    runner = Runner(anllm.model, [ids[:PROMPT]], ANLLM, len(ids) - PROMPT, chunk)
    got = [runner.prefill()[0]]
    for place in range(PROMPT, len(ids)):
        got.append(runner.run(torch.tensor([ids[place]]), torch.tensor([place]))[0])
    torch.testing.assert_close(torch.stack(got), wanted, atol=1e-4, rtol=1e-4)


@trained
def test_anllm_in_a_ragged_batch(anllm):
    """Row 0 is the oracle's; row 1 begins elsewhere, where it gets what it gets alone."""
    ids, wanted = anllm["ids"].tolist(), anllm["paper/logits"]
    other = ids[20:]
    together = Runner(anllm.model, [ids[:PROMPT], other[:25]], ANLLM, 15)
    alone = Runner(anllm.model, [other[:25]], ANLLM, 15)
    both, single = together.prefill(), alone.prefill()
    for step in range(15):
        torch.testing.assert_close(both[0], wanted[step], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(both[1], single[0], atol=1e-4, rtol=1e-4)
        tokens = torch.tensor([ids[PROMPT + step], other[25 + step]])
        both = together.run(tokens, torch.tensor([PROMPT + step, 25 + step]))
        single = alone.run(tokens[1:], torch.tensor([25 + step]))


@trained
def test_anllm_holds_what_its_authors_hold(anllm):
    lengths = anllm["pieces"].cumsum(0).tolist()
    for number, length in enumerate(lengths):
        cache = KVCache(anllm.model, ANLLM)
        anllm.model(anllm["ids"][None, :length], past_key_values=cache)
        for layer in cache.policy_layers:
            held = anllm[f"authors_asan/kept{number:02}"].long().expand(1, 2, -1)
            assert torch.equal(layer.kv.positions, held)


@trained
def test_anllm_through_generate_and_turn_after_turn(anllm):
    """A second turn sees what the first one left, generated anchors included, and no more."""
    model, ids = anllm.model, anllm["ids"].tolist()
    cache, batch = KVCache(model, ANLLM), torch.tensor([ids[:20], ids[30:50]])
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    first = model.generate(batch, past_key_values=cache, **how)
    decoded = torch.stack(list(kvsieve.decode(model, batch, ANLLM, max_new_tokens=6, eos_token_id=[])), 1)
    assert torch.equal(first[:, 20:], decoded)
    batch = torch.cat([first, torch.tensor([ids[50:], ids[:10]])], 1)
    second = model.generate(batch, past_key_values=cache, **how)
    assert second.shape == (2, 42)
    fresh = torch.stack(list(kvsieve.decode(model, batch, ANLLM, max_new_tokens=6, eos_token_id=[])), 1)
    assert torch.equal(second[:, 36:], fresh)  # an anchor's and a token's sight do not depend on turns


def test_anllm_says_that_a_model_must_be_trained_for_it(anllm):
    with pytest.warns(UserWarning, match="only a checkpoint that was trained for it"):
        KVCache(anllm.model, ANLLM)
    with pytest.raises(UserError, match="the model's token ids are 0 to 95"):
        KVCache(anllm.model, make_policy("anllm", anchors=[96]))
    with pytest.raises(UserError, match="anchors must be token ids, at least one"):
        make_policy("anllm", anchors=[])


@trained
def test_token_ids_are_needed_and_embeddings_have_none(anllm):
    embeds = anllm.model.get_input_embeddings()(anllm["ids"][None, :8])
    with pytest.raises(UserError, match="goes by the ids of tokens, and inputs_embeds have none"):
        anllm.model(inputs_embeds=embeds, past_key_values=KVCache(anllm.model, ANLLM))


# -------------------------------------------------------------------- SirLLM
@pytest.fixture(scope="module")
def sirllm():
    return Given("sirllm")


class Turns:
    """The first turns of the oracle's conversation, and the policy of a case."""

    def __init__(self, given, case, turns):
        params = given.methods["cases"][case]
        self.policy = make_policy(
            "sirllm",
            sinks=params["start_size"],
            surprising=params["token_entropy_size"],
            recent=params["recent_size"],
            decay=params["decay"],
        )
        self.segments = given.methods["turns"][:turns]
        self.prompt = torch.cat([given[f"turn{turn}"] for turn in range(turns)]).tolist()


TURNS, STEPS = 7, 10


def check_last(given, case, turn, logits, cache, row=0):
    wanted = f"{case}/paper/turn{turn}"
    torch.testing.assert_close(logits[row], given[f"{wanted}/last_logits"], atol=1e-4, rtol=1e-4)
    for layer in cache.policy_layers:
        for head in range(2):
            length = int(layer.kv.lengths[row, head])
            scores = layer.kv["surprise"][row, head, :length]
            torch.testing.assert_close(scores, given[f"{wanted}/scores"], atol=1e-4, rtol=1e-4)
            before = len(given[f"{wanted}/kept"])
            held = layer.kv.positions[row, head, :before]
            assert held.tolist() == given[f"{wanted}/kept"].tolist()


@pytest.mark.parametrize("chunk", [None, 5])
@pytest.mark.parametrize("case", ["plain", "decay"])
def test_sirllm(sirllm, case, chunk):
    """Checks what is kept before each turn, the scores after it, and the tokens that follow the last one."""
    for turn in range(TURNS):
        talk = Turns(sirllm, case, turn + 1)
        runner = Runner(sirllm.model, [talk.prompt], talk.policy, STEPS, chunk, segments=[talk.segments])
        check_last(sirllm, case, turn, runner.prefill(), runner.cache)
    made = kvsieve.decode(
        sirllm.model, [talk.prompt], talk.policy, max_new_tokens=STEPS, prefill_chunk=chunk,
        segments=[talk.segments], eos_token_id=[],
    )  # fmt: skip
    assert torch.cat(list(made)).tolist() == sirllm[f"{case}/paper/tokens"].tolist()


@pytest.mark.parametrize("case", ["plain", "decay"])
def test_sirllm_in_a_ragged_batch_of_conversations_of_more_and_fewer_turns(sirllm, case):
    talks = [Turns(sirllm, case, turns) for turns in (7, 3, 5)]
    runner = Runner(
        sirllm.model, [t.prompt for t in talks], talks[0].policy, STEPS, segments=[t.segments for t in talks]
    )
    logits = runner.prefill()
    for row, turns in enumerate((7, 3, 5)):
        check_last(sirllm, case, turns - 1, logits, runner.cache, row)
    for step in range(1, STEPS):
        logits = runner.run(logits.argmax(1), runner.sizes + step - 1)
        wanted = sirllm[f"{case}/paper/logits"][step]
        torch.testing.assert_close(logits[0], wanted, atol=2e-4, rtol=1e-4)


def test_sirllm_counts_what_was_generated_by_its_surprise_too(sirllm):
    """A step's token has -log P of the logits that it was chosen from."""
    talk = Turns(sirllm, "plain", 2)
    runner = Runner(sirllm.model, [talk.prompt], talk.policy, STEPS, segments=[talk.segments])
    logits = runner.prefill()
    for step in range(3):
        token = logits.argmax(1)
        wanted = -logits.log_softmax(1)[0, token]
        logits = runner.run(token, runner.sizes + step)
        kv = runner.cache.policy_layers[1].kv
        torch.testing.assert_close(kv["surprise"][0, :, len(talk.prompt) + step], wanted.expand(2))


def test_sirllm_through_generate_once_the_conversation_is_read(sirllm):
    talk = Turns(sirllm, "plain", 7)
    cache = KVCache(sirllm.model, talk.policy)
    with pytest.raises(UserError, match="reads a prompt by a plan"):
        sirllm.model.generate(torch.tensor([talk.prompt]), past_key_values=cache, max_new_tokens=2)
    cache.reset()
    kvsieve.read(sirllm.model, [talk.prompt], cache, segments=[talk.segments])
    made = sirllm.model.generate(
        torch.tensor([talk.prompt]), past_key_values=cache, max_new_tokens=STEPS, do_sample=False,
        eos_token_id=None,
    )  # fmt: skip
    assert made[0, len(talk.prompt) :].tolist() == sirllm["plain/paper/tokens"].tolist()
    assert int(cache.policy_layers[0].kv.lengths[0, 0]) == 64 + STEPS - 1


def test_logits_come_as_they_were_asked_for(sirllm):
    """The policy reads those of the whole prompt; the caller gets the last ones."""
    talk = Turns(sirllm, "plain", 1)
    cache, dense = KVCache(sirllm.model, talk.policy), sirllm.model(torch.tensor([talk.prompt])).logits
    kvsieve.read(sirllm.model, [talk.prompt[:20]], cache, leave=0)
    rest = torch.tensor([talk.prompt[20:]])
    got = sirllm.model(rest, past_key_values=cache, logits_to_keep=3).logits
    torch.testing.assert_close(got, dense[:, -3:], atol=1e-4, rtol=1e-4)
    said = -dense[0, :-1].log_softmax(1).gather(1, torch.tensor(talk.prompt[1:])[:, None])[:, 0]
    torch.testing.assert_close(cache.policy_layers[0].kv["surprise"][0, 0, 1:], said, atol=1e-4, rtol=1e-4)


def test_sirllm_refuses_what_makes_no_sense():
    for wrong in ({"sinks": -1}, {"surprising": 0}, {"recent": -2}, {"decay": 0.0}, {"decay": 1.5}):
        with pytest.raises(UserError, match=f"sirllm.{next(iter(wrong))} must be"):
            make_policy("sirllm", **wrong)
