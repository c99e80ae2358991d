"""A worker: one process, bound to one device. Claim, train, report, tell, until nothing is left."""

import contextlib
import logging
import multiprocessing
import os
import signal
import socket
import threading
import time
import types
from dataclasses import dataclass, field
from typing import NoReturn

from hpo.errors import ExitCode
from hpo.objective import TrialRun
from hpo.spec import StudySpec
from hpo.spent import Spent
from storage import leases
from storage.database import OUTAGE_SECONDS, Database
from storage.errors import LeaseLost, StudyNotFound
from storage.leases import Lease, NoWork
from storage.schema import ensure_tables
from storage.studies import OpenStudy, check_checkpoint_place, find_study

logger = logging.getLogger(__name__)
_BUSY_POLL_SECONDS = 1.0
_LEAVE = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Leave(Exception):
    """This worker is to give its trial back and go."""


class TrialTaken(Exception):
    """Somebody else has the trial: stop quietly."""


@dataclass
class Pulse:
    """What the training thread, the keeper thread and the signals tell one another."""

    last_beat: float = field(default_factory=time.monotonic)
    leaving: threading.Event = field(default_factory=threading.Event)
    signalled: bool = False
    taken: bool = False

    def wait(self) -> None:
        """Called while the training waits for the database: it doesn't hang."""
        self.last_beat = time.monotonic()

    def beat(self) -> None:
        """Called before each batch. Raises Leave or TrialTaken where the training must end."""
        self.last_beat = time.monotonic()
        if self.leaving.is_set():
            raise Leave
        if self.taken:
            raise TrialTaken


class LeaseKeeper(threading.Thread):
    """Shows that the worker lives, and renews its lease while its training advances.

    Survives whatever the database does. Three times in a lease's time; more often after a failure,
    for where the server has no connection left, the trainer's own is free a moment later.
    """

    def __init__(self, database: Database, worker_id: str, spec: StudySpec, pulse: Pulse) -> None:
        super().__init__(name="lease-keeper", daemon=True)
        self._database, self._worker_id = database, worker_id
        self._spec, self._pulse = spec, pulse
        self.lease: Lease | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        """Until `ended` is set, or the process ends."""
        failed = False
        while not self.ended.wait(self._spec.lease_seconds / (30 if failed else 3)):
            lease = self.lease
            if lease is not None and self._stalls():
                self._give_up()
            try:
                renewal = leases.renew(
                    self._database,
                    lease,
                    self._worker_id,
                    lease_seconds=self._spec.lease_seconds,
                )
            except Exception as error:
                reason = " ".join(str(error).split())[:200]
                logger.log(
                    logging.DEBUG if failed else logging.WARNING,
                    "can't renew the lease now: %s",
                    reason,
                )
                failed = True
                continue
            failed = False
            if not renewal.study_goes_on:
                self._pulse.leaving.set()
            if not renewal.holds_lease and lease is self.lease:
                self._pulse.taken = True

    def _stalls(self) -> bool:
        return time.monotonic() - self._pulse.last_beat > self._spec.stall_seconds

    def _give_up(self) -> NoReturn:
        """A training that hangs can't be stopped but with its process; its trial is free then."""
        logger.error("no batch in %.0f s: this worker hangs and ends", self._spec.stall_seconds)
        with contextlib.suppress(Exception):
            leases.forget_worker(self._database, self._worker_id)
        os._exit(ExitCode.UNEXPECTED)


class Worker:
    """Runs trials of one study on one device."""

    def __init__(
        self, database: Database, study_name: str, *, device: str, given_id: str | None = None
    ) -> None:
        """given_id: what a launcher calls this worker; None for one that stands alone.

        Raises StorageError, StudyNotFound, UsageError or DataError if it can't begin.
        """
        self._free_since = time.perf_counter()
        self._database, self._device = database, device
        self._pulse = Pulse()
        check_checkpoint_place()
        database.open()
        database.patience_seconds = OUTAGE_SECONDS
        database.cancelled = self._pulse.leaving
        database.while_waiting = self._pulse.wait
        ensure_tables(database)
        record = find_study(database, study_name)
        self._spec = StudySpec.from_json(record.spec)
        self._study = OpenStudy(database, record)
        self._data = self._spec.load_data()
        host = socket.gethostname()
        self._worker_id = given_id or f"{host}-{os.getpid()}"
        leases.register_worker(
            database, record.study_id, self._worker_id, host=host, pid=os.getpid(), device=device
        )
        self._keeper = LeaseKeeper(database, self._worker_id, self._spec, self._pulse)

    def run(self) -> ExitCode:
        """Work until the study has no more for this worker."""
        for received in _LEAVE:
            signal.signal(received, self._on_signal)
        self._keeper.start()
        try:
            return self._work()
        except Leave:
            return self._left()
        except StudyNotFound:
            logger.warning("the study was deleted: leaving")
            return ExitCode.DONE
        finally:
            self._keeper.ended.set()
            self._database.patience_seconds = 5.0
            leases.forget_worker(self._database, self._worker_id)

    def _work(self) -> ExitCode:
        while not self._pulse.leaving.is_set():
            launcher = multiprocessing.parent_process()
            if launcher is not None and not launcher.is_alive():
                logger.warning("the launcher is gone: leaving")
                return ExitCode.INTERRUPTED
            claimed = leases.claim(
                self._database,
                self._study.record.study_id,
                self._worker_id,
                lease_seconds=self._spec.lease_seconds,
            )
            if isinstance(claimed, Lease):
                self._run_trial(claimed)
            elif claimed is NoWork.BUSY:
                self._pulse.leaving.wait(min(_BUSY_POLL_SECONDS, self._spec.lease_seconds / 5))
            else:
                logger.info("nothing to do: %s", claimed.value)
                failing = claimed is NoWork.FAILING
                return ExitCode.STUDY_FAILS if failing else ExitCode.DONE
        return self._left()

    def _left(self) -> ExitCode:
        return ExitCode.INTERRUPTED if self._pulse.signalled else ExitCode.DONE

    def _run_trial(self, lease: Lease) -> None:
        self._pulse.taken, self._pulse.last_beat = False, time.monotonic()
        self._keeper.lease = lease
        try:
            trial = TrialRun(
                self._study,
                self._spec,
                lease,
                self._data,
                device=self._device,
                pulse=self._pulse.beat,
                spent=Spent(worker_id=self._worker_id, since=self._free_since),
            )
            logger.info("trial %d: attempt %d", trial.number, lease.attempts)
            try:
                outcome = trial.run()
            except (Leave, LeaseLost, TrialTaken):
                raise
            except Exception as error:
                if self._pulse.leaving.is_set():
                    raise Leave from error
                logger.exception("trial %d failed", trial.number)
                outcome = trial.fail(error)
            logger.info("trial %d: %s, %s", trial.number, outcome.state.name, outcome.reason)
        except Leave:
            leases.release(self._database, lease)
            raise
        except (LeaseLost, TrialTaken):
            logger.warning("the lease is gone: somebody else has the trial")
        finally:
            self._keeper.lease = None
            self._free_since = time.perf_counter()

    def _on_signal(self, _number: int, _frame: types.FrameType | None) -> None:
        if self._pulse.leaving.is_set():
            os._exit(ExitCode.INTERRUPTED)
        self._pulse.signalled = True
        self._pulse.leaving.set()
