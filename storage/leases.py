"""Leases: who works on which trial. All statements that matter for concurrency stand here.

A lease is a worker's right to run one trial until a time, by Postgres's clock. Its token grows with
each claim, so that whoever lost it can be told from whoever has it. Locks are taken in one order:
Optuna's study row, our study row, lease rows, trial rows.
"""

import contextlib
import enum
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import optuna
from sqlalchemy import Connection, event, text
from sqlalchemy.orm import Session

from storage.database import Database
from storage.errors import LeaseLost, StudyDeleted

MOST_BARREN_ATTEMPTS = 3
"""Attempts in a row without a new report, after which a trial ends as FAIL."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right to run one trial; `trial_id` is None until the trial has been asked for."""

    lease_id: int
    token: int
    study_id: int
    trial_id: int | None
    attempts: int


class NoWork(enum.Enum):
    """Why there is nothing to claim."""

    DONE = "the budget is used up"
    BUSY = "other workers have what is left of the budget"
    STOPPED = "the study was stopped"
    FAILING = "trial after trial fails"


@dataclass(frozen=True, kw_only=True)
class Renewal:
    """What a worker learns when it shows that it lives."""

    holds_lease: bool
    study_goes_on: bool


def claim(
    database: Database, study_id: int, worker_id: str, *, lease_seconds: float
) -> Lease | NoWork:
    """Take over a trial that nobody works on, or else open a new one while the budget has room.

    One transaction under the lock of the study, so that the budget is exact. Raises StudyDeleted.
    """
    given = {"study": study_id, "worker": worker_id, "seconds": lease_seconds}
    claimed: Lease | None = None

    def transaction() -> Lease | NoWork:
        nonlocal claimed
        with database.engine.begin() as connection:
            study = connection.execute(_LOCK_STUDY, given).one_or_none()
            if study is None:
                raise StudyDeleted
            if claimed is not None and _renew(connection, claimed, lease_seconds):
                return claimed  # the COMMIT of an earlier try went through
            if study.stopped:
                return NoWork.STOPPED
            _reap(connection, given)
            if connection.execute(_IS_FAILING, given).scalar():
                return NoWork.FAILING
            for statement in (_TAKE_OVER, _TAKE_STARTING_POINT, _OPEN_NEW):
                row = connection.execute(statement, given).one_or_none()
                if row is not None:
                    claimed = Lease(**row._mapping)
                    return claimed
            used_up = connection.execute(_IS_USED_UP, given).scalar()
            return NoWork.DONE if used_up else NoWork.BUSY

    return database.patiently(transaction)


def reap(database: Database, study_id: int) -> None:
    """End what can't go on: anybody may do it, at any time."""

    def transaction() -> None:
        with database.engine.begin() as connection:
            given = {"study": study_id}
            if connection.execute(_LOCK_STUDY, given).one_or_none() is not None:
                _reap(connection, given)

    database.patiently(transaction)


def renew(
    database: Database, lease: Lease | None, worker_id: str, *, lease_seconds: float
) -> Renewal:
    """Show that this worker lives, and prolong its lease if it has one. Tried once."""
    with database.engine.begin() as connection:
        study_goes_on = connection.execute(_SEE_WORKER, {"worker": worker_id}).scalar()
        holds_lease = lease is None or _renew(connection, lease, lease_seconds)
        return Renewal(holds_lease=holds_lease, study_goes_on=bool(study_goes_on))


def _renew(connection: Connection, lease: Lease, lease_seconds: float) -> bool:
    given = {"lease": lease.lease_id, "token": lease.token, "seconds": lease_seconds}
    return connection.execute(_RENEW, given).one_or_none() is not None


def release(database: Database, lease: Lease) -> None:
    """Give the trial back in good order: the next claim goes on with it."""
    given = {"lease": lease.lease_id, "token": lease.token}

    def transaction() -> None:
        with database.engine.begin() as connection:
            connection.execute(_RELEASE, given)
            connection.execute(_DROP_UNBOUND, given)

    database.patiently(transaction)


