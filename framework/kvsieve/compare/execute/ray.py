"""Measure on a Ray cluster: a process per unit of work, on a GPU of its own where the cluster has any.

The cluster only measures. Batches come back as they are measured and are stored by the process that asked, so
that a comparison continues in the same way as a local one; a worker that dies loses the batch in flight.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import socket
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from . import Began, Event, Events, Failed, Measured, Prepared, Restarted, Unit, Work, cost, heap, units
from .diagnose import diagnose_cells
from .local import load_model, prepare
from .unit import failed, measure_unit

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..cells import Cell
    from ..config import Config, Diagnose, Settings

_SECONDS_TO_ANSWER = 10
_ONE_BY_ONE = {"_generator_backpressure_num_objects": 1}  # no batch starts before the last one has arrived
_ATTEMPTS = 3  # worker deaths in a row, without a batch between them, after which a cell fails


@dataclasses.dataclass
class _Job:
    """The part of a unit that a worker measures, so far as it is left."""

    cells: list[Cell]
    missing: dict[str, list[int]]
    running: Cell  # the one that is being measured, or will be first
    deaths: int = 0  # of workers, since the last batch

    def note(self, event: Event) -> None:
        """Take out what was measured, and a cell that failed."""
        name = event.cell.id
        if isinstance(event, Began):
            self.running = event.cell
        elif isinstance(event, Measured):
            done = {record["sample"] for record in event.records}
            self.missing[name], self.deaths = [i for i in self.missing[name] if i not in done], 0
        elif isinstance(event, Failed):
            self.missing[name], self.deaths = [], 0


class OnRay:
    """An executor whose workers are processes of a Ray cluster.

    kvsieve, the plugins in use and the model must be at hand on every machine of it.
    """

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        """Connect, or start a cluster on this machine, which listens on the loopback only.

        Args:
            address: None is RAY_ADDRESS, else the cluster that runs on this machine, else a new one.
            workers: processes at a time, at most; None is as many as the cluster has room for.

        Raises:
            UserError: Ray is not installed, or nothing answers at the address.
        """
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ImportError:
            raise UserError("the executor ray needs the package ray: pip install 'kvsieve[ray]'") from None
        self.ray: Any = ray
        self.workers = workers
        if not ray.is_initialized():
            self._connect(address or os.environ.get("RAY_ADDRESS"))
            # Whatever log_to_driver says, Ray prints a paragraph about a worker that died.
            ray._private.worker._worker_logs_enabled = False

    def _connect(self, address: str | None) -> None:
        private = self.ray._private
        options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
        _check_answers(address)
        if address is None and private.services.canonicalize_bootstrap_address(None) is None:
            # A new cluster. Ray would listen on every network interface. The one switch that it has against
            # that was made for the firewalls of other systems: all of its processes then take the loopback
            # for this machine.
            os.environ[private.ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR] = "0"
            private.ray_constants.ENABLE_RAY_CLUSTER = False
            options |= {"include_dashboard": False}
            address = "local"
        try:
            self.ray.init(address=address, **options)
        except (ConnectionError, ValueError, RuntimeError) as error:
            if address == "local":
                raise UserError(f"a Ray cluster could not be started here: {error}") from None
            where = "the cluster on this machine" if address is None else f"address {address!r}"
            raise UserError(
                f"{where}: {error}; a cluster that asks for a token is used with RAY_AUTH_MODE=token"
            ) from None

    def prepare(self, config: Config, started: str) -> Prepared:
        settings = config.settings
        if settings.tensor_parallel:
            raise UserError(
                "tensor_parallel runs under torchrun, not on Ray, which gives every process one GPU: "
                "leave out one"
            )
        gpus = settings.device != "cpu" and self.ray.cluster_resources().get("GPU", 0) > 0
        if gpus and settings.device not in (None, "cuda"):
            raise UserError(
                f"device {settings.device!r}: Ray chooses the GPU of each process: leave it out, or say cpu"
            )
        # A new process for every unit: nothing of one, such as its memory, is left to the next.
        self.options = {"num_cpus": 1, "num_gpus": int(gpus), "max_calls": 1, "max_retries": 0}
        try:
            found = self.ray.get(self._remote(_prepare).remote(os.getcwd(), config, started))
        except self.ray.exceptions.RayError as error:
            raise UserError(f"a worker of the Ray cluster could not start: {error}") from None
        if isinstance(found, str):
            raise UserError(found)
        self.settings = settings.model_copy(update={"batch_size": found.batch_size})
        self.new_tokens = found.new_tokens
        return found

    def measure(self, work: Work) -> Events:
        here, size = os.getcwd(), self.settings.rows
        each = -(-self._room() // max(1, len(work)))  # parts of a unit, for a worker each
        parts = [part for unit in work for part in _parts(unit, each, size)]
        parts.sort(key=lambda part: _length(part, self.new_tokens), reverse=True)  # so that all end together
        waiting = deque(_Job(unit.cells, dict(unit.missing), unit.cells[0]) for unit in parts)
        running: list[tuple[Any, _Job]] = []
        try:
            while waiting or running:
                while waiting and (self.workers is None or len(running) < self.workers):
                    job = waiting.popleft()
                    (unit,) = units(job.cells, job.missing)
                    measure = self._remote(_measure, **_ONE_BY_ONE)
                    running.append((measure.remote(here, self.settings, unit), job))
                (ready,), _ = self.ray.wait([stream for stream, _ in running], num_returns=1)
                job = next(job for stream, job in running if stream is ready)
                event, ended = self._next(ready, job)
                if event is not None:
                    job.note(event)
                if ended:
                    running = [(stream, other) for stream, other in running if stream is not ready]
                    if units(job.cells, job.missing):
                        waiting.appendleft(job)
                if event is not None:
                    yield event
        finally:
            for stream, _ in running:
                self.ray.cancel(stream, force=True)

    def diagnose(self, asked: Diagnose, cells: Sequence[Cell], missing: Mapping[str, list[int]]) -> Events:
        diagnose = self._remote(_diagnose, **_ONE_BY_ONE)  # few samples: in one worker
        stream = diagnose.remote(os.getcwd(), self.settings, asked, list(cells), dict(missing))
        try:
            for event in stream:
                yield self.ray.get(event)
        except self.ray.exceptions.RayError as error:
            for cell in cells:
                yield failed(cell, error)
        finally:
            self.ray.cancel(stream, force=True)

    def _room(self) -> int:
        """The workers that can measure at a time."""
        resources = self.ray.cluster_resources()
        room = int(resources.get("GPU" if self.options["num_gpus"] else "CPU", 1))
        return room if self.workers is None else min(room, self.workers)

    def _next(self, stream: Any, job: _Job) -> tuple[Event | None, bool]:
        """The next event of a job, and whether its worker has ended."""
        try:
            return self.ray.get(next(stream)), False
        except StopIteration:
            return None, True
        except self.ray.exceptions.RayTaskError as error:
            return failed(job.running, error), True
        except self.ray.exceptions.RayError as error:
            job.deaths += 1
            if job.deaths < _ATTEMPTS:
                return Restarted(job.running, "its worker died"), True
            reason = f"its worker died {job.deaths} times in a row: {type(error).__name__}"
            return Failed(job.running, reason, str(error)), True

    def _remote(self, function: Any, **options: Any) -> Any:
        return self.ray.remote(**self.options, **options)(function)


def _check_answers(address: str | None) -> None:
    """Refuse at once, not after minutes, a `host:port` where nothing listens."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not host or not port.isdecimal():
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _SECONDS_TO_ANSWER).close()
    except (OSError, OverflowError) as error:
        raise UserError(f"no Ray cluster answers at {address}: {error}") from None


