"""Which ends of workers a launcher bears, and which it doesn't; real processes that end at once."""

import io
import multiprocessing
import multiprocessing.connection
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
from optuna.trial import TrialState

from hpo.errors import ExitCode, WorkersDie
from hpo.executors.local import LocalWorker
from hpo.progress import ProgressView
from hpo.watch import Watch
from storage.database import Database
from storage.leases import Lease, claim, forget_worker, register_worker
from storage.studies import OpenStudy, StudyRecord
from tests.parts import make_study


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


def test_workers_that_end_before_they_work_end_the_launch_with_their_last_words(
    database: Database, tmp_path: Path
) -> None:
    (tmp_path / "log").write_text("Traceback\nRuntimeError: no such thing\n")
    executor = Ending(iter([1] * 50), tmp_path / "log")
    with pytest.raises(WorkersDie, match="exit code 1: RuntimeError: no such thing"):
        watched(database, executor).run()
    assert executor.num_started < 10


def test_workers_that_signals_asked_to_leave_are_replaced_as_often_as_it_takes(
    database: Database, tmp_path: Path
) -> None:
    codes = [int(ExitCode.INTERRUPTED)] * 9 + [int(ExitCode.DONE)]
    executor = Ending(iter(codes), tmp_path / "log")
    watched(database, executor).run()
    assert executor.num_started == len(codes)
