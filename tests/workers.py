"""A worker's life within the test's own process."""

import signal
from collections.abc import Collection

from hpo.errors import ExitCode
from hpo.worker import Worker
from storage.database import Database
from storage.snapshots import StudySnapshot, snapshot
from storage.studies import StudyRecord

_OF_WORKERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def work(
    database: Database,
    record: StudyRecord,
    *,
    ends: Collection[ExitCode] = (ExitCode.DONE, ExitCode.INTERRUPTED),
) -> StudySnapshot:
    """Until nothing is left for it, or a signal asks it to leave; the study as it is then.

    ends: how it may end.
    """
    before = {number: signal.getsignal(number) for number in _OF_WORKERS}
    try:
        assert Worker(database, record.name, device="cpu").run() in ends
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return snapshot(database, record.study_id)
