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