def register_worker(
    database: Database, study_id: int, worker_id: str, *, host: str, pid: int, device: str
) -> None:
    """Make the worker known, so that `status` shows it."""
    given = {"worker": worker_id, "study": study_id, "host": host, "pid": pid, "device": device}

    def transaction() -> None:
        with database.engine.begin() as connection:
            connection.execute(_REGISTER_WORKER, given)

    database.patiently(transaction)


def forget_worker(database: Database, worker_id: str) -> None:
    """The worker has left or died: what it held is free at once."""

    def transaction() -> None:
        with database.engine.begin() as connection:
            # worker, then leases: the order of `renew`, which may be under way
            connection.execute(_FORGET_WORKER, {"worker": worker_id})
            connection.execute(_FREE_LEASES_OF_WORKER, {"worker": worker_id})

    database.patiently(transaction)


# The fence: Optuna's own transactions, in which the lease's row is locked and its token compared.


class Fence:
    """Puts a statement of ours into each transaction that Optuna's storage runs in this thread."""

    def __init__(self, storage: optuna.storages.RDBStorage) -> None:
        self._thread = threading.local()
        factory = storage.scoped_session.session_factory
        event.listen(factory, "after_begin", self._after_begin)
        event.listen(factory, "before_commit", self._before_commit)

    @contextlib.contextmanager
    def holding(self, lease: Lease) -> Iterator[None]:
        """What Optuna writes in here is written while `lease` holds. Raises LeaseLost."""
        with self._statement("first", _HOLD, lease):
            yield

    @contextlib.contextmanager
    def binding(self, lease: Lease) -> Iterator[None]:
        """The trial that Optuna makes in here is bound to `lease` in the same transaction.

        Optuna holds its study's row then, so the study's newest trial is the one it has made.
        """
        with self._statement("last", _BIND, lease):
            yield

    @contextlib.contextmanager
    def _statement(self, place: str, statement: Any, lease: Lease, **more: Any) -> Iterator[None]:
        given = {"lease": lease.lease_id, "token": lease.token, "study": lease.study_id, **more}
        self._thread.pending = (place, statement, given)
        try:
            yield
        finally:
            self._thread.pending = None

    def _after_begin(self, _session: Session, _transaction: Any, connection: Connection) -> None:
        self._run("first", connection)

    def _before_commit(self, session: Session) -> None:
        pending = getattr(self._thread, "pending", None)
        if pending is not None and pending[0] == "last":
            session.flush()
            self._run("last", session.connection())

    def _run(self, place: str, connection: Connection) -> None:
        pending = getattr(self._thread, "pending", None)
        if pending is None or pending[0] != place:
            return
        _, statement, given = pending
        if connection.execute(statement, given).one_or_none() is None:
            raise LeaseLost(f"lease {given['lease']} is not ours any more")


def _reap(connection: Connection, given: dict[str, Any]) -> None:
    """In the caller's transaction, under the study's lock."""
    connection.execute(_END_LEASES_OF_ENDED_TRIALS, given)
    connection.execute(_DROP_EXPIRED_UNBOUND, given)
    exhausted = connection.execute(_EXHAUSTED, {**given, "most": MOST_BARREN_ATTEMPTS})
    for trial_id in exhausted.scalars().all():
        reason = f"{MOST_BARREN_ATTEMPTS} attempts in a row died or hung without a report"
        _fail(connection, trial_id, reason)
    for trial_id in connection.execute(_ORPHANS, given).scalars().all():
        _fail(connection, trial_id, "asked for, but never bound to a worker")


def _fail(connection: Connection, trial_id: int, reason: str) -> None:
    given = {"trial": trial_id, "reason": reason}
    for statement in (_SET_REASON, _FAIL_TRIAL, _END_LEASE_OF_TRIAL):
        connection.execute(statement, given)


_LOCK_STUDY = text("""
    SELECT stop_requested OR coalesce(deadline <= now(), false) AS stopped
    FROM hpo_studies WHERE study_id = :study FOR UPDATE
""")

