"""A comparison from its configuration to its summary, on a tiny model."""

import csv
import dataclasses
import json
import math
import textwrap
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
import yaml

import kvsieve
from kvsieve import UserError, plugins, transfer
from kvsieve.compare import cells, code, samples, weights
from kvsieve.compare.execute import speed
from kvsieve.compare.execute.cell import Measurement
from kvsieve.compare.tasks import Needle, Perplexity

SMALL = """\
    batch_size: 2
    tasks:
      - needle: {context: [120, 160], samples: 3}
      - perplexity: {context: 120, samples: 2, tokens: 8}
    policies:
      - dense
      - sparq: {compression: 1/4}
      - h2o: {compression: 1/4}
    """


def lines(folder):
    with (folder / "summary.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_run_writes_all_that_it_promises(compare):
    outcome = compare(SMALL)
    assert outcome.failures == {}
    rows = lines(outcome.folder)
    promised = {
        "model", "task", "context", "policy", "parameters", "budget", "score", "score_low", "score_high",
        "samples", "bytes_per_step", "bytes_ratio", "kv_bytes", "slots_per_head", "tokens_per_second",
        "ran_eagerly",
    }  # fmt: skip
    assert promised <= set(rows[0])
    assert [(r["task"], r["context"], r["policy"]) for r in rows] == [
        (task, context, policy)
        for task, context in (("needle", "120"), ("needle", "160"), ("perplexity", "120"))
        for policy in ("dense", "sparq", "h2o")
    ]
    assert [r["budget"] for r in rows[:3]] == ["", "1/4", "1/4"]
    assert [r["samples"] for r in rows] == ["3"] * 6 + ["2"] * 3
    assert {r["higher_is_better"] for r in rows[:6]} == {"true"}
    assert {r["metric"] for r in rows[6:]} == {"bits per byte"}
    for row in rows:
        assert float(row["score_low"]) <= float(row["score"]) <= float(row["score_high"])
        assert float(row["tokens_per_second"]) > 0
    environment = json.loads((outcome.folder / "environment.json").read_text())
    assert {"torch", "cpu", "threads", "gpu", "git_commit", "started", "weights"} <= environment.keys()
    again = yaml.safe_load((outcome.folder / "config.yaml").read_text())
    assert again["dtype"] == "float32"
    assert "perplexity: bits per byte (lower is better)" in (outcome.folder / "summary.md").read_text()
    assert "24/24 samples" in compare.console.export_text()


def test_bytes_are_those_of_the_paper_per_step_and_sequence(compare):
    rows = lines(compare(SMALL).folder)
    # Dense attention reads keys and values of every token: 2 layers x 1 KV head x 2 x 16 x float32. A step
    # with context c attends to c + 1 tokens, the next one to c + 2; 7 characters take 6 decode steps.
    token = 2 * 1 * 2 * 16 * 4
    assert float(rows[0]["bytes_per_step"]) == pytest.approx(token * (120 + 3.5), rel=1e-4)
    assert float(rows[6]["bytes_per_step"]) == pytest.approx(token * (120 + 4), rel=1e-4)
    assert [float(r["bytes_ratio"]) for r in rows[::3]] == [1, 1, 1]
    assert all(0.2 < float(r["bytes_ratio"]) < 0.3 for r in rows if r["policy"] != "dense")
    assert float(rows[0]["kv_bytes"]) == token * (120 + 7)
    assert float(rows[2]["kv_bytes"]) < 0.3 * float(rows[0]["kv_bytes"])
    assert [float(row["slots_per_head"]) for row in rows[:3]] == [120 + 6, 120 + 6, 30]


def test_nothing_is_measured_twice_and_more_samples_are_added(compare):
    first = samples.read(compare(SMALL).folder / "samples.jsonl")
    again = compare(SMALL)
    assert samples.read(again.folder / "samples.jsonl") == first
    assert f"{len(first)} samples are already in" in compare.console.export_text()
    more = compare(SMALL.replace("samples: 3", "samples: 4"))
    found = samples.read(more.folder / "samples.jsonl")
    assert found[: len(first)] == first
    assert len(found) == len(first) + 6


def test_another_configuration_in_the_folder_keeps_the_old_samples_and_shows_its_own(compare):
    first = compare(SMALL)
    kept = samples.read(first.folder / "samples.jsonl")
    other = compare("""\
        batch_size: 2
        tasks: [needle: {context: 160, samples: 3}]
        policies: [local_window: {compression: 1/4}, dense]
        """)
    assert [(r["context"], r["policy"]) for r in lines(other.folder)] == [
        ("160", "local_window"),
        ("160", "dense"),
    ]
    found = samples.read(other.folder / "samples.jsonl")
    assert found[: len(kept)] == kept
    assert len(found) == len(kept) + 3


def test_ids_depend_on_all_that_results_depend_on_and_on_nothing_else(load, model):
    def ids(text):
        return [cell.id for cell in cells.expand(load(text), model)]

    base = "tasks: [needle: {context: 120, samples: 3}]\npolicies: [sparq: {r: 4, k: 16, local: 4}]\n"
    same = "policies: [sparq: {local: 4, k: 16, r: 4}]\ntasks: [needle: {samples: 9, context: 120}]\n"
    assert ids(base) == ids(base) == ids(same)
    others = [
        base.replace("120", "121"),
        base.replace("k: 16", "k: 17"),
        base.replace("needle: {", "needle: {distractors: 1, "),
        base + "seed: 1\n",
        base + "eager: true\n",
    ]
    assert len({ids(text)[0] for text in [base, *others]}) == 6
    assert ids(base + "batch_size: 2\n") == ids(base)


def test_other_weights_are_another_protocol(model, model_folder):
    other = kvsieve.load(str(model_folder))
    assert weights.weights_digest(other) == weights.weights_digest(model)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight += 1e-3
    assert weights.weights_digest(other) != weights.weights_digest(model)


def test_an_edited_policy_gets_new_results(tmp_path, monkeypatch):
    source = "import kvsieve\nclass P(kvsieve.Policy):\n    name = 'p'\n"
    digests = []
    monkeypatch.syspath_prepend(tmp_path)
    for name, text in (("edited_once", source), ("edited_twice", source + "    def extra(self): pass\n")):
        (tmp_path / f"{name}.py").write_text(text)
        digests += code.class_files(__import__(name).P).values()
    assert len(digests) == 2
    assert digests[0] != digests[1]


@dataclasses.dataclass(frozen=True)
class Broken(kvsieve.Policy):
    """Fails at its third decode step of a layer."""

    name: ClassVar[str] = "broken"

    def select(self, query, kv):
        if int(kv.seen.max()) > 122:
            raise RuntimeError("the third step")


def test_rows_of_an_earlier_run_are_not_lost_without_a_word(compare):
    first = compare(
        "tasks: [needle: {context: 120, samples: 1}]\npolicies: [dense, h2o: {budget: 20, recent: 5}]\n"
    )
    with pytest.raises(
        UserError,
        match="out holds another comparison, of which nothing is asked for here: 2 rows, such as needle 120, "
        "dense. Give a folder of its own .--out., or remove this one",
    ):
        compare("tasks: [needle: {context: 121, samples: 1}]\npolicies: [dense]\n")
    assert [row["policy"] for row in lines(first.folder)] == ["dense", "h2o"]
    compare("tasks: [needle: {context: 120, samples: 2}]\npolicies: [dense]\n")
    said = compare.console.export_text()
    assert "1 of the 2 rows that" in said
    assert "are not asked for now, such as needle 120, h2o budget=20 recent=5: their samples are kept" in said
    compare("tasks: [needle: {context: 120, samples: 1}]\npolicies: [dense, h2o: {budget: 20, recent: 5}]\n")
    assert "not asked for now" not in compare.console.export_text()
    assert [row["policy"] for row in lines(first.folder)] == ["dense", "h2o"]


def test_a_failing_cell_is_reported_and_the_others_finish(compare, monkeypatch):
    known = plugins.policies() | {"broken": plugins.Registered("broken", Broken, "x", "x", "1")}
    monkeypatch.setattr(plugins, "policies", lambda: known)
    outcome = compare("""\
        tasks: [needle: {context: 120, samples: 2}]
        policies: [broken, dense]
        """)
    assert list(outcome.failures.values()) == ["RuntimeError: the third step"]
    assert [(r["policy"], r["error"]) for r in lines(outcome.folder)] == [
        ("broken", "RuntimeError: the third step"),
        ("dense", ""),
    ]
    assert "failed: needle 120, broken: RuntimeError: the third step" in compare.console.export_text()
    assert "## Failed\n\n- needle 120, broken: RuntimeError" in (outcome.folder / "summary.md").read_text()
    assert "in select" in (outcome.folder / "errors.txt").read_text()


@pytest.mark.parametrize(
    ("task", "policy", "message"),
    [
        ("needle: {context: 600}", "dense", "3:9: tasks.0.needle: context 600 needs 607 positions with its "
         "answer, and the model has 512: the longest context here is 505"),
        ("needle: {context: 40}", "dense", "3:9: tasks.0.needle: needle needs a context of at least"),
        ("needle: {context: 120}", "sparq: {r: 17}", "4:12: policies.0.sparq: .*17.*16"),
        ("needle: {context: 120}", "sparq: {compression: 1/8, k: 0}",
         "4:12: policies.0.sparq: .*k must be at least 1"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_do_is_refused_before_any_work(compare, tmp_path, task, policy, message):
    with pytest.raises(UserError, match=message):
        compare(f"\ntasks: [{task}]\npolicies: [{policy}]\n")
    assert not (tmp_path / "out" / "samples.jsonl").exists()


def test_perplexity_on_the_decode_path_is_that_of_a_plain_forward(compare, model):
    outcome = compare("""\
        tasks: [perplexity: {context: 100, samples: 2, tokens: 12}]
        policies: [dense, dense_layers: {layers: [0, 1], inner: h2o}]
        """)
    task = Perplexity(100, tokens=12)
    expected = []
    for i in range(2):
        sample = task.sample(model.tokenizer, 0, i)
        ids = torch.tensor([[*sample.prompt, *sample.forced]])
        with torch.no_grad():
            chances = torch.log_softmax(model(ids).logits[0, 99:-1], -1)
        bits = -chances.gather(1, ids[0, 100:, None]).sum().item() / math.log(2)
        expected.append(bits / len(sample.reference.encode()))
    for row in lines(outcome.folder):
        assert float(row["score"]) == pytest.approx(sum(expected) / 2, rel=1e-4)


LISTENING = """
import pathlib
import kvsieve

@kvsieve.hookimpl
def run_started(folder, cells):
    pathlib.Path(folder, "started.txt").write_text(str(len(cells)))
    cells.clear()

@kvsieve.hookimpl
def run_finished(folder, summary):
    pathlib.Path(folder, "finished.txt").write_text(str(len(summary)))
    raise RuntimeError("nobody at home")
"""


def test_hooks_of_plugins_are_called_and_may_fail(compare, install):
    install("listening", LISTENING)
    outcome = compare("tasks: [needle: {context: 120, samples: 1}]\npolicies: [dense]\n")
    assert [(outcome.folder / name).read_text() for name in ("started.txt", "finished.txt")] == ["1", "1"]
    assert len(lines(outcome.folder)) == 1
    failed = "plugin 'listening' of listening 1.0 (listening) failed in run_finished: RuntimeError: nobody"
    assert failed in compare.console.export_text()


def test_eager_cells_are_cells_of_their_own(compare):
    text = SMALL.replace("samples: 3", "samples: 1")
    first = samples.read(compare(text).folder / "samples.jsonl")
    outcome = compare("eager: true\n" + textwrap.dedent(text))
    assert len(samples.read(outcome.folder / "samples.jsonl")) == 2 * len(first)
    assert yaml.safe_load((outcome.folder / "config.yaml").read_text())["eager"] is True


def test_an_interruption_keeps_what_was_measured(compare, tmp_path, monkeypatch):
    measured = Measurement.batch

    def interrupted(measurement, *given):
        if measurement.cell.policy.name == "sparq":
            raise KeyboardInterrupt
        return measured(measurement, *given)

    monkeypatch.setattr(Measurement, "batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        compare(SMALL)
    assert len(samples.read(tmp_path / "out" / "samples.jsonl")) == 2
    monkeypatch.undo()
    assert compare(SMALL).failures == {}


def test_a_score_that_is_not_a_number_fails_its_cell_by_name(compare, monkeypatch):
    monkeypatch.setattr(Needle, "score", lambda self, sample, answer: math.nan)
    outcome = compare("""\
        tasks: [needle: {context: 120, samples: 1}, perplexity: {context: 120, samples: 1, tokens: 4}]
        policies: [dense]
        """)
    assert list(outcome.failures.values()) == ["ArithmeticError: the score of sample 0 is nan"]
    assert [(row.task, row.error) for row in outcome.rows] == [
        ("needle", "ArithmeticError: the score of sample 0 is nan"),
        ("perplexity", ""),
    ]


def test_a_log_probability_that_is_not_a_number_fails_its_cell_by_name(compare, model):
    def infinite(module, inputs, logits):
        logits[..., 3] = math.inf  # no NaN yet: the logarithm of the softmax has them

    hook = model.lm_head.register_forward_hook(infinite)
    try:
        outcome = compare("""\
            tasks: [perplexity: {context: 120, samples: 1, tokens: 4}]
            policies: [dense]
            """)
    finally:
        hook.remove()
    assert list(outcome.failures.values()) == ["ArithmeticError: a log-probability of sample 0 is nan"]


def test_speeds_are_taken_without_the_meter_and_bytes_with_it(compare, monkeypatch):
    meters = []
    step = speed._round

    def watched(*arguments):
        meters.append(transfer.current())
        return step(*arguments)

    monkeypatch.setattr(speed, "_round", watched)
    with transfer.measure() as outside:
        outcome = compare(SMALL)
    found = samples.read(outcome.folder / "samples.jsonl")
    assert set(meters) == {outside}  # not the one of the comparison
    assert len(meters) == 3 * len({(r["cell"], *r["tokens_per_second"]) for r in found})
    assert {r["steps"] for r in found} == {6, 7}  # of the answers alone


@pytest.mark.parametrize(("takes", "steps"), [(0.001, 6), (0.02, 3), (9.0, 1)])
def test_a_round_has_fewer_steps_where_they_take_long(monkeypatch, takes, steps):
    clock, made = [0.0], []

    class Steps:
        runner = SimpleNamespace(model=SimpleNamespace(device=None))
        state = SimpleNamespace(tokens=[0, 0, 0], status=torch.zeros(3))

        def advance(self):
            made.append(clock[0])
            clock[0] += takes

    monkeypatch.setattr(speed, "_now", lambda device: clock[0])
    monkeypatch.setattr(speed, "_go_back", lambda decoding, place: None)
    assert speed._round(Steps(), None, 6) == pytest.approx(3 / takes)
    assert len(made) == steps
