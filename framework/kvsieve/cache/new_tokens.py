"""New tokens as a policy is told of them; the one of a step is written in one op with all that belongs to it.

Letters: B rows, K KV heads, D head size, Q new tokens.
"""

from __future__ import annotations

import torch

from ..errors import UserError
from .slots import Slots


class NewTokens:
    """Tokens just written, a row's real ones first; the rest is zero."""

    def __init__(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        counts: torch.Tensor,
        slots: torch.Tensor,
        ids: torch.Tensor | None = None,
    ) -> None:
        self._keys, self._values, self._counts, self._slots = keys, values, counts, slots
        self.ids = ids  # [B, Q], -1 beyond the real ones; for a policy that wants them

    @property
    def keys(self) -> torch.Tensor:
        """`[B, K, Q, D]`, rotated."""
        return self._keys

    @property
    def values(self) -> torch.Tensor:
        """`[B, K, Q, D]`."""
        return self._values

    @property
    def counts(self) -> torch.Tensor:
        """`[B]`, how many of the Q are real."""
        return self._counts

    @property
    def slots(self) -> torch.Tensor:
        """`[B, K, Q]`, where they were written."""
        return self._slots


class NewToken(NewTokens):
    """The one token a row of a step, on its way into the storage.

    What a policy adds in `on_append`, by `kv.write` and `ops.running_mean`, is gathered and written with it,
    in one op. Whoever looks before (`kv` in any other way, `new.slots`) has it written, and adds later.
    """

    def __init__(
        self,
        storage: Slots,
        keys: torch.Tensor,
        values: torch.Tensor,
        active: torch.Tensor | None,
        ids: torch.Tensor | None,
        limits: int | torch.Tensor | None,
        lowest: torch.Tensor | None,
    ) -> None:
        counts = storage.ones if active is None else active
        super().__init__(keys, values, counts, storage.lengths, ids)
        self.storage, self.active = storage, active
        self.where = limits, lowest  # see Slots.append_token
        self.columns: dict[str, torch.Tensor] = {}
        self.means: list[str] = []
        self.written: torch.Tensor | None = None
        self._versions: dict[str, int] = {}

    def add_column(self, name: str, column: torch.Tensor) -> None:
        """Write `column [B, K, 1, ...]` with it."""
        self.columns[name] = column
        if not column.is_inference():
            self._versions[name] = column._version

    def write(self) -> torch.Tensor:
        """Write it and what was gathered, if that was not done before; return the slots `[B, K, 1]`."""
        if self.written is None:
            for name, version in self._versions.items():
                if self.columns[name]._version != version:
                    raise UserError(
                        f"kv.write({name!r}, new, column): the column was changed in place before it was "
                        "written; give kv.write a tensor of its own"
                    )
            self.written = self.storage.append_token(
                self._keys, self._values, self.columns, self.means, self.active, *self.where
            )
        return self.written

    @property
    def keys(self) -> torch.Tensor:
        return self._of_active(self._keys)

    @property
    def values(self) -> torch.Tensor:
        return self._of_active(self._values)

    @property
    def counts(self) -> torch.Tensor:
        return self._counts.long()

    @property
    def slots(self) -> torch.Tensor:
        return self.write()

    def _of_active(self, tokens: torch.Tensor) -> torch.Tensor:
        if self.active is None:
            return tokens
        return tokens.masked_fill(~self.active[:, None, None, None], 0)
