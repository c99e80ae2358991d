"""Worker processes on this machine, each bound to a device, each with a log file.

They are forked from one server process that has torch loaded and nothing else done with it
(multiprocessing's forkserver): a worker is there in milliseconds where a new interpreter takes
seconds, and what torch occupies is shared. A worker runs the same command line as a user would:
hpo worker.
"""

import atexit
import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import secrets
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from hpo.claims import Claim, claim_core, claim_gpu, device_key, least_used
from hpo.errors import UsageError
from hpo.executors.sockets import short_folder_for_sockets
from hpo.logs import open_log
from hpo.streams import open_streams
from storage.home import home
from storage.leftovers import logs_of
from trainer import cores

PRELOADED = "hpo.executors.preloaded"
LIGHTNING = "lightning.pytorch"
"""Beside it where a study has LightningModules; it is as long as torch in coming."""
_OF_THE_TERMINAL = (signal.SIGINT, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class LocalWorker:
    """A worker process; `id` is what it calls itself in the database."""

    id: str
    index: int
    device: str
    log: Path
    process: ForkServerProcess
    started_at: float

    @property
    def exit_code(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        return self.process.exitcode

    @property
    def shown_at(self) -> int:
        """When its log was last written or touched, in nanoseconds; 0 if there is no log."""
        try:
            return self.log.stat().st_mtime_ns
        except OSError:
            return 0


class LocalExecutor:
    """Starts worker processes and sends them signals; says nothing of what they do."""

    def __init__(
        self,
        study_name: str,
        *,
        study_key: int,
        devices: Sequence[str],
        storage_url: str | None,
        command_line: Callable[[list[str]], None],
        pins: bool = True,
    ) -> None:
        """devices: one a worker, by torch's names, the same one as often as wanted.

        command_line: runs a command of ours in the process that calls it, and ends that process.
        pins: whether a worker on a CPU has one core of its own.
        """
        self._pins = pins
        self._study_name, self._devices = study_name, devices
        self._command_line = command_line
        self._logs = logs_of(study_key)
        self._environment = {} if storage_url is None else {"HPO_STORAGE": storage_url}
        self._num_started = 0
        # random, too: containers that share a host's name have the same pids
        self._launcher = f"{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(3)}"
        self._claims: dict[int, Claim] = {}
        self._cores: dict[int, int] = {}

    def close(self) -> None:
        """Leave the cores and GPUs of its workers, which have ended, to other launches."""
        for claim in self._claims.values():
            claim.release()
        self._claims.clear()
        self._cores.clear()

    @property
    def num_workers(self) -> int:
        """As many as devices were given."""
        return len(self._devices)

    def start(self, index: int) -> LocalWorker:
        """Start the worker of the index-th device."""
        warm_up()
        _stand_somewhere()
        self._num_started += 1
        device = self._devices[index]
        worker_id = f"{self._launcher}-{index}-{self._num_started}"
        log = self._logs / f"worker-{index}.log"
        os.close(open_log(log))  # what is wrong with it is said here, not in the worker
        arguments = ["worker", "--study", self._study_name, "--device", device]
        process = multiprocessing.get_context("forkserver").Process(
            target=_run_worker,
            args=(self._command_line, arguments),
            kwargs={
                "environment": {
                    **self._environment,
                    "HPO_WORKER_ID": worker_id,
                    "HPO_WORKER_PLACE": f"{self._launcher}/{device}",
                    "HPO_WORKER_CORES": str(num_cores()),
                },
                "log": log,
                "core": self._claimed(index),
            },
        )
        process.start()
        return LocalWorker(
            id=worker_id,
            index=index,
            device=device,
            log=log,
            process=process,
            started_at=time.monotonic(),
        )

    def _claimed(self, index: int) -> int | None:
        """The core that the worker of this index is pinned to; its GPU is counted as in use.

        A core that no other launch uses, while there is one.
        """
        device = self._devices[index]
        if device == "cpu" and not self._pins:
            return None
        if index not in self._claims:
            if device != "cpu":
                claim = claim_gpu(device_key(device))
                if claim is not None:
                    self._claims[index] = claim
                return None
            own = cores.cores()
            first = index % len(own)
            found = claim_core(own[first:] + own[:first])
            if found is None:
                return own[first]
            self._cores[index], self._claims[index] = found
        return self._cores.get(index)

    def wait(self, workers: Sequence[LocalWorker], seconds: float) -> None:
        """Until one of them has ended, or for so long."""
        multiprocessing.connection.wait([worker.process.sentinel for worker in workers], seconds)

    def signal(self, workers: Sequence[LocalWorker], number: signal.Signals) -> None:
        """Send a signal to those that live."""
        for worker in workers:
            if worker.exit_code is None and worker.process.pid is not None:
                os.kill(worker.process.pid, number)


def warm_up(*, for_modules: bool = False) -> None:
    """Start the server that workers are forked from, unless it runs: it loads torch meanwhile.

    for_modules: and Lightning.
    """
    short_folder_for_sockets()
    multiprocessing.set_forkserver_preload([PRELOADED, *([LIGHTNING] if for_modules else [])])
    # Ctrl-C and a closed terminal are the launcher's business, which tells the workers
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _OF_THE_TERMINAL}
    try:
        multiprocessing.forkserver.ensure_running()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    atexit.unregister(cool_down)
    atexit.register(cool_down)


def _stand_somewhere() -> None:
    """Leave a folder that was deleted while the study ran: no process can be started in it."""
    try:
        os.getcwd()
    except FileNotFoundError:
        os.chdir(home())


def cool_down() -> None:
    """End that server, if there is one, at once: left to itself it would finish what it loads and
    take torch apart, and whoever reads this process's output would wait for it.
    """
    pid = multiprocessing.forkserver._forkserver._forkserver_pid  # type: ignore[attr-defined]
    if pid is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def _run_worker(
    command_line: Callable[[list[str]], None],
    arguments: list[str],
    *,
    environment: Mapping[str, str],
    log: Path,
    core: int | None,
) -> None:
    """In the new process: a session of its own, for Ctrl-C is the launcher's to forward."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    output = open_log(log)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.close(output)
    open_streams()
    os.environ.update(environment)
    if core is not None and hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {core})
    command_line(arguments)


def settle_down(device: str | None) -> str:
    """Give this process, a worker that no launcher started, its device for as long as it lives.

    device: None is the one that fewest workers of this machine use. On a CPU the process is pinned
    to a core that nobody has claimed, if there is one. Imports torch.
    """
    from trainer.device import available_devices

    chosen = device or least_used(available_devices())[0]
    if chosen == "cpu":
        found = claim_core(cores.cores())
        if found is not None and hasattr(os, "sched_setaffinity"):
            core, claim = found
            os.environ.setdefault("HPO_WORKER_CORES", str(num_cores()))
            os.sched_setaffinity(0, {core})
            _held.append(claim)
    elif chosen in available_devices():
        claimed = claim_gpu(device_key(chosen))
        if claimed is not None:
            _held.append(claimed)
    return chosen


_held: list[Claim] = []
"""Of this process, until it ends."""


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
    """Cores that this process may use at once, by its affinity and its container's quota."""
    return cores.num_cores()


def cores_of_all_workers() -> int:
    """Cores that the launcher of this worker may use, which pins each worker to one of them.

    Raises UsageError if HPO_WORKER_CORES isn't a number of cores.
    """
    given = os.environ.get("HPO_WORKER_CORES")
    if given is None:
        return num_cores()
    if not (given.isascii() and given.isdecimal() and int(given) > 0):
        raise UsageError(f"HPO_WORKER_CORES must be a whole number >= 1, got {given[:80]!r}")
    return int(given)
