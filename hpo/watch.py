"""Watch a study's workers: replace those that die, show how it goes, know when it has ended."""

import contextlib
import logging
import math
import os
import signal
import time
import types
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from hpo.errors import ExitCode, Interrupted, StudyFailsError, UsageError, WorkersDie
from hpo.executors.local import LocalExecutor, LocalWorker
from hpo.progress import ProgressView
from hpo.status import how_to_go_on
from storage import leases
from storage.database import Database
from storage.errors import DatabaseUnreachable, StorageError
from storage.leftovers import logs_of, mark
from storage.snapshots import StudySnapshot, snapshot
from storage.studies import StudyRecord
from trainer.config import DataError

logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.5
_LEAVING_SECONDS = 15.0
_STARTING_SECONDS = 60.0
_QUIET_SECONDS, _SAY_AGAIN_SECONDS = 30.0, 60.0
"""After these a worker that isn't known in the database is named, and named again."""
_LONG_LIFE_SECONDS = 60.0
"""A worker that lived for so long was well when it started."""
_FIRST_PAUSE_SECONDS, _LONGEST_PAUSE_SECONDS = 0.25, 5.0
_MOST_IDLE_DEATHS = 5
_MOST_IDLE_KILLS = 12
"""Of workers that a signal ended: somebody else may have sent it."""
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_REFUSALS: dict[int, type[Exception]] = {
    ExitCode.USAGE: UsageError,
    ExitCode.DATABASE: StorageError,
    ExitCode.DATA: DataError,
}
"""Exit codes of a worker that can't work here, however often it is started."""
_OF_ITS_TRIAL = (ExitCode.GIVEN_BACK, ExitCode.INTERRUPTED)
"""Exit codes of a worker that could work: its trial had an error, or it was asked to leave."""