# Nobody holds it: given back, or expired. None expires within one lease's time of the database's
# own start: its holders may not have found it again yet.
_FREE = """
    l.ended_at IS NULL AND (l.expires_at IS NULL OR (
        l.expires_at < now() AND now() - pg_postmaster_start_time() > make_interval(secs => (
            SELECT (h.spec->>'lease_seconds')::float FROM hpo_studies h
            WHERE h.study_id = l.study_id))))
"""

_HAS_ROOM = """
    (SELECT budget FROM hpo_studies WHERE study_id = :study) >
    (SELECT count(*) FROM trials WHERE study_id = :study AND state IN ('COMPLETE', 'PRUNED')) +
    (SELECT count(*) FROM hpo_leases WHERE study_id = :study AND ended_at IS NULL)
"""

_TAKE_OVER = text(f"""
    UPDATE hpo_leases SET
        token = nextval('hpo_tokens'), worker_id = :worker,
        expires_at = now() + make_interval(secs => :seconds),
        attempts = attempts + 1, barren_attempts = barren_attempts + 1
    WHERE lease_id = (
        SELECT lease_id FROM hpo_leases l
        WHERE study_id = :study AND trial_id IS NOT NULL AND {_FREE}
        ORDER BY trial_id LIMIT 1 FOR UPDATE SKIP LOCKED)
    RETURNING lease_id, token, study_id, trial_id, attempts
""")

_TAKE_STARTING_POINT = text(f"""
    WITH point AS (
        UPDATE trials SET state = 'RUNNING', datetime_start = now() AT TIME ZONE 'UTC'
        WHERE {_HAS_ROOM} AND trial_id = (
            SELECT trial_id FROM trials WHERE study_id = :study AND state = 'WAITING'
            ORDER BY number LIMIT 1 FOR UPDATE SKIP LOCKED)
        RETURNING trial_id)
    INSERT INTO hpo_leases (study_id, trial_id, token, worker_id, expires_at)
    SELECT :study, trial_id, nextval('hpo_tokens'), :worker,
           now() + make_interval(secs => :seconds) FROM point
    RETURNING lease_id, token, study_id, trial_id, attempts
""")

_OPEN_NEW = text(f"""
    INSERT INTO hpo_leases (study_id, token, worker_id, expires_at)
    SELECT :study, nextval('hpo_tokens'), :worker, now() + make_interval(secs => :seconds)
    WHERE {_HAS_ROOM} AND (SELECT parent_id IS NULL FROM hpo_studies WHERE study_id = :study)
    RETURNING lease_id, token, study_id, trial_id, attempts
""")

# Re-checks are a fixed list: when all have ended it is used up, whatever their states.
_IS_USED_UP = text("""
    SELECT CASE WHEN s.parent_id IS NULL
        THEN s.budget <= (SELECT count(*) FROM trials t WHERE t.study_id = s.study_id
            AND t.state IN ('COMPLETE', 'PRUNED'))
        ELSE NOT EXISTS (SELECT FROM trials t WHERE t.study_id = s.study_id
            AND t.state IN ('RUNNING', 'WAITING')) END
    FROM hpo_studies s WHERE s.study_id = :study
""")

# Since the last launch: three in a row, or more than a tenth of the budget and at least three.
# Trials without a lease (swept, or somebody else's) don't speak of our training.
_IS_FAILING = text("""
    WITH ended AS (
        SELECT t.state = 'FAIL' AS failed, row_number() OVER (ORDER BY l.ended_at DESC) AS age
        FROM hpo_leases l JOIN trials t USING (trial_id) JOIN hpo_studies s
            ON s.study_id = l.study_id
        WHERE l.study_id = :study AND l.ended_at > s.launched_at)
    SELECT count(*) FILTER (WHERE failed AND age <= 3) = 3 OR (
        count(*) FILTER (WHERE failed) >= 3 AND count(*) FILTER (WHERE failed) >
            (SELECT budget FROM hpo_studies WHERE study_id = :study) / 10.0)
    FROM ended
""")

