"""The policies of a task are measured together: prompts are prefilled once, and nothing else changes."""

import dataclasses
from typing import ClassVar

import pytest
import torch

import kvsieve
from kvsieve import contract
from kvsieve.compare import cells
from kvsieve.compare.cells import Cell
from kvsieve.compare.execute import Failed, Measured, Unit, batch, units
from kvsieve.compare.execute.batch import batch_size
from kvsieve.compare.execute.cell import Measurement
from kvsieve.compare.execute.ray import _length, _parts
from kvsieve.compare.execute.unit import measure_unit
from kvsieve.compare.tasks import Perplexity
from kvsieve.recording import Recording

CONFIG = """\
    batch_size: 2
    tasks: [{task}]
    policies:
      - dense
      - sparq: {{compression: 1/4}}
      - snapkv: {{compression: 1/4}}
      - h2o: {{compression: [1/2, 1/4]}}
      - citrus: {{compression: 1/2, instruction: 8}}
    """
TASKS = [
    "needle: {context: 120, samples: 3}",
    "needle: {context: 120, samples: 3, question: after}",
    "perplexity: {context: 120, samples: 3, tokens: 8}",
]


@pytest.fixture
def prefills(model):
    """How many tokens a row each prefill of the model had."""
    sizes = []

    def note(_, args, given):
        if given["input_ids"].shape[1] > 1:
            sizes.append(given["input_ids"].shape[1])

    hook = model.register_forward_pre_hook(note, with_kwargs=True)
    yield sizes
    hook.remove()


def without_times(records):
    return [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in records]


def measured(model, settings, unit):
    """The records of each cell, and the cells that failed."""
    found, failures = {cell.id: [] for cell in unit.cells}, {}
    for event in measure_unit(model, settings, unit):
        if isinstance(event, Measured):
            found[event.cell.id] += event.records
        elif isinstance(event, Failed):
            failures[event.cell.id] = event.reason
    return {name: without_times(records) for name, records in found.items()}, failures


@pytest.mark.parametrize("task", TASKS)
def test_cells_that_share_a_prefill_are_measured_as_if_alone(load, model, prefills, task):
    config = load(CONFIG.format(task=task))
    found = cells.expand(config, model)
    (unit,) = units(found, {cell.id: [0, 1, 2] for cell in found})
    together, failures = measured(model, config.settings, unit)
    assert failures == {}
    shared = [size for size in prefills if size > 60]
    assert len(shared) == 2 * 2  # a batch: one with attention weights, one without; citrus reads in pieces
    for cell in found:
        measurement, alone = Measurement(model, cell), []
        for indexes in ([0, 1], [2]):
            samples = [cell.task.sample(model.tokenizer, 0, i) for i in indexes]
            alone += measurement.batch(indexes, samples)
        assert together[cell.id] == without_times(alone)


def test_each_cell_measures_the_samples_that_it_misses(load, model, prefills):
    config = load(CONFIG.format(task=TASKS[2]))
    dense, sparq, *_ = found = cells.expand(config, model)
    missing = {cell.id: [] for cell in found} | {dense.id: [0, 2], sparq.id: [2]}
    (unit,) = units(found, missing)
    assert unit.cells == [dense, sparq]
    together, _ = measured(model, config.settings, unit)
    assert [record["sample"] for record in together[dense.id]] == [0, 2]
    assert [record["sample"] for record in together[sparq.id]] == [2]


@dataclasses.dataclass(frozen=True)
class Broken(kvsieve.Policy):
    """Fails when a prompt ends."""

    name: ClassVar[str] = "broken"

    def on_prefill(self, kv):
        raise RuntimeError("no luck")


@dataclasses.dataclass(frozen=True)
class Doubles(kvsieve.Policy):
    """Attends to other keys than the model's."""

    name: ClassVar[str] = "doubles"

    def on_append(self, kv, new):
        kv.write_keys(new.slots, 2 * new.keys)


def unit_of(*policies, samples=3):
    task = Perplexity(120, samples, tokens=4)
    found = [Cell(policy.name, task, policy, None) for policy in policies]
    return Unit(found, {cell.id: [*range(samples)] for cell in found})


