"""Timing that can be trusted: many rounds, everything interleaved, caches cold, medians and quantiles kept.

Everything to be compared is timed once a round, in changing order: a machine that slows down, or another job
on it, meets all alike, and a ratio is the median over rounds of the ratios within a round.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from ..graph import StepGraph

Measure = Callable[[], float]  # does the work once; seconds

LEAST_ROUNDS = 7
MOST_ROUNDS = 200


def interleave(measures: Mapping[str, Measure], seconds: float, warm_up: int = 2) -> dict[str, list[float]]:
    """Seconds of every measure in every round, for about so many seconds, at least LEAST_ROUNDS rounds."""
    for measure in measures.values():
        for _ in range(warm_up):
            measure()
    found: dict[str, list[float]] = {name: [] for name in measures}
    order, end = list(measures), time.perf_counter() + seconds
    for round_ in range(MOST_ROUNDS):
        if round_ >= LEAST_ROUNDS and time.perf_counter() > end:
            break
        for name in order:
            found[name].append(measures[name]())
        order = [*reversed(order[1:]), order[0]]
    return found


def summary(times: Sequence[float]) -> dict[str, float | int]:
    """Summarise the times of one measurement, in seconds."""
    ordered = sorted(times)

    def quantile(share: float) -> float:
        return ordered[min(len(ordered) - 1, int(share * len(ordered)))]

    return {
        "median": statistics.median(ordered),
        "min": ordered[0],
        "p10": quantile(0.1),
        "p25": quantile(0.25),
        "p75": quantile(0.75),
        "p90": quantile(0.9),
        "rounds": len(ordered),
    }


def ratio(times: Sequence[float], against: Sequence[float], paired: bool = True) -> float:
    """Speed-up over `against`: the median of the rounds' ratios; unless paired, the ratio of the medians."""
    if not paired:
        return statistics.median(against) / statistics.median(times)
    return statistics.median(b / a for a, b in zip(times, against, strict=True))


class Stopwatch:
    """Times single calls on a device with its last-level cache flushed: keys and values come from memory.

    As they do in a model, where the weights of all layers pass through the cache between two steps of one.
    """

    def __init__(self, device: torch.device, flush: bool = True) -> None:
        self.device = device
        self.buffer = torch.zeros(last_level_cache(device) // 4 if flush else 0, device=device)
        self.sum = torch.zeros((), device=device)

    def measure(self, run: Callable[[], object], prepare: Callable[[], None]) -> Measure:
        """Return a timed `run`; the untimed `prepare` before it undoes the changes of the last run."""

        def on_cpu() -> float:
            prepare()
            self._flush()
            start = time.perf_counter()
            run()
            return time.perf_counter() - start

        def on_gpu() -> float:
            # The flush keeps the GPU busy while the host enqueues: a graph's launch is not timed.
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            prepare()
            self._flush()
            start.record()
            run()
            end.record()
            torch.cuda.synchronize(self.device)
            return float(start.elapsed_time(end)) / 1e3

        return on_gpu if self.device.type == "cuda" else on_cpu

    def _flush(self) -> None:
        # By reading: written lines would have to be written back during what is timed.
        if self.buffer.numel():
            torch.sum(self.buffer, 0, out=self.sum)


def wall_clock(run: Callable[[], object], prepare: Callable[[], None], device: torch.device) -> Measure:
    """`run` as someone waiting for it sees it, launches and Python included."""

    def measure() -> float:
        prepare()
        start = now(device)
        run()
        return now(device) - start

    return measure


def now(device: torch.device) -> float:
    """Seconds, once the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def captured(
    run: Callable[[], object], prepare: Callable[[], None], device: torch.device
) -> Callable[[], object]:
    """The same work as one CUDA graph.

    Raises:
        UserError: it cannot be captured (it waits for the device, or its shapes depend on data).
    """

    def once() -> None:
        run()

    step = StepGraph(device)
    while step.graph is None:
        prepare()
        step(once)
    return lambda: step(once)


def last_level_cache(device: torch.device) -> int:
    """Bytes; 64 MiB where the system does not say."""
    if device.type == "cuda":
        return 2 * int(torch.cuda.get_device_properties(device).L2_cache_size)
    files = Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")
    sizes = [file.read_text().strip() for file in files]
    units = {"K": 2**10, "M": 2**20}
    return max((int(size[:-1]) * units[size[-1]] for size in sizes if size[-1:] in units), default=2**26)


class Bandwidth:
    """Copy and read bandwidth of this machine, measured in the same rounds as the steps judged by it."""

    def __init__(self, watch: Stopwatch) -> None:
        size = last_level_cache(watch.device) if watch.device.type == "cpu" else 2**30
        self.source = torch.ones(size // 4, device=watch.device)
        self.target = torch.empty_like(self.source)
        self.sum = torch.zeros((), device=watch.device)
        self.measures = {
            "copy": watch.measure(lambda: self.target.copy_(self.source), lambda: None),
            "read": watch.measure(lambda: torch.sum(self.source, 0, out=self.sum), lambda: None),
        }
        self.bytes = {"copy": 2 * size, "read": size}

    def found(self, times: Mapping[str, Sequence[float]]) -> dict[str, float]:
        """Bytes a second of each."""
        return {name: moved / statistics.median(times[name]) for name, moved in self.bytes.items()}


def nothing() -> None:
    """Prepare nothing: for a run that changes nothing."""


def describe_failure(error: Exception) -> dict[str, Any]:
    """Say on one line why something was not timed."""
    text = str(error).strip().splitlines()
    return {"not_run": f"{type(error).__name__}: {text[0] if text else ''}"[:300]}


def attempt(measure: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Measure; a failure is recorded in the result, so that the other cells are not lost."""
    try:
        return measure()
    except Exception as error:
        gc.collect()  # frees the tensors of an exhausted memory
        return {"failed": describe_failure(error)["not_run"], "rows": []}
