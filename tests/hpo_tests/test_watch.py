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

from hpo.errors import ExitCode, WorkersDie
from hpo.executors.local import LocalWorker
from hpo.progress import ProgressView
from hpo.watch import Watch
from storage.database import Database
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
        process = multiprocessing.get_context("spawn").Process(target=os._exit, args=(code,))
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


def watched(database: Database, executor: Ending) -> Watch:
    return Watch(
        database=database,
        record=make_study(database),
        executor=cast(Any, executor),
        view=ProgressView("study", num_epochs=1, stream=io.StringIO()),
        lease_seconds=30,
        command="hpo launch",
    )


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
