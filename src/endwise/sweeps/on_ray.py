"""Tasks on Ray: on this machine, or on the machines of a cluster."""

import logging
import socket
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from endwise.common.errors import ConfigError
from endwise.sweeps.remote import Lost, Remote, failed, one_line, work
from endwise.sweeps.sweep_config import RayConfig
from endwise.sweeps.tasks import Outcome, Task

try:
    import ray
    from ray import exceptions
except ImportError as error:
    raise ConfigError(f"engine: ray needs Ray ({error}). Install it: pip install 'endwise[ray]'") from None

OBJECT_STORE = 80 * 2**20
"""Bytes of shared memory: Ray's least, since only recipes and outcomes pass through it."""
WAIT_SECONDS = 1.0
CONNECT_SECONDS = 15.0

REPEATABLE = (exceptions.RayTaskError, exceptions.RuntimeEnvSetupError, exceptions.TaskUnschedulableError)
"""Errors that another worker would meet as well; Ray's other errors are losses."""


class OnRay(Remote):
    """Every task is a Ray task.

    Raises:
        ConfigError: there is no Ray at the address, or no machine of it has what a task asks for.
    """

    def __init__(self, config: RayConfig) -> None:
        super().__init__(config.retries)
        self._owned = not ray.is_initialized()
        """True if the connection is this sweep's, and not one that the caller had made."""
        if self._owned:
            _connect(config.address)
        try:
            _check_room(config)
        except ConfigError:
            self._disconnect()
            raise
        self._directory, self._threads = Path.cwd(), max(1, int(config.cpus))
        self._task: Any = ray.remote(**options_of(config))(work)

    def _submit(self, task: Task) -> Any:
        return self._task.remote(task, self._directory, self._threads)

    def _ended(self, jobs: Sequence[Any]) -> Sequence[Any]:
        return ray.wait(list(jobs), timeout=WAIT_SECONDS)[0]

    def _result(self, handle: Any, task: Task) -> list[Outcome] | None:
        try:
            return ray.get(handle)
        except REPEATABLE as error:
            return failed(task, one_line(error.cause if isinstance(error, exceptions.RayTaskError) else error))
        except exceptions.RayError as error:
            raise Lost(one_line(error)) from None

    def _ask_to_stop(self, jobs: Sequence[Any]) -> None:
        for job in jobs:
            ray.cancel(job)  # which a task in its worker's main thread takes as a Ctrl-C

    def _kill(self, jobs: Sequence[Any]) -> None:
        for job in jobs:
            ray.cancel(job, force=True)

    def close(self) -> None:
        try:
            super().close()
        finally:
            self._disconnect()

    def _disconnect(self) -> None:
        if self._owned:
            ray.shutdown()


def options_of(config: RayConfig) -> dict[str, Any]:
    """Return the options of a Ray task. Ray's own retries are off: losses are counted here, those for want of memory
    too, which Ray otherwise retries without end. A worker that had GPU memory ends with its task and so gives it back.
    """
    calls = 1 if config.gpus else 0  # 0: any number
    shares = {"num_cpus": config.cpus, "num_gpus": config.gpus}
    return {**shares, "max_retries": 0, "max_calls": calls, "name": "endwise"}


def _connect(address: str | None) -> None:
    """
    Raises:
        ConfigError: Ray cannot be started here, or does not answer at the address.
    """
    quiet: dict[str, Any] = {"logging_level": logging.ERROR, "log_to_driver": False}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what Ray will do differently one day
            if address is None:
                ray.init(address="local", include_dashboard=False, object_store_memory=OBJECT_STORE, **quiet)
            else:
                _check_answers(address)
                ray.init(address=address, **quiet)
    except Exception as error:
        what = "Ray cannot be started here" if address is None else f"No Ray answers at ray.address {address!r}"
        raise ConfigError(
            f"{what} ({one_line(error)}). Leave ray.address unset for this machine alone, `auto` for the cluster that "
            "it is part of, or ray://HOST:10001 for another (pip install 'ray[client]')."
        ) from error


def _check_answers(address: str) -> None:
    """Ray itself would try for minutes, and then end the process.

    Raises:
        OSError: nothing listens there.
    """
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host.strip("[]"), int(port)), timeout=CONNECT_SECONDS).close()


def _check_room(config: RayConfig) -> None:
    """A task that fits on no machine would wait without end.

    Raises:
        ConfigError: it names what the machines have.
    """
    machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    if not any(each.get("CPU", 0) >= config.cpus and each.get("GPU", 0) >= config.gpus for each in machines):
        have = "; ".join(f"{each.get('CPU', 0):g} CPUs and {each.get('GPU', 0):g} GPUs" for each in machines)
        raise ConfigError(
            f"A task asks for {config.cpus:g} CPUs and {config.gpus:g} GPUs on one machine (ray.cpus, ray.gpus), but "
            f"the cluster's machines have: {have}. Lower them, or add a machine."
        )
