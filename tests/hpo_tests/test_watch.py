"""Which ends of workers a launcher bears, and which it doesn't; real processes that end at once."""

import io
import multiprocessing
import multiprocessing.connection
import os
import re
import signal
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from optuna.trial import TrialState

from hpo import watch
from hpo.errors import ExitCode, Interrupted, UsageError, WorkersDie
from hpo.executors.local import LocalWorker
from hpo.progress import ProgressView
from hpo.watch import Watch
from hpo.worker import Pulse
from storage.database import Database
from storage.errors import StorageError
from storage.leases import Lease, claim, forget_worker, register_worker
from storage.studies import OpenStudy, StudyRecord
from tests.parts import make_study
from trainer.config import DataError


class Ending:
    """An executor whose workers end with these codes, one after the other."""

    num_workers = 1

    def __init__(self, codes: Iterator[int], log: Path) -> None:
        self._codes, self._log = codes, log
        self.num_started = 0

    def start(self, index: int) -> LocalWorker:
        self.num_started += 1
        code = next(self._codes)
        process = multiprocessing.get_context("forkserver").Process(target=os._exit, args=(code,))
        process.start()
        return LocalWorker(
            id=f"w-{self.num_started}",
            index=index,
            device="cpu",
            log=self._log,
            process=cast(Any, process),
            started_at=time.monotonic(),
        )

    def wait(self, workers: Sequence[LocalWorker], seconds: float) -> None:
        multiprocessing.connection.wait([worker.process.sentinel for worker in workers], seconds)

    def signal(self, *_: object) -> None:
        """Nobody is left."""

    def close(self) -> None:
        """Nothing is claimed."""


def watched(database: Database, executor: Ending, record: StudyRecord | None = None) -> Watch:
    return Watch(
        database=database,
        record=record or make_study(database),
        executor=cast(Any, executor),
        view=ProgressView("study", num_epochs=1, stream=io.StringIO()),
        lease_seconds=30,
        command="hpo launch",
    )


class OneWaits(Ending):
    """The first worker ends the study's last trial, the second one would wait for minutes."""

    num_workers = 2

    def __init__(self, database: Database, record: StudyRecord, log: Path) -> None:
        super().__init__(iter([int(ExitCode.DONE)]), log)
        self._database, self._study = database, OpenStudy(database, record)
        self.told: list[str] = []

    def start(self, index: int) -> LocalWorker:
        if index == 0:
            study_id = self._study.record.study_id
            lease = claim(self._database, study_id, "w-1", lease_seconds=30)
            assert isinstance(lease, Lease)
            self._study.bind(lease)
            self._study.end(lease, TrialState.COMPLETE, value=0.5, reason="whole")
            return super().start(index)
        self.num_started += 1
        process = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(300,))
        process.start()
        register_worker(
            self._database, self._study.record.study_id, "w-2", host="", pid=1, device="cpu"
        )
        return LocalWorker(
            id="w-2",
            index=index,
            device="cpu",
            log=self._log,
            process=cast(Any, process),
            started_at=time.monotonic(),
        )

    def signal(self, *given: Any) -> None:
        workers, number = given
        for worker in workers:
            self.told.append(worker.id)
            forget_worker(self._database, worker.id)  # as a worker does itself
            os.kill(worker.process.pid, number)


def test_when_one_worker_finds_the_budget_used_up_the_others_are_told(
    database: Database, tmp_path: Path
) -> None:
    record = make_study(database, budget=1)
    executor = OneWaits(database, record, tmp_path / "log")
    ended = watched(database, executor, record).run()
    assert ended.num_finished == 1
    assert ended.workers == ()
    assert executor.told == ["w-2"]
    assert executor.num_started == 2


