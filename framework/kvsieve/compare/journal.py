"""The files that a run writes beside its samples: config.yaml, environment.json, cells.json, errors.txt."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from typing import Any

from ..errors import UserError
from . import environment, files, manifest
from .config import Config
from .execute import Prepared
from .samples import Store


class Journal:
    """The files of a run, of the models that were prepared so far, and what of them failed."""

    def __init__(self, config: Config, store: Store, here: bool) -> None:
        """`here`: this machine measures, so that its load says whether speeds are to be quoted."""
        self.config, self.store, self.folder, self.here = config, store, store.path.parent, here
        self.disturbed: str | None = None  # why speeds are not to be quoted
        self.prepared: dict[str, Prepared] = {}  # by model
        self.failures: dict[str, str] = {}  # by cell id, or model: why
        self._load = environment.Load()
        self._at_start = self._load.now()
        self._environment_before = self._read_environment()
        self._samples_before = len(store.records)
        self._cells_before = {record["cell"] for record in store.records.values()}

    @property
    def measured(self) -> bool:
        """Whether this run has measured a sample."""
        return len(self.store.records) > self._samples_before

    def begin(self, model: str, prepared: Prepared) -> None:
        """Write what is about to be measured.

        Raises:
            UserError: a file cannot be written; `end` and `error` too.
        """
        self.prepared[model] = prepared
        # Of several models each has its own type and revision: their settings stay as they were given.
        facts = prepared.facts if len(self.config.models) == 1 else {}
        with safe():
            files.write(self.folder / "config.yaml", self.config.resolved(**facts))
        load = {"start": self._at_start}
        if earlier := self._disturbed_before():
            load["run"] = {"not_to_be_quoted": earlier}
        missing = any(self.store.missing(cell.id, cell.task.samples) for cell in prepared.cells)
        self._write(load, ours=missing or self.measured)

    def end(self, failures: dict[str, str]) -> None:
        """Write what became of it, and how busy the machine was; `failures` by cell id.

        Where nothing was measured, the machine and its load stay those of the run that did.
        """
        self.failures |= failures
        during = self._load.since()
        if not self.here:
            del during["not_to_be_quoted"]
        self.disturbed = during.get("not_to_be_quoted") or self._disturbed_before()
        if self.disturbed:
            during["not_to_be_quoted"] = self.disturbed
        self._write({"start": self._at_start, "run": during}, ours=self.measured)

    def cannot(self, model: str, error: UserError) -> None:
        """Write that a model cannot be prepared."""
        self.failures[model] = str(error)
        self.error(f"model {model}", str(error))

    def error(self, label: str, details: str) -> None:
        """Add to errors.txt; a link is not followed."""
        path = self.folder / "errors.txt"
        regular = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        with safe():
            try:
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | regular, 0o666)
                with open(file, "a", encoding="utf-8", errors="replace") as log:
                    log.write(f"{label}\n{details}\n")
            except OSError as error:
                raise UserError(f"{path}: cannot be written: {error.strerror}") from None

    def _write(self, load: dict[str, Any], ours: bool) -> None:
        """`ours`: the environment is this run's, and not that of an earlier one."""
        entries = [
            entry
            for model, prepared in self.prepared.items()
            for entry in manifest.entries(prepared.cells, model, self.failures)
        ]
        machines = {model: prepared.environment for model, prepared in self.prepared.items()}
        found = environment.together(machines, "models") | {"load": load}
        if not ours and self._environment_before:
            found = self._environment_before
        text = json.dumps(found, indent=2, ensure_ascii=False)
        with safe():
            files.write(self.folder / "environment.json", text + "\n")
            manifest.write(self.folder, entries)

    def _read_environment(self) -> dict[str, Any]:
        try:
            return files.read_object(self.folder / "environment.json")
        except UserError:  # it is written anew
            return {}

    def _disturbed_before(self) -> str | None:
        """Why speeds of an earlier run, of whose samples some are used, are not to be quoted."""
        cells = {cell.id for prepared in self.prepared.values() for cell in prepared.cells}
        load = self._environment_before.get("load") if cells & self._cells_before else None
        during = load.get("run") if isinstance(load, dict) else None
        return during.get("not_to_be_quoted") if isinstance(during, dict) else None


@contextlib.contextmanager
def safe() -> Iterator[None]:
    """Add to the message of a file that cannot be written that nothing is lost."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{error}; the samples measured so far are safe") from None
