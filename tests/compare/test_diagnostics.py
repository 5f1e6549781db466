"""`diagnose:` in a comparison: samples beside dense attention, apart from what is measured."""

import json

import pytest
import torch
from rich.console import Console
from tests.policies import of_two_layers

import kvsieve
from kvsieve import UserError
from kvsieve.compare import code, config, diagnostics, run, samples
from kvsieve.compare.execute import diagnose as executed
from kvsieve.compare.tasks import Needle, Perplexity, Sample

NUMBERS = ("mass", "recall", "error", "tail")
PLAIN = """\
tasks:
  - needle: {context: 120, samples: 2}
policies:
  - dense
  - sparq: {compression: 1/4}
  - h2o: {compression: 1/4}
"""
DIAGNOSED = f"diagnose: {{steps: 3, samples: 2}}\n{PLAIN}"


def by_policy(folder):
    """The lines of diagnostics.jsonl, by task and policy."""
    entries = {entry["cell"]: entry for entry in json.loads((folder / "cells.json").read_text())}
    return {
        (entries[cell]["task"], entries[cell]["policy"]): records
        for cell, records in diagnostics.read(folder).items()
    }


@pytest.fixture
def asked(monkeypatch):
    """The policies that are asked for a diagnosis, in order; `asked.fails` raises."""
    real = executed.diagnose

    class Asked(list):
        fails = ""

        def __call__(self, model, prompts, policy, **options):
            self.append(policy.name)
            if policy.name == self.fails:
                raise RuntimeError("out of memory")
            return real(model, prompts, policy, **options)

    noted = Asked()
    monkeypatch.setattr(executed, "diagnose", noted)
    return noted


@pytest.fixture(scope="module")
def run_again(model, model_folder, tmp_path_factory):
    """Runs a comparison of the tiny model, always into the same folder; what it prints is in `console`."""
    place = tmp_path_factory.mktemp("diagnosed")

    def run_again(text):
        (place / "test.yaml").write_text(f"model: {model_folder}\n{text}")
        run_again.console = Console(record=True, width=200, file=open("/dev/null", "w"))  # noqa: SIM115
        return run.compare(config.load(place / "test.yaml"), place / "out", run_again.console, model)

    return run_again


@pytest.fixture(scope="module")
def measured(run_again):
    """The files of a run that was not asked for diagnostics."""
    folder = run_again(PLAIN).folder
    assert not (folder / "diagnostics.jsonl").exists()
    return {name: (folder / name).read_bytes() for name in ("samples.jsonl", "protocol.json", "summary.csv")}


@pytest.fixture(scope="module")
def folder(run_again, measured):
    """Of the same run, with diagnostics added."""
    return run_again(DIAGNOSED).folder


def test_every_policy_is_diagnosed_on_every_task(folder):
    found = by_policy(folder)
    assert [*found] == [("needle", "dense"), ("needle", "sparq"), ("needle", "h2o")]
    for (_, policy), records in found.items():
        assert [record["sample"] for record in records] == [0, 1]
        for record in records:
            assert (record["steps"], record["layers"]) == (3, [0, 1])
            numbers = torch.tensor([record[name] for name in NUMBERS])
            assert numbers.shape == (4, 2, 2)
            if policy == "dense":
                assert (numbers == torch.tensor([1.0, 1, 0, 0])[:, None, None]).all()
            else:
                assert numbers[0].max() < 1
                assert numbers[2].min() > 0


def test_what_is_measured_does_not_know_of_it(folder, measured):
    assert {name: (folder / name).read_bytes() for name in measured} == measured
    assert "kvsieve.diagnostics" not in code.framework_files()


def test_it_continues_where_it_stopped_and_a_failure_costs_its_own_cell_alone(folder, run_again, asked):
    whole = (folder / "diagnostics.jsonl").read_bytes()
    # Torn in the middle of the last line, as by a kill.
    (folder / "diagnostics.jsonl").write_bytes(whole[:-20])
    run_again(DIAGNOSED)
    assert asked == ["h2o"]
    assert (folder / "diagnostics.jsonl").read_bytes() == whole
    # Other steps are other numbers.
    asked.fails = "sparq"
    outcome = run_again(DIAGNOSED.replace("steps: 3", "steps: 2"))
    assert asked[1:] == ["dense", "sparq", "h2o", "dense", "h2o"]
    assert outcome.failures == {}
    assert {(policy, r["steps"]) for (_, policy), records in by_policy(folder).items() for r in records} == {
        ("dense", 2), ("sparq", 3), ("h2o", 2)
    }  # fmt: skip
    said = run_again.console.export_text()
    assert "no diagnostics of needle 120, sparq 1/4: RuntimeError: out of memory" in said
    assert "diagnostics of needle 120, sparq 1/4" in (folder / "errors.txt").read_text()
    (folder / "diagnostics.jsonl").write_bytes(whole)


