"""Rounds, ratios and the flush."""

import pytest
import torch

from kvsieve.bench import timing

CPU = torch.device("cpu")


def test_everything_is_timed_once_a_round_and_nobody_is_always_first(monkeypatch):
    monkeypatch.setattr(timing, "MOST_ROUNDS", 4)
    calls = []
    measures = {name: lambda name=name: calls.append(name) or float(len(calls)) for name in "abc"}
    times = timing.interleave(measures, seconds=60, warm_up=0)
    rounds = [calls[i : i + 3] for i in range(0, 12, 3)]
    assert len(calls) == 12
    assert all(sorted(one) == ["a", "b", "c"] for one in rounds)
    assert len({one[0] for one in rounds}) > 1
    assert all(len(values) == 4 for values in times.values())


def test_time_that_has_run_out_still_gives_the_least_number_of_rounds(monkeypatch):
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 3)
    monkeypatch.setattr(timing, "MOST_ROUNDS", 50)
    assert len(timing.interleave({"a": lambda: 1.0}, seconds=0)["a"]) == 3


def test_a_slow_round_does_not_move_a_paired_ratio():
    ours, dense = [1.0, 10.0, 1.0, 1.0], [3.0, 30.0, 3.0, 3.0]
    assert timing.ratio(ours, dense) == 3
    assert timing.ratio(ours, [6.0], paired=False) == 6


def test_the_summary_keeps_the_spread():
    found = timing.summary([5.0, 1.0, 2.0, 3.0, 4.0])
    assert (found["min"], found["median"], found["p90"], found["rounds"]) == (1, 3, 5, 5)
    assert found["p10"] <= found["p25"] <= found["median"] <= found["p75"]


def test_preparing_is_not_timed_and_comes_first():
    order = []
    measure = timing.Stopwatch(CPU).measure(lambda: order.append("run"), lambda: order.append("prepare"))
    assert 0 <= measure() < 1
    assert order == ["prepare", "run"]


def test_bandwidth_is_bytes_over_time():
    bandwidth = timing.Bandwidth(timing.Stopwatch(CPU))
    assert bandwidth.found({"copy": [0.5], "read": [0.25]}) == pytest.approx({"copy": 2**18, "read": 2**18})