def test_a_policy_that_fails_spoils_its_own_rows_alone(load, model):
    settings = load("batch_size: 2\ntasks: [needle]\npolicies: [dense]\n").settings
    sparq = kvsieve.make_policy("sparq", r=4, k=16, local=4)
    together, failures = measured(model, settings, unit_of(Broken(), kvsieve.Policy(), sparq))
    assert failures == {"broken": "RuntimeError: no luck"}
    assert {name: len(records) for name, records in together.items()} == {"broken": 0, "dense": 3, "sparq": 3}


class Nonsense(kvsieve.Policy):
    """Shapes and types are right; `answer(kv)` gives slots and counts."""

    name: ClassVar[str] = "nonsense"

    def select(self, query, kv):
        return kvsieve.Selection(*self.answer(kv))


class OutOfRange(Nonsense):
    def answer(self, kv):
        return torch.full((*kv.lengths.shape, 2), 10_000), torch.ones_like(kv.lengths)


class CountsTooFar(Nonsense):
    def answer(self, kv):
        return torch.zeros((*kv.lengths.shape, 2), dtype=torch.long), torch.full_like(kv.lengths, 3)


class RanksAtTheEndAlone(kvsieve.Policy):
    """Ranks the prompt, and then no more."""

    name: ClassVar[str] = "nonsense"
    keeps = 8

    def priority(self, kv):
        ended = kv.seen[:, None, None] > 120
        return kv.positions.masked_fill(ended, 0) / ~ended  # 0 / 0


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (OutOfRange, "layer 0: select chose slot 10000 in row 0, KV head 0, whose live slots are 0 to 120"),
        (CountsTooFar, "layer 0: select counts 3 slots in row 0, KV head 0, expected 0 to S = 2"),
        (RanksAtTheEndAlone, "layer 0: priority is NaN in row 0, KV head 0, slot 0; a number is needed"),
    ],
)
def test_a_policy_that_answers_nonsense_fails_with_what_is_wrong(load, model, kind, message):
    settings = load("batch_size: 2\ntasks: [needle]\npolicies: [dense]\n").settings
    broken = dataclasses.dataclass(frozen=True)(kind)()
    found, failures = measured(model, settings, unit_of(broken, kvsieve.Policy()))
    assert failures.keys() == {"nonsense"}
    assert f"policy nonsense, {message}" in failures["nonsense"]
    assert len(found["dense"]) == 3
    assert not found["nonsense"]


def test_only_first_answers_are_looked_at(load, model, monkeypatch):
    settings = load("batch_size: 2\ntasks: [needle]\npolicies: [dense]\n").settings
    looks, look = [], contract.answers._check_chosen
    monkeypatch.setattr(
        contract.answers, "_check_chosen", lambda *given: (looks.append(given[0]), look(*given))
    )
    sparq = kvsieve.make_policy("sparq", r=4, k=16, local=4)
    measured(model, settings, unit_of(sparq, samples=4))
    assert looks == [f"policy sparq, layer {n}: select" for n in range(model.config.num_hidden_layers)]


def test_where_the_shared_prefill_fails_every_cell_reads_by_itself(load, model, monkeypatch):
    def fail(*_):
        raise RuntimeError("no memory")

    settings = load("batch_size: 2\ntasks: [needle]\npolicies: [dense]\n").settings
    unit = unit_of(kvsieve.Policy(), kvsieve.make_policy("sparq", r=4, k=16, local=4))
    wanted = measured(model, settings, unit)
    monkeypatch.setattr(Recording, "__init__", fail)
    assert measured(model, settings, unit) == wanted


def test_a_policy_that_changes_keys_reads_by_itself(load, model, prefills):
    settings = load("batch_size: 2\ntasks: [needle]\npolicies: [dense]\n").settings
    together, failures = measured(model, settings, unit_of(kvsieve.Policy(), Doubles()))
    assert failures == {}
    assert len(prefills) == 2 * 2
    alone, _ = measured(model, settings, unit_of(Doubles()))
    assert together["doubles"] == alone["doubles"]
    assert together["doubles"][0]["score"] != together["dense"][0]["score"]


def test_a_unit_is_shared_out_in_whole_batches():
    unit = unit_of(kvsieve.Policy(), Broken())._replace(missing={"dense": [0, 1, 2, 5, 6], "broken": [1, 7]})
    parts = list(_parts(unit, 2, 2))
    assert [part.missing for part in parts] == [
        {"dense": [0, 1, 2, 5], "broken": [1]},
        {"dense": [6], "broken": [7]},
    ]
    assert [part.missing for part in _parts(unit, 1, 4)] == [unit.missing]
    assert [part.samples for part in _parts(unit, 9, 1)] == [[0], [1], [2], [5], [6], [7]]


