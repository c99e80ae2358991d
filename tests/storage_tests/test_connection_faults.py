"""Connections that are cut, held, slow or refused: rows 10 to 13 of the list of faults."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import psycopg2
import pytest
from optuna.trial import TrialState
from sqlalchemy import make_url, text

from hpo.objective import TrialRun
from hpo.space import Range, SearchSpace
from hpo.spec import StudySpec
from storage import database as database_module
from storage import leases
from storage.database import Database
from storage.embedded import EmbeddedPostgres
from storage.errors import DatabaseUnreachable
from storage.leases import Lease
from storage.schema import ensure_tables
from storage.snapshots import snapshot
from storage.studies import OpenStudy, StudyRecord, create_study
from tests.parts import TcpPostgres
from tests.tcp_proxy import Fault, Strike, TcpProxy
from trainer.config import TrainConfig
from trainer.data.dataset import ImageDataset

ANSWER_SECONDS = 0.6
SPEC = StudySpec(
    data="digits",
    fingerprint="none",
    space=SearchSpace(
        fields={"lr": Range(low=1e-4, high=1e-1, log=True), "batch_size": (32, 64), "epochs": 3}
    ),
    seed=0,
    first_rung=4,
)
VALUES = {1: 0.5, 4: 0.75}


class Life:
    """A trial from its claim to its end, in the calls that a worker makes."""

    lease: Lease
    trial_id: int
    config: TrainConfig

    def __init__(
        self, database: Database, record: StudyRecord, study: OpenStudy | None = None
    ) -> None:
        self._database, self._record, self._opened = database, record, study

    def open(self) -> None:
        self._study = self._opened or OpenStudy(self._database, self._record)

    def claim(self) -> None:
        study_id = self._record.study_id
        claimed = leases.claim(self._database, study_id, "w", lease_seconds=30)
        assert isinstance(claimed, Lease)
        self.lease = claimed

    def bind(self) -> None:
        self.trial_id = self._study.bind(self.lease)

    def suggest(self) -> None:
        nothing = cast(ImageDataset, None)
        run = TrialRun(self._study, SPEC, self.lease, nothing, device="cpu", pulse=lambda: None)
        self.config = run._suggest()

    def report(self) -> None:
        for step, value in VALUES.items():
            self._study.report(self.lease, step, value, images_per_second=1.0)

    def end(self) -> None:
        self._study.end(self.lease, TrialState.COMPLETE, value=VALUES[4], reason="said")

    def run(self, **around: AbstractContextManager[object]) -> None:
        """All of it, an operation within what is given for it."""
        for operation in OPERATIONS:
            with around.get(operation, contextlib.nullcontext()):
                getattr(self, operation)()


OPERATIONS = ("open", "claim", "bind", "suggest", "report", "end")


@pytest.fixture
def record(database: Database) -> StudyRecord:
    return create_study(database, "study", spec=SPEC.to_json(), budget=1000)


@pytest.fixture
def proxy(postgres: EmbeddedPostgres) -> Iterator[TcpProxy]:
    with TcpProxy(f"{postgres.socket_folder}/.s.PGSQL.5432") as proxy:
        yield proxy


@pytest.fixture
def proxied(
    proxy: TcpProxy, database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Database]:
    """A worker's view of the database: through the proxy, and as patient as it is."""
    monkeypatch.setenv("HPO_HOME", str(tmp_path))
    # Optuna's own pauses before it tries again
    monkeypatch.setattr("optuna.storages._rdb.storage.random.random", lambda: 0.0)
    opened = Database(
        f"postgresql://postgres@127.0.0.1:{proxy.port}/{make_url(database_url).database}"
    )
    opened.patience_seconds = 60
    yield opened
    opened.engine.dispose()