class OneIsSilent(OneWaits):
    """Its worker lives and never makes itself known; then the user presses Ctrl-C."""

    num_workers = 1

    def start(self, index: int) -> LocalWorker:
        worker = super().start(index + 1)
        forget_worker(self._database, worker.id)
        return worker

    def wait(self, *_given: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize(("patience_seconds", "is_named"), [(0.0, True), (1e9, False)])
def test_what_a_worker_waits_for_that_isn_t_at_work_is_said(
    patience_seconds: float,
    is_named: bool,
    database: Database,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("hpo.watch._QUIET_SECONDS", patience_seconds)
    log = tmp_path / "worker-0.log"
    log.write_text("waiting for the database (61 s so far): No space left on device\n")
    record = make_study(database, budget=1)
    with pytest.raises(Interrupted):
        watched(database, OneIsSilent(database, record, log), record).run()
    words = "its log .* ends: waiting for the database .* No space left on device"
    assert bool(re.search(words, caplog.text)) == is_named


def test_workers_that_end_before_they_work_end_the_launch_with_their_last_words(
    database: Database, tmp_path: Path
) -> None:
    (tmp_path / "log").write_text("Traceback\nRuntimeError: no such thing\n")
    executor = Ending(iter([1] * 50), tmp_path / "log")
    with pytest.raises(WorkersDie, match="exit code 1: RuntimeError: no such thing"):
        watched(database, executor).run()
    assert executor.num_started < 10


@pytest.mark.parametrize(
    ("code", "error"),
    [
        (ExitCode.USAGE, UsageError),
        (ExitCode.DATABASE, StorageError),
        (ExitCode.DATA, DataError),
    ],
)
def test_a_worker_that_refuses_to_work_is_not_started_again_and_its_words_end_the_launch(
    code: ExitCode, error: type[Exception], database: Database, tmp_path: Path
) -> None:
    (tmp_path / "log").write_text("hpo: the data is another\n")
    executor = Ending(iter([int(code)] * 50), tmp_path / "log")
    with pytest.raises(error, match=r"^the data is another$"):
        watched(database, executor).run()
    assert executor.num_started == 1


def wait_for_a_connection(log: str, begun: Any, *, seconds: float, shows: bool) -> None:
    """A worker that has no connection for so long, and then finds nothing to do."""
    begun.set()
    os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT, 0o600), 1)
    pulse = Pulse(has_launcher=shows)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        pulse.wait()
        time.sleep(0.1)
    os._exit(ExitCode.DONE)


class Unknown(Ending):
    """Workers that the database never hears of; the first one of them may give no sign of life."""

    def __init__(self, log: Path, *, shows: bool) -> None:
        super().__init__(iter([]), log)
        self._first_shows = shows

    def start(self, index: int) -> LocalWorker:
        self.num_started += 1
        context = multiprocessing.get_context("forkserver")
        begun = context.Event()
        process = context.Process(
            target=wait_for_a_connection,
            args=(str(self._log), begun),
            kwargs={"seconds": 6.0, "shows": self._first_shows or self.num_started > 1},
        )
        process.start()
        assert begun.wait(60)
        return LocalWorker(
            id=f"w-{self.num_started}",
            index=index,
            device="cpu",
            log=self._log,
            process=cast(Any, process),
            started_at=time.monotonic(),
        )


@pytest.mark.parametrize(("shows", "num_started"), [(True, 1), (False, 2)])
def test_a_worker_that_waits_for_a_connection_is_not_taken_for_one_that_hangs(
    shows: bool,
    num_started: int,
    database: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(watch, "_STARTING_SECONDS", 0.0)
    executor = Unknown(tmp_path / "log", shows=shows)
    launch = watched(database, executor)
    launch.lease_seconds = 3.0
    launch.run()
    assert executor.num_started == num_started


class OneRefuses(Ending):
    """The first worker refuses to work, the second one finds the budget used up."""

    num_workers = 2


def test_where_one_worker_refuses_the_others_go_on(database: Database, tmp_path: Path) -> None:
    (tmp_path / "log").write_text("hpo: no such device\n")
    executor = OneRefuses(iter([int(ExitCode.USAGE), int(ExitCode.DONE)]), tmp_path / "log")
    watched(database, executor).run()
    assert executor.num_started == 2


def test_pauses_between_workers_that_die_grow(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "_FIRST_PAUSE_SECONDS", 2.0)
    executor = Ending(iter([]), tmp_path / "log")
    launch = watched(database, executor)
    slot = watch._Slot(index=0)
    worker = LocalWorker(
        id="w", index=0, device="cpu", log=tmp_path / "log", process=cast(Any, None),
        started_at=time.monotonic(),
    )  # fmt: skip
    due = []
    for _ in range(5):
        launch._ended(slot, worker, int(ExitCode.GIVEN_BACK))
        due.append(round(max(0.0, slot.start_at - time.monotonic())))
    assert due == [0, 2, 4, 5, 5]


def test_workers_that_signals_asked_to_leave_are_replaced_as_often_as_it_takes(
    database: Database, tmp_path: Path
) -> None:
    codes = [int(ExitCode.INTERRUPTED)] * 9 + [int(ExitCode.DONE)]
    executor = Ending(iter(codes), tmp_path / "log")
    watched(database, executor).run()
    assert executor.num_started == len(codes)
