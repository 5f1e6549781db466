"""Measurements of a cell do not depend on how its steps are run."""

import gc
import weakref

import pytest

from kvsieve.cache.slots import Slots
from kvsieve.compare import cells
from kvsieve.compare.execute.cell import Measurement

CONFIG = """\
    tasks:
      - needle: {context: 120, samples: 5}
      - perplexity: {context: 120, samples: 5, tokens: 12}
    policies: [sparq: {compression: 1/4}, h2o: {compression: 1/4}]
    """
VARY = {"tokens_per_second", "score"}


def records(model, cell, eager):
    measurement = Measurement(model, cell, eager)
    found = []
    for indexes in ([0, 1], [2, 3], [4]):
        samples = [cell.task.sample(model.tokenizer, 0, index) for index in indexes]
        found += measurement.batch(indexes, samples)
    same = [{name: value for name, value in record.items() if name not in VARY} for record in found]
    return same, [record["score"] for record in found]


def test_batches_of_a_cell_share_a_captured_step(recorded, load, model):
    for number, cell in enumerate(cells.expand(load(CONFIG), model), start=1):
        (got, scores), (wanted, eager_scores) = (records(model, cell, eager) for eager in (False, True))
        assert got == wanted
        assert scores == pytest.approx(eager_scores, rel=1e-5)  # constant shapes are summed in another order
        # The last batch has one row less; each size is captured with the meter and, for the speed, without.
        assert recorded.captured == 2 * 2 * number


def test_speed_is_that_of_decode_steps_alone(load, model, monkeypatch):
    cell = cells.expand(load(CONFIG), model)[0]
    times = iter(range(1000))
    monkeypatch.setattr("time.perf_counter", lambda: float(next(times)))  # a second between any two looks
    samples = [cell.task.sample(model.tokenizer, 0, index) for index in (0, 1)]
    (record, _) = Measurement(model, cell).batch([0, 1], samples)
    assert record["tokens_per_second"] == pytest.approx([2, 2, 2])  # two rows, a second a step; three rounds


def test_a_measured_cell_holds_no_storage_of_its_batch(load, model, monkeypatch):
    """A unit keeps the measurements of all its cells; on a CPU the storage of each would add up."""
    made: list[weakref.ref[Slots]] = []
    allocate = Slots.allocate
    monkeypatch.setattr(
        Slots, "allocate", lambda self, *a: (made.append(weakref.ref(self)), allocate(self, *a))
    )
    cell = cells.expand(load(CONFIG), model)[0]
    measurement = Measurement(model, cell)
    measurement.batch([0, 1], [cell.task.sample(model.tokenizer, 0, index) for index in (0, 1)])
    gc.collect()
    assert len(made) >= model.config.num_hidden_layers
    assert not any(slots() for slots in made)