def check(database: Database, record: StudyRecord, lives: list[Life]) -> None:
    """Each life is one trial with all its values, once, in one attempt; nothing else is there."""
    trials = snapshot(database, record.study_id).trials
    assert [trial.trial_id for trial in trials] == [life.trial_id for life in lives]
    for trial, life in zip(trials, lives, strict=True):
        assert (trial.state, trial.value, trial.attempts) == ("COMPLETE", VALUES[4], 1)
        assert dict(zip(trial.steps, trial.values, strict=True)) == VALUES
        wanted = {"lr": life.config.lr, "batch_size": life.config.batch_size}
        assert trial.params == pytest.approx(wanted, rel=1e-12)
        assert trial.attributes == {"reason": "said"}
    statement = "SELECT count(*), count(trial_id), count(ended_at) FROM hpo_leases"
    with database.engine.connect() as connection:
        assert set(connection.execute(text(statement)).one()) == {len(lives)}


@pytest.mark.parametrize(
    "fault", [Fault.CUT_BEFORE, Fault.CUT_MEANWHILE, Fault.CUT_AFTER], ids=lambda each: each.name
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_connection_cut_at_any_commit_loses_and_doubles_nothing(
    operation: str,
    fault: Fault,
    proxy: TcpProxy,
    proxied: Database,
    database: Database,
    record: StudyRecord,
) -> None:
    study = None if operation == "open" else OpenStudy(proxied, record)
    lives: list[Life] = []
    struck = True
    while struck:
        strike = Strike(proxy, fault, statement="COMMIT", nth=len(lives))
        lives.append(Life(proxied, record, study))
        lives[-1].run(**{operation: strike})
        struck = strike.happened.is_set()
    check(database, record, lives)


def test_a_connection_cut_at_any_statement_loses_and_doubles_nothing(
    proxy: TcpProxy, proxied: Database, database: Database, record: StudyRecord
) -> None:
    study = OpenStudy(proxied, record)
    lives: list[Life] = []
    struck = True
    while struck:
        strike = Strike(proxy, Fault.CUT_BEFORE, nth=len(lives))
        lives.append(Life(proxied, record, study))
        with strike:
            lives[-1].run()
        struck = strike.happened.is_set()
    check(database, record, lives)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A silent connection counts as dead soon, so that tests are short."""
    monkeypatch.setattr(database_module, "_ANSWER_SECONDS", ANSWER_SECONDS)
    monkeypatch.setattr(database_module, "_CONNECT_SECONDS", ANSWER_SECONDS)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("operation", "nth"), [("claim", 0), ("bind", 0), ("suggest", 3), ("report", 0), ("end", 0)]
)
def test_a_commit_in_a_black_hole_that_arrives_late_loses_and_doubles_nothing(
    operation: str,
    nth: int,
    proxy: TcpProxy,
    proxied: Database,
    database: Database,
    record: StudyRecord,
) -> None:
    life = Life(proxied, record)
    hole = Strike(proxy, Fault.HOLD, statement="COMMIT", nth=nth)
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(life.run, **{operation: hole})
        assert hole.happened.wait(10)
        time.sleep(3 * ANSWER_SECONDS)
        assert not running.done()
        proxy.go_on()
        running.result(15)
    check(database, record, [life])


@pytest.mark.usefixtures("impatient")
def test_a_call_into_a_black_hole_gives_up_in_time(proxy: TcpProxy, proxied: Database) -> None:
    proxied.open()
    proxied.patience_seconds = 0
    proxy.hold()
    started = time.monotonic()
    with pytest.raises(DatabaseUnreachable, match="no answer in"):
        proxied.open()
    # the old connection is silent, and so is the one that is to replace it
    assert time.monotonic() - started < 2 * ANSWER_SECONDS + 1


@contextlib.contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def backend_of(database: Database, *, state: str) -> int:
    """The process that serves the only connection in this state."""
    query = """
        SELECT pid FROM pg_stat_activity
        WHERE state = :state AND datname = current_database() AND pid <> pg_backend_pid()
    """
    with database.engine.connect() as connection:
        return int(connection.execute(text(query), {"state": state}).scalar_one())


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("operation", OPERATIONS)
def test_a_stopped_backend_is_left_for_another_one(
    operation: str, proxied: Database, database: Database, record: StudyRecord
) -> None:
    proxied.open()
    life = Life(proxied, record)
    with contextlib.ExitStack() as stack:

        @contextlib.contextmanager
        def stopping() -> Iterator[None]:
            stack.enter_context(stopped(backend_of(database, state="idle")))
            yield

        started = time.monotonic()
        life.run(**{operation: stopping()})
        assert time.monotonic() - started < ANSWER_SECONDS + 3
    check(database, record, [life])


@pytest.mark.usefixtures("impatient")
def test_a_backend_that_is_stopped_with_its_locks_delays_but_changes_nothing(
    proxy: TcpProxy, proxied: Database, database: Database, record: StudyRecord
) -> None:
    life = Life(proxied, record)
    hole = Strike(proxy, Fault.HOLD, statement="COMMIT")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(life.run, report=hole)
        assert hole.happened.wait(10)
        with stopped(backend_of(database, state="idle in transaction")):
            proxy.go_on()
            time.sleep(3 * ANSWER_SECONDS)
            assert not running.done()
        running.result(15)
    check(database, record, [life])


def test_a_worker_that_vanishes_in_a_claim_keeps_no_other_from_claiming(
    proxy: TcpProxy,
    proxied: Database,
    database: Database,
    record: StudyRecord,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(database_module, "_IDLE_SECONDS", 0.5)
    vanished, other = Life(proxied, record), Life(database, record)
    hole = Strike(proxy, Fault.HOLD, statement="COMMIT")
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(vanished.run, claim=hole)
        assert hole.happened.wait(10)
        started = time.monotonic()
        other.run()
        assert time.monotonic() - started < 5
        proxy.go_on()
        running.result(15)
    check(database, record, [other, vanished])


def test_a_transaction_that_slept_too_long_is_tried_again(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "_IDLE_SECONDS", 0.1)
    database = Database(database_url)
    pauses = [0.5, 0.0]

    def sleep_inside() -> object:
        with database.engine.begin() as connection:
            connection.execute(text("SELECT 1"))
            time.sleep(pauses.pop(0))
            return connection.execute(text("SELECT 42")).scalar()

    assert database.patiently(sleep_inside) == 42
    assert pauses == []
    database.engine.dispose()


@pytest.mark.parametrize("round_trip_seconds", [0.001, 0.02])
def test_a_slow_network_only_takes_longer(
    round_trip_seconds: float,
    proxy: TcpProxy,
    proxied: Database,
    database: Database,
    record: StudyRecord,
) -> None:
    proxy.delay_seconds = round_trip_seconds / 2
    life = Life(proxied, record)
    life.run()
    check(database, record, [life])


@pytest.fixture
def crowded(tcp_postgres: TcpPostgres) -> TcpPostgres:
    """A server that accepts no more than six connections."""
    with contextlib.closing(psycopg2.connect(tcp_postgres.url)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute("ALTER SYSTEM SET max_connections = 6")
            cursor.execute("ALTER SYSTEM SET superuser_reserved_connections = 0")
    tcp_postgres.stop("fast")
    tcp_postgres.start()
    return tcp_postgres


def test_where_all_connections_are_taken_a_new_worker_waits_and_a_running_one_goes_on(
    crowded: TcpPostgres,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setenv("HPO_HOME", str(tmp_path))
    monkeypatch.setattr(database_module, "FIRST_ANSWER_SECONDS", 0.3)
    running, new = Database(crowded.url), Database(crowded.url)
    ensure_tables(running)
    record = create_study(running, "study", spec=SPEC.to_json(), budget=1000)
    study = OpenStudy(running, record)
    others: list[Any] = []
    with contextlib.suppress(psycopg2.OperationalError):
        while True:
            others.append(psycopg2.connect(crowded.url))
    lives: list[Life] = []

    def live() -> None:
        lives.append(Life(running, record, study))
        lives[-1].run()

    live()
    with pytest.raises(DatabaseUnreachable, match="too many clients"):
        new.open()
    assert caplog.messages == []
    new.patience_seconds = 60
    with ThreadPoolExecutor(1) as pool:
        opening = pool.submit(new.open)
        while not caplog.messages and len(lives) < 200:
            live()
        assert not opening.done()
        others.pop().close()
        opening.result(15)
    assert len(caplog.messages) == 1
    assert "waiting for the database" in caplog.text
    assert "too many clients" in caplog.text
    check(new, record, lives)
    for other in others:
        other.close()
    for database in (running, new):
        database.engine.dispose()