# One that was given back stays so: a renewal that comes late would leave it to nobody.
_RENEW = text("""
    UPDATE hpo_leases SET expires_at = now() + make_interval(secs => :seconds)
    WHERE lease_id = :lease AND token = :token AND expires_at IS NOT NULL RETURNING lease_id
""")

_RELEASE = text("""
    UPDATE hpo_leases SET worker_id = NULL, expires_at = NULL, barren_attempts = 0
    WHERE lease_id = :lease AND token = :token AND ended_at IS NULL
""")

_DROP_UNBOUND = text("""
    DELETE FROM hpo_leases WHERE lease_id = :lease AND token = :token AND trial_id IS NULL
""")

_DROP_EXPIRED_UNBOUND = text("""
    DELETE FROM hpo_leases
    WHERE study_id = :study AND trial_id IS NULL AND (expires_at IS NULL OR expires_at < now())
""")

_END_LEASES_OF_ENDED_TRIALS = text("""
    UPDATE hpo_leases l SET ended_at = now(), worker_id = NULL, expires_at = NULL
    FROM trials t WHERE l.study_id = :study AND l.ended_at IS NULL AND t.trial_id = l.trial_id
        AND t.state IN ('COMPLETE', 'PRUNED', 'FAIL')
""")

_EXHAUSTED = text(f"""
    SELECT trial_id FROM hpo_leases l
    WHERE study_id = :study AND trial_id IS NOT NULL AND barren_attempts >= :most AND {_FREE}
    FOR UPDATE SKIP LOCKED
""")

# Trial and lease are bound in one transaction, so a running trial without one is nobody's.
_ORPHANS = text("""
    SELECT trial_id FROM trials t WHERE study_id = :study AND state = 'RUNNING'
        AND NOT EXISTS (SELECT FROM hpo_leases l WHERE l.trial_id = t.trial_id)
    FOR UPDATE SKIP LOCKED
""")

_SET_REASON = text("""
    INSERT INTO trial_user_attributes (trial_id, key, value_json)
    VALUES (:trial, 'reason', to_json(CAST(:reason AS text)))
    ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json
""")

_FAIL_TRIAL = text("""
    UPDATE trials SET state = 'FAIL', datetime_complete = now() AT TIME ZONE 'UTC'
    WHERE trial_id = :trial
""")

_END_LEASE_OF_TRIAL = text("""
    UPDATE hpo_leases SET ended_at = now(), worker_id = NULL, expires_at = NULL
    WHERE trial_id = :trial
""")

_REGISTER_WORKER = text("""
    INSERT INTO hpo_workers (worker_id, study_id, host, pid, device)
    VALUES (:worker, :study, :host, :pid, :device)
    ON CONFLICT (worker_id) DO UPDATE SET study_id = excluded.study_id, pid = excluded.pid,
        host = excluded.host, device = excluded.device, seen_at = now()
""")

_SEE_WORKER = text("""
    UPDATE hpo_workers w SET seen_at = now() FROM hpo_studies s
    WHERE w.worker_id = :worker AND s.study_id = w.study_id
    RETURNING NOT (s.stop_requested OR coalesce(s.deadline <= now(), false))
""")

_FORGET_WORKER = text("DELETE FROM hpo_workers WHERE worker_id = :worker")

_FREE_LEASES_OF_WORKER = text("""
    UPDATE hpo_leases SET worker_id = NULL, expires_at = NULL
    WHERE worker_id = :worker AND ended_at IS NULL
""")

_HOLD = text("""
    SELECT lease_id FROM hpo_leases
    WHERE lease_id = :lease AND token = :token AND ended_at IS NULL FOR UPDATE
""")

_BIND = text("""
    UPDATE hpo_leases SET trial_id = (SELECT max(trial_id) FROM trials WHERE study_id = :study)
    WHERE lease_id = :lease AND token = :token AND trial_id IS NULL RETURNING lease_id
""")
