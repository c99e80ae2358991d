"""A worker: one process, bound to one device. Claim, train, report, tell, until nothing is left."""

import contextlib
import logging
import multiprocessing
import os
import secrets
import signal
import socket
import threading
import time
import types
from dataclasses import dataclass, field
from typing import NoReturn

from hpo.errors import ExitCode, described, exit_code, is_of_the_machine, one_line
from hpo.logs import touch_log
from hpo.objective import TrialRun
from hpo.readiness import check_device, check_networks
from hpo.spec import StudySpec
from hpo.spent import Spent
from storage import leases
from storage.database import OUTAGE_SECONDS, Database
from storage.errors import DatabaseUnreachable, LeaseLost, StudyNotFound
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


class GivenBack(Exception):
    """An error ended the trial's attempt, and ends this process: the message says which."""


@dataclass
class Pulse:
    """What the training thread, the keeper thread and the signals tell one another."""

    last_beat: float = field(default_factory=time.monotonic)
    leaving: threading.Event = field(default_factory=threading.Event)
    signalled: bool = False
    taken: bool = False
    has_launcher: bool = False

    def wait(self) -> None:
        """Called while the training waits for the database: it doesn't hang."""
        self.last_beat = time.monotonic()
        self.show()

    def show(self) -> None:
        """Show the launcher that this process lives where the database can't: by its log's time."""
        if self.has_launcher:
            touch_log()

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
        self._database, self._worker_id, self._spec, self._pulse = database, worker_id, spec, pulse
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
                self._pulse.show()
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
        said = f"no optimizer step in {self._spec.stall_seconds:.0f} s: it hung"
        logger.error("%s, and this worker ends", said)
        with contextlib.suppress(Exception):
            leases.forget_worker(self._database, self._worker_id, cause=said)
        os._exit(ExitCode.GIVEN_BACK)


