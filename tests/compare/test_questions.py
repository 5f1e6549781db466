"""Questions after the text was cut, several of one text, and conversations, as a comparison measures them."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

import kvsieve
from kvsieve import make_policy
from kvsieve.compare.cells import Cell
from kvsieve.compare.execute.cell import Measurement
from kvsieve.compare.execute.speed import Stopwatch
from kvsieve.compare.tasks import Conversation, KeyValue, Needle

INDEXES = [0, 1, 2]


def measured(model, task, policy):
    samples = [task.sample(model.tokenizer, 0, index) for index in INDEXES]
    return samples, Measurement(model, Cell("0", task, policy, None)).batch(INDEXES, samples)


@pytest.mark.parametrize(
    "policy", [make_policy("dense"), make_policy("sparq", r=8, k=32, local=8)], ids=["dense", "sparq"]
)
@pytest.mark.parametrize("task", [Needle(200), KeyValue(150)], ids=lambda task: task.name)
def test_who_keeps_everything_answers_the_same_before_and_after(model, task, policy):
    _, inside = measured(model, task, policy)
    _, outside = measured(model, dataclasses.replace(task, question="after"), policy)
    for a, b in zip(inside, outside, strict=True):
        assert a["answer"] == b["answer"] != ""
        assert (a["references"], a["facts"], a["prompt_end"]) == (
            b["references"],
            b["facts"],
            b["prompt_end"],
        )
        assert (a["bytes_read"], a["kv_bytes"]) == (b["bytes_read"], b["kv_bytes"])


def test_several_questions_are_asked_of_one_cut_text_each_of_a_copy(model):
    task, policy = Needle(300, question="after", questions=3), make_policy("snapkv", budget=48, window=8)
    samples, records = measured(model, task, policy)
    for sample, record in zip(samples, records, strict=True):
        wanted = []
        for question in sample.questions:
            cache = kvsieve.KVCache(model, policy)
            kvsieve.read(model, [sample.prompt], cache, leave=0)
            tokens = kvsieve.decode(model, [list(question)], max_new_tokens=7, cache=cache, eos_token_id=[])
            wanted.append(model.tokenizer.decode([int(token) for token in tokens]))
        assert record["answer"].split(" | ") == [text[:7] for text in wanted]
        assert record["steps"] == 3 * 6
        # Two layers, two heads of 16 channels, keys and values in float32: the text is gone.
        assert record["kv_bytes"] < 2 * 2 * 2 * 16 * 4 * (48 + 80)


def test_a_conversation_is_read_turn_by_turn(model):
    task, policy = Conversation(480, turns=6, told=2), make_policy("sirllm", surprising=150)
    samples, records = measured(model, task, policy)
    cache = kvsieve.KVCache(model, policy)
    kvsieve.read(
        model, [sample.prompt for sample in samples], cache, segments=[sample.segments for sample in samples]
    )
    held = cache.policy_layers[0].kv.lengths
    assert int(held.max()) == 4 + 150 - 1  # with the last turn, less the token that is left
    dense = measured(model, task, make_policy("dense"))[1]
    assert records[0]["kv_bytes"] < dense[0]["kv_bytes"] / 2


def test_a_plan_finds_room_for_its_probes_in_a_comparison(model):
    _, records = measured(model, Needle(200), make_policy("kvzip", ratio=0.5, repeat=(1, 2), go_on=(1, 2)))
    assert all(record["bytes_read"] < 0.8 * record["bytes_dense"] for record in records)


def test_rounds_never_begin_where_an_earlier_question_stood():
    def decode():
        cache = SimpleNamespace(checkpoint=list)
        return SimpleNamespace(
            runner=SimpleNamespace(cache=cache, mask=None), state=SimpleNamespace(positions=torch.zeros(1))
        )

    watch, first, second = Stopwatch(), decode(), decode()
    for step in range(3):
        watch.passed(step, first, 5)
    watch.passed(0, second, 5)  # all answers end with their first token
    assert watch.measure(second) == []
