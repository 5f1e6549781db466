"""The meter: bytes that decode steps read from and write to the KV cache, counted by the ops.

Counted are keys, values, columns and summaries: what grows with the cache, as in the SparQ paper's formulas.
Not counted are the weights, the queries, and what a step makes for itself (scores, chosen slots). A column or
summary is counted once each way per step, however often a policy touches it. Prefill is not counted: there
all policies are dense.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import NamedTuple

import torch

from . import processes


class Moved(NamedTuple):
    """Bytes that one row's decode steps read and wrote, and what dense attention would have read in them."""

    steps: int
    read: float
    written: float
    dense_read: float


class Meter:
    """Sums of bytes over all decode steps, layers, KV heads and active rows since it was made.

    Counts are kept on the device and added without a host synchronisation; reading a property synchronises.
    """

    def __init__(self) -> None:
        # By name and shape: decodes of several sizes may be counted in one meter.
        self._sums: dict[tuple[str, torch.Size], torch.Tensor] = {}

    def add(self, name: str, amount: int | torch.Tensor) -> None:
        """Add bytes (or steps) to the sum under this name: those of each row `[B]`, or of all together."""
        amount = torch.as_tensor(amount)
        total = self._sums.setdefault((name, amount.shape), torch.zeros_like(amount))
        # In place: a captured step adds to the same tensor at every replay. The layers may be on several
        # devices.
        total.add_(amount.to(total.device))

    def reset(self) -> None:
        """Start again from zero, in the same tensors."""
        for total in self._sums.values():
            total.zero_()

    def _total(self, prefix: str) -> int:
        return sum(int(amount.sum()) for (name, _), amount in self._sums.items() if name.startswith(prefix))

    def by_row(self, rows: int) -> list[Moved]:
        """Split the sums of decodes of so many rows among them.

        Traffic of all rows together (static data) is shared by their steps.
        """
        steps = self._of_rows("steps", torch.zeros(rows, dtype=torch.float64))
        share = steps / steps.sum().clamp(min=1)
        columns = [self._of_rows(prefix, share).tolist() for prefix in ("read/", "written/", "dense")]
        return [Moved(int(n), *moved) for n, *moved in zip(steps.tolist(), *columns, strict=True)]

    def _of_rows(self, prefix: str, share: torch.Tensor) -> torch.Tensor:
        """The sums of each row `[B]` float64; each gets its share `[B]` of what was not counted by row."""
        total = torch.zeros_like(share)
        for (name, shape), amount in self._sums.items():
            if name.startswith(prefix):
                counted = amount.to("cpu", torch.float64)
                total += counted if shape == share.shape else counted.sum() * share
        return total

    @property
    def read(self) -> int:
        """Bytes read."""
        return self._total("read/")

    @property
    def written(self) -> int:
        """Bytes written."""
        return self._total("written/")

    @property
    def dense_read(self) -> int:
        """Bytes that dense attention over every token seen would have read in the same steps."""
        return self._total("dense")

    @property
    def steps(self) -> int:
        """Decode steps, counted once for every active row."""
        return self._total("steps")

    @property
    def by_kind(self) -> dict[str, int]:
        """Bytes read, by what was read: keys, values, channels, columns, summaries."""
        found: dict[str, int] = {}
        for (name, _), amount in self._sums.items():
            if name.startswith("read/"):
                kind = name.removeprefix("read/")
                found[kind] = found.get(kind, 0) + int(amount.sum())
        return found

    def over_ranks(self) -> Meter:
        """Add up the bytes of all processes that share a model: each counts its own heads.

        The steps are common to all.

        Every process must call it. Where there is only one, the same numbers.
        """
        everywhere = processes.gather({key: amount.tolist() for key, amount in self._sums.items()})
        total = Meter()
        for key in everywhere[0]:
            amounts = torch.tensor([sums[key] for sums in everywhere])
            total.add(key[0], amounts[0] if key[0] == "steps" else amounts.sum(0))
        return total


class _Current(threading.local):
    """Of this thread. (Not a context variable: that would break a traced graph.)"""

    meter: Meter | None = None


_current = _Current()


@contextlib.contextmanager
def measure(meter: Meter | None = None) -> Iterator[Meter]:
    """Count the traffic of every decode step inside, in a new meter or on top of what `meter` has counted.

    Counts the steps of this thread only; of nested meters the innermost counts.

    >>> with kvsieve.transfer.measure() as meter:
    ...     tokens = list(kvsieve.decode(model, prompts, policy, max_new_tokens=16))
    >>> meter.read / meter.dense_read
    0...
    """
    meter = meter or Meter()
    before, _current.meter = _current.meter, meter
    try:
        yield meter
    finally:
        _current.meter = before


def current() -> Meter | None:
    """The innermost meter that is measuring in this thread."""
    return _current.meter