class Worker:
    """Runs trials of one study on one device."""

    def __init__(
        self,
        database: Database,
        study_name: str,
        *,
        device: str,
        given_id: str | None = None,
        place: str | None = None,
    ) -> None:
        """given_id: what a launcher calls this worker; None for one that stands alone. place: what
        it shares with the workers that replace it.
        """
        self._free_since = time.perf_counter()
        self._database, self._study_name, self._device = database, study_name, device
        self._pulse = Pulse(has_launcher=given_id is not None)
        self._host = socket.gethostname()
        self._is_launched = given_id is not None
        self._worker_id = given_id or f"{self._host}-{os.getpid()}-{secrets.token_hex(3)}"
        self._place = place
        self._keeper: LeaseKeeper | None = None
        self._is_preparing = False

    def run(self) -> ExitCode:
        """Work until the study has no more for this worker.

        Raises StorageError, StudyNotFound, UsageError, ConfigError or DataError if it can't begin.
        """
        for received in _LEAVE:
            signal.signal(received, self._on_signal)
        try:
            self._open()
            self._prepare()
            return self._work()
        except (Leave, KeyboardInterrupt):
            return self._left()
        except GivenBack as error:
            logger.error("this worker ends: %s", error)
            return ExitCode.GIVEN_BACK
        except StudyNotFound:
            if self._keeper is None:
                raise
            logger.warning("the study was deleted: leaving")
            return ExitCode.DONE
        except DatabaseUnreachable as error:
            if self._pulse.leaving.is_set():
                return self._left()
            if self._keeper is None and not self._is_launched:
                raise
            # no trial is ended by it: its lease runs out, and its checkpoints stay
            logger.error("leaving, since the database stays away: %s", error)
            return ExitCode.GIVEN_BACK
        finally:
            self._leave()

    def _open(self) -> None:
        """The database and the study; from here on the worker is known to be there."""
        check_checkpoint_place()
        database = self._database
        database.cancelled = self._pulse.leaving
        database.while_waiting = self._pulse.wait
        if self._is_launched:  # its launcher has found the database: where it is full, there
            database.patience_seconds = OUTAGE_SECONDS  # will be room
        database.open()
        database.patience_seconds = OUTAGE_SECONDS
        ensure_tables(database)
        self._record = find_study(database, self._study_name)
        self._spec = StudySpec.from_json(self._record.spec)
        self._register("starting")
        self._keeper = LeaseKeeper(database, self._worker_id, self._spec, self._pulse)
        self._keeper.start()

    def _prepare(self) -> None:
        """What each trial needs, before the first one is claimed."""
        self._is_preparing = True
        try:
            check_device(self._spec, self._device)
            check_networks(self._spec)
            self._data = self._spec.load_data()
        except Exception as error:
            said = one_line(error) if exit_code(error) is not None else described(error)
            leases.mark_sick(self._database, self._worker_id, said)
            raise
        finally:
            self._is_preparing = False
        self._study = OpenStudy(self._database, self._record)
        self._register("working")

    def _register(self, state: str) -> None:
        leases.register_worker(
            self._database,
            self._record.study_id,
            self._worker_id,
            host=self._host,
            pid=os.getpid(),
            device=self._device,
            place=self._place,
            state=state,
        )

    def _leave(self) -> None:
        if self._keeper is None:
            return
        self._keeper.ended.set()
        self._database.patience_seconds = 5.0
        with contextlib.suppress(DatabaseUnreachable):  # the lease runs out by itself
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
        """One attempt. Raises Leave, and GivenBack after an error that is no result."""
        assert self._keeper is not None
        self._pulse.taken, self._pulse.last_beat = False, time.monotonic()
        self._keeper.lease = lease
        trial: TrialRun | None = None
        try:
            trial = TrialRun(
                self._study,
                self._spec,
                lease,
                self._data,
                device=self._device,
                pulse=self._pulse.beat,
                is_leaving=self._pulse.leaving.is_set,
                spent=Spent(worker_id=self._worker_id, since=self._free_since),
            )
            logger.info("trial %d: attempt %d", trial.number, lease.attempts)
            outcome = trial.run()
            logger.info("trial %d: %s, %s", trial.number, outcome.state.name, outcome.reason)
        except Leave:
            leases.release(self._database, lease)
            raise
        except (LeaseLost, TrialTaken):
            logger.warning("the lease is gone: somebody else has the trial")
        except (DatabaseUnreachable, StudyNotFound):
            raise
        except Exception as error:
            if self._pulse.leaving.is_set():
                leases.release(self._database, lease)
                raise Leave from error
            self._end_after(error, lease, trial)
        finally:
            self._keeper.lease = None
            self._free_since = time.perf_counter()

    def _end_after(self, error: Exception, lease: Lease, trial: TrialRun | None) -> NoReturn:
        """Give the trial back, or end it if it has failed before in another process.

        This process ends either way: what the error has left behind in it (a dead CUDA context,
        half a library) would meet the next trial.
        """
        said = described(error)
        logger.error("an error ended an attempt at a trial", exc_info=error)
        of_the_machine = is_of_the_machine(error)
        try:
            if trial is not None and lease.errors and not of_the_machine:
                trial.fail(error)
                said = f"trial {trial.number} has failed again and is ended: {said}"
            else:
                leases.give_back(self._database, lease, said, may_be_the_trials=not of_the_machine)
                number = "a trial" if trial is None else f"trial {trial.number}"
                said = f"{number} is given back: {said}"
        except LeaseLost:
            logger.warning("the lease is gone: somebody else has the trial")
        if of_the_machine:
            leases.mark_sick(self._database, self._worker_id, said)
        raise GivenBack(said) from error

    def _on_signal(self, _number: int, _frame: types.FrameType | None) -> None:
        if self._pulse.leaving.is_set():
            os._exit(ExitCode.INTERRUPTED)
        self._pulse.signalled = True
        self._pulse.leaving.set()
        if self._is_preparing:  # reading data may take minutes, and holds no trial
            raise KeyboardInterrupt