def test_a_long_prompt_outweighs_a_long_answer_under_policies_that_read_by_themselves():
    def length(context, new_tokens, samples=3):
        unit = unit_of(kvsieve.Policy(), Broken(), samples=samples)
        found = [dataclasses.replace(cell, task=Perplexity(context)) for cell in unit.cells]
        new = dict.fromkeys((cell.id for cell in found), new_tokens)
        return _length(Unit(found, {cell.id: [*range(samples)] for cell in found}), new)

    assert length(2048, 7) > length(1024, 40) > length(1024, 7)
    assert length(1024, 7, samples=6) == 2 * length(1024, 7)


@pytest.fixture
def memory(monkeypatch, model):
    """Memory for so many rows of a policy, by its name; and the batches that were measured or tried."""
    rows, tried, measure = {}, [], Measurement._batch

    def batch(measurement, indexes, samples, recording):
        name = measurement.cell.policy.name
        tried.append((name, indexes, recording is not None))
        if len(indexes) > rows.get(name, 9):
            measurement.cache = kvsieve.KVCache(model, measurement.cell.policy)
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore.")
        return measure(measurement, indexes, samples, recording)

    monkeypatch.setattr(Measurement, "_batch", batch)
    return rows, tried


def test_a_batch_that_does_not_fit_into_memory_is_measured_in_halves(load, model, memory):
    rows, tried = memory
    settings = load("batch_size: 4\ntasks: [needle]\npolicies: [dense]\n").settings
    unit = unit_of(kvsieve.Policy(), kvsieve.make_policy("sparq", r=4, k=16, local=4), samples=6)
    wanted, _ = measured(model, settings, unit)
    tried.clear()
    rows["sparq"] = 1
    found, failures = measured(model, settings, unit)
    assert failures == {}
    assert [(each, shared) for name, each, shared in tried if name == "sparq"] == [
        ([0, 1, 2, 3], True),
        ([0, 1, 2, 3], False),  # the recording was let go
        ([0, 1], False),
        *(([index], False) for index in range(6)),
    ]
    assert [(each, shared) for name, each, shared in tried if name == "dense"] == [
        ([0, 1, 2, 3], True), ([4, 5], True)
    ]  # fmt: skip
    for name in found:
        assert [record["score"] for record in found[name]] == pytest.approx(
            [record["score"] for record in wanted[name]], rel=1e-5
        )
    assert [record["rows"] for record in found["sparq"]] == [1] * 6


def test_a_row_that_does_not_fit_into_memory_fails_its_cell_alone(load, model, memory):
    memory[0]["sparq"] = 0
    settings = load("batch_size: 4\ntasks: [needle]\npolicies: [dense]\n").settings
    sparq = kvsieve.make_policy("sparq", r=4, k=16, local=4)
    found, failures = measured(model, settings, unit_of(sparq, kvsieve.Policy()))
    assert failures == {
        "sparq": "out of memory with a single row, a prompt of 120 tokens: choose a shorter context, a "
        "smaller dtype or another device (CUDA out of memory. Tried to allocate 2 GiB.)"
    }
    assert len(found["dense"]) == 3


@pytest.mark.parametrize(("row_fits", "rows"), [(0.2, 1), (1, 1), (7.9, 4), (8, 8), (1e6, batch.MOST)])
def test_an_automatic_batch_takes_half_of_the_free_memory(load, model, monkeypatch, row_fits, rows):
    settings = load("batch_size: auto\ntasks: [needle]\npolicies: [dense]\n").settings
    unit = unit_of(kvsieve.Policy(), kvsieve.make_policy("h2o", budget=8, recent=2))
    config = model.config
    token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
    row = 2.5 * token * (120 + 4)  # the shared prefill, and a cache with keys twice
    monkeypatch.setattr(batch, "free_memory", lambda device: 2 * row_fits * row)
    assert batch_size(settings, model, unit.cells, dict.fromkeys(unit.missing, 4)) == rows
    settings = load("batch_size: 5\ntasks: [needle]\npolicies: [dense]\n").settings
    assert batch_size(settings, model, unit.cells, {}) == 5
