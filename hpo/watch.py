"""Watch a study's workers: replace those that die, show how it goes, know when it has ended."""

import logging
import os
import signal
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpo.errors import ExitCode, Interrupted, StudyFailsError, WorkersDie
from hpo.executors.local import LocalExecutor, LocalWorker
from hpo.progress import ProgressView
from hpo.status import how_to_go_on
from storage import leases
from storage.database import OUTAGE_SECONDS, Database
from storage.errors import DatabaseUnreachable
from storage.snapshots import StudySnapshot, snapshot
from storage.studies import StudyRecord

logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.5
_LEAVING_SECONDS = 15.0
_MOST_DEATHS_IN_A_ROW = 5
_STARTING_SECONDS = 60.0
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(kw_only=True)
class Watch:
    """Keeps a study's workers alive until there is no work, and shows how it goes."""

    database: Database
    record: StudyRecord
    executor: LocalExecutor
    view: ProgressView
    lease_seconds: float
    command: str
    """What a user types to go on after an interruption."""
    _workers: list[LocalWorker] = field(default_factory=list)
    _received: signal.Signals | None = None
    _deaths_in_a_row: int = 0
    _unseen_since: dict[str, float] = field(default_factory=dict)

    def run(self) -> StudySnapshot:
        """The study when there is nothing more to do for its workers, and they have left.

        Raises Interrupted after a signal, StudyFailsError, WorkersDie, DatabaseUnreachable,
        StudyDeleted.
        """
        self.database.patience_seconds = OUTAGE_SECONDS
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            study = snapshot(self.database, self.record.study_id)
            if study.num_finished < study.budget:
                self._workers = [
                    self.executor.start(index) for index in range(self.executor.num_workers)
                ]
            with self.view:
                while self._workers and self._received is None and self._look():
                    self.executor.wait(self._workers, _POLL_SECONDS)
            if self._received is not None:
                raise Interrupted(f"interrupted: {self._left()}")
            self._end_workers()
            return snapshot(self.database, self.record.study_id)
        except DatabaseUnreachable as error:
            if self._received is None:
                raise
            raise Interrupted(f"interrupted: {error}") from error
        finally:
            self._end_workers()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _look(self) -> bool:
        """Replace workers that have died, show the study; whether there is anything to wait for.

        Not where a worker has left since the budget is used up: the others would see it at their
        next claim.
        """
        one_is_done = False
        for worker in list(self._workers):
            code = worker.exit_code
            if code is None:
                continue
            self._workers.remove(worker)
            if code == ExitCode.STUDY_FAILS:
                raise StudyFailsError(self._why_it_fails())
            if code != ExitCode.DONE:
                self._replace(worker, code)
            one_is_done |= code == ExitCode.DONE
        study = snapshot(self.database, self.record.study_id)
        self._end_hanging(study)
        self.view.show(study)
        used_up = one_is_done and study.num_finished >= study.budget
        return bool(self._workers) and not used_up

    def _end_hanging(self, study: StudySnapshot) -> None:
        """Kill workers that live and don't show it for long (stopped, or stuck in one call)."""
        now = time.monotonic()
        seen = {worker.id for worker in study.workers}
        for worker in self._workers:
            if worker.id in seen or now - worker.started_at < _STARTING_SECONDS:
                self._unseen_since.pop(worker.id, None)
            elif now - self._unseen_since.setdefault(worker.id, now) > self.lease_seconds:
                logger.warning("worker %s gives no sign of life: killed", worker.id)
                worker.process.kill()

    def _replace(self, worker: LocalWorker, code: int) -> None:
        leases.forget_worker(self.database, worker.id)
        lived = time.monotonic() - worker.started_at
        self._deaths_in_a_row = 1 if lived > 60 else self._deaths_in_a_row + 1
        ended = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        # one that a signal asked to leave or killed could have worked
        failed = code > 0 and code != ExitCode.INTERRUPTED
        most = max(_MOST_DEATHS_IN_A_ROW, 2 * self.executor.num_workers)
        if failed and self._deaths_in_a_row > most:
            raise WorkersDie(f"workers end {ended}: {last_line(worker.log)} (see {worker.log})")
        logger.warning("worker %s ended %s: starting another", worker.id, ended)
        self._workers.append(self.executor.start(worker.index))

    def _why_it_fails(self) -> str:
        trials = snapshot(self.database, self.record.study_id).trials
        reasons = [trial.attributes.get("reason") for trial in trials if trial.state == "FAIL"]
        return f"{len(reasons)} trials failed, the last one: {reasons[-1] if reasons else '-'}"

    def _left(self) -> str:
        try:
            study = snapshot(self.database, self.record.study_id)
        except DatabaseUnreachable as error:
            return f"{error}"
        return how_to_go_on(study, self.command)

    def _end_workers(self) -> None:
        """Ask them to leave; those that don't are killed, and their trials are free at once."""
        self.executor.signal(self._workers, signal.SIGTERM)
        deadline = time.monotonic() + _LEAVING_SECONDS
        for worker in self._workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.exit_code is None:
                worker.process.kill()
                worker.process.join()
                leases.forget_worker(self.database, worker.id)
        self._workers = []

    def _on_signal(self, number: int, _frame: types.FrameType | None) -> None:
        if self._received is not None:
            for worker in self._workers:
                worker.process.kill()
            os._exit(ExitCode.INTERRUPTED)
        self._received = signal.Signals(number)
        self.database.cancelled.set()


def last_line(log: Path) -> str:
    """The last line of a log file that says anything."""
    try:
        lines: Sequence[str] = log.read_text(errors="replace").splitlines()
    except OSError:
        return "no log"
    return next((line for line in reversed(lines) if line.strip()), "nothing in its log")
