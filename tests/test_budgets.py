"""At a budget a method holds that share of dense attention's memory, or reads so many tokens whole."""

from fractions import Fraction

import pytest
import torch
from safetensors.torch import save_file

from kvsieve import UserError, make_policy, plugins, transfer
from kvsieve.cache.layer import LayerCache
from kvsieve.entries import MEMORY, TOKENS, budgets, fields
from kvsieve.specs import read_policy, with_parameters
from kvsieve.testing import rollout

SIZE, CONTEXT, HEADS = 64, 512, 4
# The turns of a conversation, the last one a question of 64 tokens, for those that go by them.
SEGMENTS = {"sirllm": [[224, 224, 64]], "citrus": [[448, 64]]}
INSIDE = {"twilight": {"inner": "quest", "p": 1.0}, "refresh": {"inner": "sparq"}}
# Tokens read at the first step for `tokens: 100`, where it is another number: 1 that was generated comes on
# top; Quest's pages of 16, the newest with one token; InfLLM leaves 8 for those that fill no block yet, which
# are 5 here, and rounds; Refresh leaves 7 for those that come until it searches again.
READ = {
    **dict.fromkeys(["snapkv", "pyramidkv", "adakv", "expected_attention", "kvzip", "citrus", "sirllm"], 101),
    "quest": 81, "twilight": 81, "infllm": 97, "refresh": 93,
}  # fmt: skip


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """Parameters that stand beside a budget, by policy: files for one layer, and what is inside."""
    folder = tmp_path_factory.mktemp("files")
    channels = torch.arange(SIZE).expand(HEADS, SIZE).short().contiguous()
    basis = torch.eye(SIZE).expand(HEADS, -1, -1).clone()
    save_file({"layers.0.channels": channels, "layers.0.basis": basis}, folder / "calibration")
    save_file({"layers.0.retrieval": torch.tensor([[0.9], [0.2], [0.1], [0.3]])}, folder / "scores")
    files = {"calibration": str(folder / "calibration"), "full_heads": str(folder / "scores")}

    def of(name):
        known = fields(plugins.policy_class(name))
        return {field: path for field, path in files.items() if field in known} | INSIDE.get(name, {})

    return of


def asked(kind):
    found = plugins.policies().items()
    return [name for name, one in found if one.plugin == "builtin" and kind in budgets(one.cls)]


def run(name, budget, beside, steps=1):
    """The layer after the prompt and the meter, `steps` steps on."""
    spec = read_policy(with_parameters(name, budget | beside(name)))
    policy = spec.build(SIZE, CONTEXT)
    random = torch.Generator().manual_seed(0)

    def normal(heads):
        return torch.randn(1, heads, CONTEXT + steps, SIZE, generator=random).bfloat16()

    prompt, step = normal(8).split([CONTEXT, steps], 2)
    surprise = torch.rand(1, CONTEXT + steps, generator=random)
    layer = LayerCache(policy.for_layer(0, 1))
    with transfer.measure() as meter:
        rollout(
            policy, prompt, step, normal(HEADS), normal(HEADS), layer=layer, rope_theta=10_000.0,
            segments=SEGMENTS.get(name), surprise=surprise,
        )  # fmt: skip
    return layer, meter


@pytest.mark.parametrize("name", [name for name in asked(MEMORY) if name != "dense"])
def test_the_memory_after_the_prompt_is_the_share_that_was_asked_for(name, beside):
    layer, _ = run(name, {"memory": "1/4"}, beside)
    # Where the cache grows, one token has come since.
    grown = 0 if layer.policy.overwrites and layer.policy.keeps else 1
    (held,) = layer.memory_by_row(torch.tensor([CONTEXT + grown]))
    share = held / (2 * CONTEXT * SIZE * 2 * HEADS)
    expected = 0.25 + grown / CONTEXT
    if name == "duo_attention":  # heads are full or not: here one of four, the others hold 16 tokens
        expected = (CONTEXT + grown + 3 * 16) / (4 * CONTEXT)
    assert 0.98 * expected <= share <= expected


