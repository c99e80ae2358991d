"""Worker processes on this machine, each bound to a device, each with a log file."""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hpo.errors import UsageError
from storage.home import home


@dataclass(frozen=True, kw_only=True)
class LocalWorker:
    """A worker process; `id` is what it calls itself in the database."""

    id: str
    index: int
    device: str
    log: Path
    process: subprocess.Popen[bytes]
    started_at: float


class LocalExecutor:
    """Starts worker processes and sends them signals; says nothing of what they do."""

    def __init__(
        self, study_name: str, *, study_key: int, devices: Sequence[str], storage_url: str | None
    ) -> None:
        """devices: one a worker, by torch's names, the same one as often as wanted."""
        self._study_name, self._devices = study_name, devices
        self._logs = home() / "logs" / f"{study_key:d}"
        self._environment = {**os.environ}
        if storage_url is not None:
            self._environment["HPO_STORAGE"] = storage_url
        self._num_started = 0

    @property
    def num_workers(self) -> int:
        """As many as devices were given."""
        return len(self._devices)

    def start(self, index: int) -> LocalWorker:
        """Start the worker of the index-th device. Its own session: Ctrl-C is ours to forward."""
        self._logs.mkdir(parents=True, exist_ok=True)
        self._num_started += 1
        device = self._devices[index]
        worker_id = f"{socket.gethostname()}-{os.getpid()}-{index}-{self._num_started}"
        log = self._logs / f"worker-{index}.log"
        environment = {
            **self._environment,
            "HPO_WORKER_ID": worker_id,
            "HPO_LAUNCHER_PID": str(os.getpid()),
        }
        if device == "cpu":
            # more busy threads than cores is several times slower
            environment |= {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
        command = [sys.executable, "-P", "-m", "hpo.cli", "worker"]
        with log.open("ab") as output:
            process = subprocess.Popen(
                [*command, "--study", self._study_name, "--device", device],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment,
                start_new_session=True,
            )
        if device == "cpu":
            _pin(process.pid, index)
        return LocalWorker(
            id=worker_id,
            index=index,
            device=device,
            log=log,
            process=process,
            started_at=time.monotonic(),
        )

    def signal(self, workers: Sequence[LocalWorker], number: signal.Signals) -> None:
        """Send a signal to those that live."""
        for worker in workers:
            if worker.process.poll() is None:
                worker.process.send_signal(number)


def worker_devices(available: Sequence[str], chosen: str | None, workers: str) -> list[str]:
    """A device for each worker.

    available: this machine's. chosen: names after one another with commas, None for all. workers:
    a number, or "auto": one on each GPU; without one, one on each core. Raises UsageError.
    """
    devices = list(available)
    if chosen:
        devices = [name.strip() for name in chosen.split(",")]
        for name in devices:
            if name not in (*available, "cpu"):
                raise UsageError(
                    f"no device {name!r} on this machine: there is {', '.join(available)}"
                )
    if workers == "auto":
        return devices * num_cores() if devices == ["cpu"] else devices
    if not workers.isdecimal() or int(workers) < 1:
        raise UsageError(f"--workers must be a whole number >= 1 or auto, got {workers!r}")
    return [devices[index % len(devices)] for index in range(int(workers))]


def num_cores() -> int:
    """Cores that this process may use."""
    return len(_cores())


def _cores() -> list[int]:
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def _pin(pid: int, index: int) -> None:
    if hasattr(os, "sched_setaffinity"):
        cores = _cores()
        os.sched_setaffinity(pid, {cores[index % len(cores)]})
