"""The traffic of one layer: bytes that its forward reads and writes, told to the meter that is measuring."""

from __future__ import annotations

import torch

from .. import transfer


class Traffic:
    """Counts for one layer. Without a meter (prefill, or nobody measures) it does nothing."""

    def __init__(self) -> None:
        self.meter: transfer.Meter | None = None
        self.active: torch.Tensor | None = None  # [B] bool: rows that count; None: all
        # Columns and summaries are counted once each way per step, however often a policy touches them.
        self._read: set[str] = set()
        self._written: set[str] = set()
        # Entries [B, K] of columns that were read in part, before the whole column was.
        self._parts: dict[str, torch.Tensor] = {}
        # Names of all that was handed to the policy in this step; what it reads beside these is read behind
        # the meter.
        self.handed: set[str] = set()

    def begin(self, meter: transfer.Meter | None, active: torch.Tensor | None) -> None:
        """A forward begins, counted in `meter`; None: not counted."""
        self.meter, self.active = meter, active
        self._read.clear()
        self._written.clear()
        self._parts.clear()
        self.handed.clear()

    def read(self, kind: str, slots: torch.Tensor, numbers: int, dtype: torch.dtype) -> None:
        """Count a read of `numbers` numbers in each of `slots [B, K]` slots."""
        self._count(f"read/{kind}", slots, numbers, dtype)

    def read_column(self, name: str, entries: torch.Tensor, numbers: int, dtype: torch.dtype) -> None:
        """Count a read of a whole column of `entries [B, K]`: once a step, less what was read in part."""
        if self.first_read(name):
            before = self._parts.pop(name, None)
            rest = entries if before is None else (entries - before).clamp(min=0)
            self.read("columns", rest, numbers, dtype)

    def read_part(self, name: str, entries: torch.Tensor, numbers: int, dtype: torch.dtype) -> None:
        """Count a read of so many `entries [B, K]` of a column; free where the whole was read before."""
        if self.meter is None or name in self._read:
            return
        before = self._parts.get(name)
        self._parts[name] = entries if before is None else before + entries
        self.read("columns", entries, numbers, dtype)

    def read_static(self, name: str, tensor: torch.Tensor) -> None:
        """Count a read of static data: once a step, for all rows together."""
        if self.meter is not None and self.first_read(f"static {name}"):
            size = tensor.numel() * tensor.element_size()
            # On the device: what is added up on the host, no replay of a captured step adds.
            self.meter.add("read/static", torch.full((), size, dtype=torch.int64, device=tensor.device))

    def written(self, kind: str, slots: torch.Tensor, numbers: int, dtype: torch.dtype) -> None:
        """Count a write, as `read`."""
        self._count(f"written/{kind}", slots, numbers, dtype)

    def dense(self, tokens: torch.Tensor, numbers: int, dtype: torch.dtype) -> None:
        """Count what dense attention would read."""
        self._count("dense", tokens, numbers, dtype)

    def steps(self, counts: torch.Tensor) -> None:
        """Count decode steps: `counts [B]`, one for each active row."""
        if self.meter is not None:
            self.meter.add("steps", counts)

    def first_read(self, name: str) -> bool:
        """Whether this is the first read of a column or summary in this step."""
        return self._first(self._read, name)

    def first_write(self, name: str) -> bool:
        """Whether this is the first write to a column or summary in this step."""
        return self._first(self._written, name)

    def _first(self, touched: set[str], name: str) -> bool:
        if self.meter is None or name in touched:
            return False
        touched.add(name)
        return True

    def _count(self, name: str, slots: torch.Tensor, numbers: int, dtype: torch.dtype) -> None:
        if self.meter is None:
            return
        if self.active is not None:
            slots = slots * self.active[:, None]
        self.meter.add(name, slots.sum(1) * (numbers * dtype.itemsize))