@pytest.mark.parametrize("name", asked(TOKENS))
def test_a_step_reads_as_many_tokens_as_were_asked_for(name, beside):
    _, meter = run(name, {"tokens": 100}, beside)
    read = meter.by_kind["values"] / (2 * SIZE * HEADS)
    rounding = 1 if name == "adakv" else 0  # of every head's share
    assert read == pytest.approx(READ.get(name, 100), abs=rounding)


def test_refresh_stays_within_its_tokens_until_it_searches_again(beside):
    _, meter = run("refresh", {"tokens": 100}, beside, steps=8)
    assert meter.by_kind["values"] / (2 * SIZE * HEADS) == sum(range(93, 101))


@pytest.mark.parametrize(
    ("name", "given", "message"),
    [
        ("sparq", {"memory": "1/4"},
         "sparq cannot be asked for memory: it keeps every token; its budgets: compression, tokens; its pa"),
        ("twilight", {"memory": "1/4", "inner": "quest"}, "twilight cannot be asked for memory; its budgets"),
        ("duo_attention", {"tokens": 64}, "duo_attention cannot be asked for tokens; its budgets: comp"),
        ("anllm", {"tokens": 64, "anchors": [1]}, "anllm cannot be asked for tokens; its parameters: anch"),
        ("dense", {"memory": "1/2"}, "dense attention keeps everything: its memory is 1, not 0.5"),
        ("dense", {"tokens": 64}, "dense cannot be asked for tokens"),
        ("h2o", {"memory": "1/4", "tokens": 64}, "h2o.tokens: stands beside memory: one budget at a time"),
        ("h2o", {"memory": 2}, "must be a fraction of dense attention's memory, above 0 and up to 1"),
        ("h2o", {"tokens": 0.5}, "h2o.tokens: must be a number of tokens, an integer of at least 1"),
        ("h2o", {"tokens": True}, "h2o.tokens: must be a number of tokens"),
        ("h2o", {"memories": 2}, "unknown parameter of h2o 'memories'; did you mean 'memory'"),
        ("h2o", {"memory": "1/1000"},
         "h2o holds 260 of dense attention's 131072 bytes at least: the smallest memory here is 1/504$"),
        ("quest", {"tokens": 9}, "tokens 9 at context 512: quest reads whole pages: at least 16 tokens are"),
        ("loki", {"tokens": 1}, "loki reads at least 2 tokens: its k of 1 is a share"),
        ("infllm", {"tokens": 16}, "at least 17 tokens"),
        ("citrus", {"tokens": 64}, "citrus counts its instruction of 64 tokens: at least 65 are needed"),
        ("refresh", {"tokens": 7, "inner": "sparq"},
         "refresh reads 7 tokens that come between two searches: give 8"),
        ("twilight", {"tokens": 64, "inner": "dense"}, "dense cannot be asked for tokens"),
        ("twilight", {"tokens": 64, "inner": {"quest": {"compression": "1/4"}}},
         "twilight and twilight.inner have a budget each, tokens 64 and 1/4: give one of them"),
    ],
    ids=str,
)  # fmt: skip
def test_what_a_policy_cannot_do_is_said_before_any_work(name, given, message):
    with pytest.raises(UserError, match=message):
        make_policy(name, **given, head_size=SIZE, context=CONTEXT)


@pytest.mark.parametrize(("name", "tokens"), [("infllm", 17), ("refresh", 8), ("quest", 16), ("citrus", 65)])
def test_the_fewest_tokens_that_an_error_names_can_be_had(name, tokens, beside):
    make_policy(name, tokens=tokens, head_size=SIZE, context=CONTEXT, **beside(name))


def test_parameters_beside_a_budget_are_kept():
    policy = make_policy("quest", tokens=100, page=10, head_size=SIZE, context=CONTEXT)
    assert (policy.pages, policy.page) == (10, 10)
    policy = make_policy("streaming_llm", memory="1/4", sinks=8, head_size=SIZE, context=CONTEXT)
    assert (policy.budget, policy.sinks) == (120, 8)  # 128, less 8 first keys of 256 bytes
    layers = make_policy(
        "dense_layers", layers=[0], inner={"h2o": {"tokens": 64}}, head_size=SIZE, context=CONTEXT
    )
    assert layers.inner.budget == 64
    assert make_policy("h2o", memory=Fraction(1, 4), head_size=SIZE, context=CONTEXT).budget == 126
