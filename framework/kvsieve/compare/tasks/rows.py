"""Tasks made of the rows of a data set: from the hub, or from a local folder with the same columns."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from ...errors import UserError
from . import folder as local
from . import hub as remote
from .base import Task
from .hub import DataSet

Row = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class FromRows(Task):
    """Base of these tasks: the data set `hub`, or the one that the parameters name."""

    hub: ClassVar[DataSet]
    columns: ClassVar[tuple[str, ...]]

    folder: str | None = dataclasses.field(default=None, kw_only=True)  # with .jsonl or .parquet files
    dataset: str | None = dataclasses.field(default=None, kw_only=True)  # on the hub; none: the paper's
    revision: str | None = dataclasses.field(default=None, kw_only=True)  # of it; none: that of the paper's
    split: str | None = dataclasses.field(default=None, kw_only=True)  # of it; none: the paper's

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.folder is not None and (self.dataset or self.revision or self.split):
            raise ValueError("a folder has no dataset, revision or split: its files are all of the rows")

    @property
    def data_set(self) -> DataSet:
        """The one on the hub."""
        own = self.hub
        if self.dataset is not None:
            own = DataSet(self.dataset, None, own.split, None)
        return own._replace(split=self.split or own.split, revision=self.revision or own.revision)

    @property
    def where(self) -> str:
        """Where the rows are, in words."""
        return str(self.data_set) if self.folder is None else self.folder

    def rows(self) -> list[Row]:
        """All of them, in their order.

        Raises:
            UserError: they cannot be had, or lack a column.
        """
        if self.folder is not None:
            return local.read(self.folder, self.columns)
        return remote.read(self.data_set, self.columns)

    def source(self) -> str:
        if self.folder is not None:
            return local.digest(self.folder)
        return remote.digest(self.data_set, self.columns)

    def check_count(self, found: int, index: int) -> None:
        """Raise UserError if there are fewer questions than samples, or than `index` needs."""
        if max(self.samples, index + 1) > found:
            raise UserError(
                f"{self.name} has {found} questions in {self.where}: samples cannot be {self.samples}"
            )
