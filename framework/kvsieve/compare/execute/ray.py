"""Measure on a Ray cluster: a process per cell, on a GPU of its own where the cluster has any.

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
from typing import TYPE_CHECKING, Any

from ...errors import UserError
from . import Event, Events, Failed, Finished, Measured, Prepared, Restarted, Work
from .diagnose import diagnose_cells
from .local import failed, load_model, measure_cell, prepare

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from ..cells import Cell
    from ..config import Config, Diagnose, Settings

_SECONDS_TO_ANSWER = 10
_ONE_BY_ONE = {"_generator_backpressure_num_objects": 1}  # no batch starts before the last one has arrived
_ATTEMPTS = 3  # worker deaths in a row, without a batch between them, after which a cell fails


@dataclasses.dataclass
class _Job:
    cell: Cell
    missing: list[int]
    deaths: int = 0


class OnRay:
    """An executor whose workers are processes of a Ray cluster.

    kvsieve, the plugins in use and the model must be at hand on every machine of it.
    """

    def __init__(self, address: str | None = None, workers: int | None = None) -> None:
        """Connect, or start a cluster on this machine, which listens on the loopback only.

        Args:
            address: None is RAY_ADDRESS, else the cluster that runs on this machine, else a new one.
            workers: cells at a time, at most; None is as many as the cluster has room for.

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
                "tensor_parallel runs under torchrun, not on Ray, which gives every cell one GPU: "
                "leave out one"
            )
        gpus = settings.device != "cpu" and self.ray.cluster_resources().get("GPU", 0) > 0
        if gpus and settings.device not in (None, "cuda"):
            raise UserError(
                f"device {settings.device!r}: Ray chooses the GPU of each cell: leave it out, or say cpu"
            )
        self.settings = settings
        # A new process for every cell: nothing of one cell, such as its memory, is left to the next.
        self.options = {"num_cpus": 1, "num_gpus": int(gpus), "max_calls": 1, "max_retries": 0}
        try:
            found = self.ray.get(self._remote(_prepare).remote(os.getcwd(), config, started))
        except self.ray.exceptions.RayError as error:
            raise UserError(f"a worker of the Ray cluster could not start: {error}") from None
        if isinstance(found, str):
            raise UserError(found)
        return found

    def measure(self, work: Work) -> Events:
        here = os.getcwd()
        waiting = deque(_Job(cell, missing) for cell, missing in work)
        running: list[tuple[Any, _Job]] = []
        try:
            while waiting or running:
                while waiting and (self.workers is None or len(running) < self.workers):
                    job = waiting.popleft()
                    measure = self._remote(_measure, **_ONE_BY_ONE)
                    stream = measure.remote(here, self.settings, job.cell, job.missing)
                    running.append((stream, job))
                (ready,), _ = self.ray.wait([stream for stream, _ in running], num_returns=1)
                job = next(job for stream, job in running if stream is ready)
                event = self._next(ready, job)
                if isinstance(event, Measured):
                    done = {record["sample"] for record in event.records}
                    job.missing, job.deaths = [i for i in job.missing if i not in done], 0
                else:
                    running = [(stream, other) for stream, other in running if stream is not ready]
                if isinstance(event, Restarted):
                    waiting.appendleft(job)
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

    def _next(self, stream: Any, job: _Job) -> Event:
        """The next event of a cell; if its worker died, that it restarts."""
        try:
            return self.ray.get(next(stream))
        except StopIteration:
            return Finished(job.cell)
        except self.ray.exceptions.RayTaskError as error:
            return failed(job.cell, error)
        except self.ray.exceptions.RayError as error:
            job.deaths += 1
            if job.deaths < _ATTEMPTS:
                return Restarted(job.cell, "its worker died")
            reason = f"its worker died {job.deaths} times in a row: {type(error).__name__}"
            return Failed(job.cell, reason, str(error))

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


def _measure(folder: str, settings: Settings, cell: Cell, missing: list[int]) -> Events:
    """On a worker: the cell, batch by batch."""
    _enter(folder)
    try:
        model = load_model(settings)
    except UserError as error:
        yield failed(cell, error)
        return
    yield from measure_cell(model, settings, cell, missing)


def _diagnose(
    folder: str, settings: Settings, asked: Diagnose, cells: list[Cell], missing: dict[str, list[int]]
) -> Events:
    """On a worker: all cells, sample by sample."""
    _enter(folder)
    yield from diagnose_cells(load_model(settings), settings, asked, cells, missing)


def _enter(folder: str) -> None:
    """Paths are relative to where the comparison was started; a machine without that folder has its own."""
    with contextlib.suppress(OSError):
        os.chdir(folder)