@dataclass(kw_only=True)
class _Slot:
    """The place of one worker: those that replace it have the same."""

    index: int
    worker: LocalWorker | None = None
    start_at: float = 0.0
    """When the next worker is due, by the monotonic clock."""
    deaths: int = 0
    """In a row, without work done in between."""
    idle_deaths: int = 0
    """Of those, deaths of workers that held no trial; the trial's end bounds the others."""
    is_done: bool = False
    refusal: Exception | None = None
    """Why no other worker is started here."""

    @property
    def is_open(self) -> bool:
        """Whether a worker runs here, or will."""
        return not self.is_done and self.refusal is None


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
    _slots: list[_Slot] = field(default_factory=list)
    _received: signal.Signals | None = None
    _unseen_since: dict[str, float] = field(default_factory=dict)
    _named_at: dict[str, float] = field(default_factory=dict)
    """Worker id -> when it is to be named (again) as one that isn't at work."""
    _last_seen_at: dict[str, tuple[int | None, int | None]] = field(default_factory=dict)
    """Worker id -> the trial and step that it was at."""
    _shown_at: dict[str, int] = field(default_factory=dict)
    """Worker id -> when it last showed that it waits for the database, by its log's time."""

    def run(self) -> StudySnapshot:
        """The study when there is nothing more to do for its workers, and they have left.

        A database that is away is waited for until a signal comes. Raises Interrupted after one,
        StudyFailsError, WorkersDie, StudyDeleted; UsageError, StorageError or DataError if all
        workers refuse to work.
        """
        self.database.patience_seconds = math.inf
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            study = snapshot(self.database, self.record.study_id)
            if study.num_finished < study.budget:
                self._slots = [_Slot(index=index) for index in range(self.executor.num_workers)]
                for slot in self._slots:
                    slot.worker = self.executor.start(slot.index)
                with contextlib.suppress(OSError):
                    mark(self.database, logs_of(self.record.checkpoint_key))
            with self.view:
                while self._received is None and self._look():
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
            self.executor.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    @property
    def _workers(self) -> list[LocalWorker]:
        return [slot.worker for slot in self._slots if slot.worker is not None]

    def _look(self) -> bool:
        """Replace workers that have died, show the study; whether there is anything to wait for.

        Not where a worker has left since the budget is used up: the others would see it at their
        next claim.
        """
        for slot in self._slots:
            worker = slot.worker
            if worker is None:
                if slot.is_open and time.monotonic() >= slot.start_at:
                    slot.worker = self.executor.start(slot.index)
            elif worker.exit_code is not None:
                slot.worker = None
                self._ended(slot, worker, worker.exit_code)
        study = snapshot(self.database, self.record.study_id)
        self._note_work(study)
        self._name_absent(study)
        self._end_hanging(study)
        self.view.show(study)
        is_done = [slot.is_done for slot in self._slots]
        if any(slot.is_open for slot in self._slots):
            return not (any(is_done) and study.num_finished >= study.budget)
        refusals = [slot.refusal for slot in self._slots if slot.refusal is not None]
        if refusals and not any(is_done):
            raise refusals[-1]
        return False

    def _ended(self, slot: _Slot, worker: LocalWorker, code: int) -> None:
        """Decide what becomes of the place of a worker that has ended."""
        if code == ExitCode.DONE:
            slot.is_done = True
            return
        if code == ExitCode.STUDY_FAILS:
            raise StudyFailsError(self._why_it_fails())
        ended = _in_words(code)
        held_a_trial = leases.forget_worker(self.database, worker.id, cause=ended)
        if code in _REFUSALS:
            self._close(slot, _REFUSALS[code](_last_words(worker)), worker)
            return
        if time.monotonic() - worker.started_at > _LONG_LIFE_SECONDS:
            slot.deaths = slot.idle_deaths = 0
        slot.deaths += 1
        slot.idle_deaths += not held_a_trial and code not in _OF_ITS_TRIAL
        if slot.idle_deaths > (_MOST_IDLE_KILLS if code < 0 else _MOST_IDLE_DEATHS):
            error = WorkersDie(f"workers end {ended}: {_last_words(worker)} (see {worker.log})")
            self._close(slot, error, worker)
            return
        pause = 0.0 if slot.deaths == 1 else _FIRST_PAUSE_SECONDS * 2 ** min(slot.deaths - 2, 10)
        slot.start_at = time.monotonic() + min(pause, _LONGEST_PAUSE_SECONDS)
        logger.warning("worker %s ended %s: starting another", worker.id, ended)

    def _close(self, slot: _Slot, refusal: Exception, worker: LocalWorker) -> None:
        slot.refusal = refusal
        if any(other.is_open for other in self._slots):
            logger.warning(
                "no other worker is started on %s, the study goes on with the rest: %s",
                worker.device,
                refusal,
            )

    def _note_work(self, study: StudySnapshot) -> None:
        """A worker that got from one step to the next, or from a trial to the next, is well."""
        slots = {slot.worker.id: slot for slot in self._slots if slot.worker is not None}
        for seen in study.workers:
            now, before = (seen.trial, seen.step), self._last_seen_at.get(seen.id)
            if seen.id in slots and before is not None and before[0] is not None and now != before:
                slots[seen.id].deaths = slots[seen.id].idle_deaths = 0
            self._last_seen_at[seen.id] = now

    def _name_absent(self, study: StudySnapshot) -> None:
        """Say what workers wait for that live and aren't at work, such as a database that takes
        connections to read and has no room to write: a user would see a launch that does nothing.
        """
        now = time.monotonic()
        seen = {worker.id for worker in study.workers}
        for worker in self._workers:
            if worker.id in seen:
                self._named_at[worker.id] = now + _QUIET_SECONDS
            elif now >= self._named_at.setdefault(worker.id, worker.started_at + _QUIET_SECONDS):
                self._named_at[worker.id] = now + _SAY_AGAIN_SECONDS
                logger.warning(
                    "worker %s isn't at work; its log %s ends: %s",
                    worker.id,
                    worker.log,
                    _last_words(worker),
                )

    def _end_hanging(self, study: StudySnapshot) -> None:
        """Kill workers that live and don't show it for long (stopped, or stuck in one call).

        One that waits for a connection can't show it in the database: it touches its log.
        """
        now = time.monotonic()
        seen = {worker.id for worker in study.workers}
        for worker in self._workers:
            if (
                worker.id in seen
                or now - worker.started_at < _STARTING_SECONDS
                or self._waits_for_the_database(worker)
            ):
                self._unseen_since.pop(worker.id, None)
            elif now - self._unseen_since.setdefault(worker.id, now) > self.lease_seconds:
                logger.warning("worker %s gives no sign of life: killed", worker.id)
                worker.process.kill()

    def _waits_for_the_database(self, worker: LocalWorker) -> bool:
        """Whether it has shown so, in the time of its log, since it was last asked."""
        before, shown = self._shown_at.get(worker.id), worker.shown_at
        self._shown_at[worker.id] = shown
        return before is not None and shown != before

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
        workers = self._workers
        self.executor.signal(workers, signal.SIGTERM)
        deadline = time.monotonic() + _LEAVING_SECONDS
        for worker in workers:
            worker.process.join(max(0.0, deadline - time.monotonic()))
            if worker.exit_code is None:
                worker.process.kill()
                worker.process.join()
                with contextlib.suppress(DatabaseUnreachable):  # its lease runs out by itself
                    leases.forget_worker(self.database, worker.id)
        self._slots = []

    def _on_signal(self, number: int, _frame: types.FrameType | None) -> None:
        if self._received is not None:
            for worker in self._workers:
                worker.process.kill()
            os._exit(ExitCode.INTERRUPTED)
        self._received = signal.Signals(number)
        self.database.cancelled.set()


def _in_words(code: int) -> str:
    """How a process ended."""
    if code >= 0:
        return f"with exit code {code}"
    with contextlib.suppress(ValueError):
        name = signal.Signals(-code).name
        hint = ", which the kernel sends when memory is used up" if name == "SIGKILL" else ""
        return f"by signal {-code} ({name}{hint})"
    return f"by signal {-code}"


def _last_words(worker: LocalWorker) -> str:
    """What the worker said at its end, as the command line says it."""
    return last_line(worker.log).removeprefix("hpo: ")


def last_line(log: Path) -> str:
    """The last line of a log file that says anything."""
    try:
        lines: Sequence[str] = log.read_text(errors="replace").splitlines()
    except OSError:
        return "no log"
    return next((line for line in reversed(lines) if line.strip()), "nothing in its log")