def test_the_numbers_are_those_of_the_python_function(folder, model):
    sample = Needle(context=120).sample(model.tokenizer, 0, 1)
    policy = kvsieve.make_policy("h2o", compression="1/4", head_size=16, context=120)
    found = kvsieve.diagnose(model, [sample.prompt], policy, steps=3)
    record = by_policy(folder)["needle", "h2o"][1]
    for name in NUMBERS:
        wanted = getattr(found, name)[0].mean(0)
        torch.testing.assert_close(torch.tensor(record[name]), wanted, atol=1e-5, rtol=0)


def test_a_question_after_the_prompt_is_asked_when_the_policy_has_decided(compare, model):
    text = """\
        diagnose: {steps: 3, samples: 1}
        tasks:
          - needle: {context: 150, samples: 1, question: after}
        policies: [{snapkv: {budget: 40, window: 8}}]
        """
    ((record,),) = by_policy(compare(text).folder).values()
    sample = Needle(context=150, question="after").sample(model.tokenizer, 0, 0)
    prompt, question, policy = (
        [sample.prompt],
        [sample.questions[0]],
        kvsieve.make_policy("snapkv", budget=40, window=8),
    )
    found = kvsieve.diagnose(model, prompt, policy, steps=3, questions=question)
    at_once = kvsieve.diagnose(model, [[*prompt[0], *question[0]]], policy, steps=3)
    torch.testing.assert_close(torch.tensor(record["mass"]), found.mass[0].mean(0), atol=1e-5, rtol=0)
    assert (found.mass[0].mean(0) - at_once.mass[0].mean(0)).abs().max() > 1e-4


# The policies of a line need the same of a prefill.
READ_ALIKE = [
    ["dense", "sparq", "local_window", "quest", "streaming_llm"],
    ["h2o"],
    ["infllm"],
    ["snapkv", "adakv"],
]
BY_A_PLAN = "citrus"


def test_a_prompt_is_prefilled_once_for_policies_that_need_the_same_of_it(model):
    sample = Needle(context=120).sample(model.tokenizer, 0, 0)
    prefills = []

    def note(module, args, inputs):
        prefills.append(inputs["input_ids"].shape[1] == 120)

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    question = executed.Question(model, sample, config.Diagnose(steps=2))
    names = [*(name for line in READ_ALIKE for name in line), BY_A_PLAN]
    found = {name: question.diagnosis(of_two_layers(name)) for name in names}
    hook.remove()
    assert sum(prefills) == 1 + len(READ_ALIKE)  # one for dense attention's answer
    for name, shared in found.items():
        alone = kvsieve.diagnose(
            model, question.prompts, of_two_layers(name), answers=question.answers, segments=question.segments
        )
        for number in NUMBERS:
            torch.testing.assert_close(getattr(shared, number), getattr(alone, number))


def test_a_text_to_be_scored_is_fed_as_it_is(model):
    sample = Perplexity(context=120, tokens=8).sample(model.tokenizer, 0, 0)
    question = executed.Question(model, sample, config.Diagnose(steps=3))
    assert question.answers == [sample.forced[:4]]


def test_an_answer_of_one_token_has_no_step(model):
    sample = Sample([5, 6, 7], ["x"], new_tokens=1)
    assert executed.Question(model, sample, config.Diagnose(steps=3)).diagnosis(kvsieve.Policy()) is None


def test_samples_without_steps_are_kept_and_not_shown(tmp_path):
    line = {"cell": "a", "sample": 0, "method": "m", "steps": 0, "layers": []} | {
        name: [] for name in NUMBERS
    }
    with samples.Store(tmp_path / "diagnostics.jsonl", diagnostics.Fields) as store:
        store.append([line])
    assert samples.read(tmp_path / "diagnostics.jsonl", diagnostics.Fields) == [line]
    assert diagnostics.read(tmp_path) == {}


def test_the_terminal_has_a_line_for_every_policy(folder):
    console = Console(record=True, width=100, file=open("/dev/null", "w"))  # noqa: SIM115
    diagnostics.show(folder, console)
    lines = [line.split() for line in console.export_text().splitlines()]
    assert ["dense", "1.000", "1.000", "0.000", "0.000"] in lines
    assert [line[:2] for line in lines if "1/4" in line] == [["sparq", "1/4"], ["h2o", "1/4"]]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("8", r":2:11: diagnose: must be `key: value` pairs or null \(got 8\)"),
        ("{steps: 0}", r":2:19: diagnose.steps: must be an integer from 1 to 65536 \(got 0\)"),
        ("{stepz: 4}", r":2:19: diagnose.stepz: unknown key 'stepz'; did you mean 'steps'\?"),
        ("{samples: true}", r"diagnose.samples: must be an integer from 1 to 1000000 \(got True\)"),
        ("{}\ntensor_parallel: true", "needs all heads of the model in one process"),
    ],
)
def test_mistakes_are_named_in_their_place(load, given, message):
    with pytest.raises(UserError, match=message):
        load(f"diagnose: {given}\ntasks: [needle]\npolicies: [dense]\n")


def test_without_numbers_it_takes_eight_steps_of_four_samples(load):
    checked = load("diagnose: {}\ntasks: [needle]\npolicies: [dense]\n")
    assert checked.settings.diagnose.model_dump() == {"steps": 8, "samples": 4}
    assert "diagnose: {steps: 8, samples: 4}" in checked.resolved()