def _prepare(folder: str, config: Config, started: str) -> Prepared | str:
    """On a worker, whose device the results depend on; a message for what the model cannot do."""
    _enter(folder)
    try:
        return prepare(config, load_model(config.settings), started)
    except UserError as error:
        return str(error)


def _parts(unit: Unit, many: int, batch_size: int) -> Iterator[Unit]:
    """The unit in so many parts, or fewer, of whole batches of samples."""
    samples = unit.samples
    size = -(-len(samples) // (many * batch_size)) * batch_size
    for first in range(0, len(samples), size):
        part = set(samples[first : first + size])
        missing = {name: [i for i in left if i in part] for name, left in unit.missing.items()}
        yield from units(unit.cells, missing)


def _length(unit: Unit, new_tokens: Mapping[str, int]) -> float:
    """The work in a unit, as if every policy read the prompts: those that do take most of the time."""
    return sum(
        len(unit.missing[cell.id]) * cost(cell.task.context, 1, new_tokens[cell.id]) for cell in unit.cells
    )


def _measure(folder: str, settings: Settings, unit: Unit) -> Events:
    """On a worker: the unit, batch by batch."""
    _enter(folder)
    try:
        model = load_model(settings)
    except UserError as error:
        for cell in unit.cells:
            yield failed(cell, error)
        return
    yield from measure_unit(model, settings, unit)


def _diagnose(
    folder: str, settings: Settings, asked: Diagnose, cells: list[Cell], missing: dict[str, list[int]]
) -> Events:
    """On a worker: all cells, sample by sample."""
    _enter(folder)
    yield from diagnose_cells(load_model(settings), settings, asked, cells, missing)


def _enter(folder: str) -> None:
    """Work where the comparison was started, if this machine has that folder; keep memory that is freed."""
    heap.keep()
    with contextlib.suppress(OSError):
        os.chdir(folder)
