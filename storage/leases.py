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

MOST_FRUITLESS_ATTEMPTS = 3
"""Attempts in a row that came no further than the ones before, after which a trial ends as FAIL."""
LONGEST_ERROR = 400
"""Characters of an error that are kept."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """The right to run one trial; `trial_id` is None until the trial has been asked for."""

    lease_id: int
    token: int
    study_id: int
    trial_id: int | None
    attempts: int
    errors: int = 0
    """Earlier attempts that ended by an error which may be the trial's own."""


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


def advance(database: Database, lease: Lease, position: int) -> None:
    """Record that a checkpoint within an epoch has seen `position` images.

    If that is further than any before, the attempt is not fruitless, even where it ends before its
    next report. A lost lease is left alone.
    """
    given = {"lease": lease.lease_id, "token": lease.token, "position": position}

    def transaction() -> None:
        with database.engine.begin() as connection:
            connection.execute(_ADVANCE, given)

    database.patiently(transaction)


def give_back(database: Database, lease: Lease, error: str, *, may_be_the_trials: bool) -> None:
    """Give the trial back after an error, so that another process can try it.

    The attempt counts as fruitless unless it has reported. While other workers live, the place
    that gives the trial back does not claim it again. may_be_the_trials: the error is counted as
    one that the trial itself may cause (`Lease.errors`).
    """
    given = {
        "lease": lease.lease_id,
        "token": lease.token,
        "error": error[:LONGEST_ERROR],
        "count": int(may_be_the_trials),
    }

    def transaction() -> None:
        with database.engine.begin() as connection:
            connection.execute(_GIVE_BACK, given)
            connection.execute(_DROP_UNBOUND, given)

    database.patiently(transaction)


def release(database: Database, lease: Lease) -> None:
    """Give the trial back in good order: the next claim goes on with it."""
    given = {"lease": lease.lease_id, "token": lease.token}

    def transaction() -> None:
        with database.engine.begin() as connection:
            connection.execute(_RELEASE, given)
            connection.execute(_DROP_UNBOUND, given)

    database.patiently(transaction)


def register_worker(
    database: Database,
    study_id: int,
    worker_id: str,
    *,
    host: str,
    pid: int,
    device: str,
    place: str | None = None,
    state: str = "working",
) -> None:
    """Make the worker known, so that `status` shows it; again, when its state has changed.

    place: what it shares with workers that replace it (its launcher and device); its id if None.
    state: starting or working. A worker that works takes the place of sick ones before it.
    """
    given = {
        "worker": worker_id,
        "study": study_id,
        "host": host,
        "pid": pid,
        "device": device,
        "place": place or worker_id,
        "state": state,
    }

    def transaction() -> None:
        with database.engine.begin() as connection:
            connection.execute(_REGISTER_WORKER, given)
            if state == "working":
                connection.execute(_FORGET_SICK, given)

    database.patiently(transaction)


def forget_worker(database: Database, worker_id: str, *, cause: str | None = None) -> bool:
    """The worker has left or died: what it held is free at once. Whether it held a trial.

    cause: how it died, which is kept with its trial.
    """
    given = {"worker": worker_id, "cause": None if cause is None else cause[:LONGEST_ERROR]}

    def transaction() -> bool:
        with database.engine.begin() as connection:
            # worker, then leases: the order of `renew`, which may be under way
            connection.execute(_FORGET_WORKER, given)
            return bool(connection.execute(_FREE_LEASES_OF_WORKER, given).rowcount)

    return database.patiently(transaction)


def mark_sick(database: Database, worker_id: str, reason: str) -> None:
    """The worker leaves for a reason of its own, which `status` shows; what it held is free."""
    given = {"worker": worker_id, "cause": reason[:LONGEST_ERROR]}

    def transaction() -> None:
        with database.engine.begin() as connection:
            connection.execute(_MARK_SICK, given)
            connection.execute(_FREE_LEASES_OF_WORKER, given)

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
    exhausted = connection.execute(_EXHAUSTED, {**given, "most": MOST_FRUITLESS_ATTEMPTS})
    for trial_id, last_error in exhausted.all():
        _fail(connection, trial_id, fruitless_reason(last_error))
    for trial_id in connection.execute(_ORPHANS, given).scalars().all():
        _fail(connection, trial_id, "asked for, but never bound to a worker")


def fruitless_reason(last_error: str | None) -> str:
    """Why a trial ends that comes no further, in words."""
    ended = "it died or hung" if last_error is None else last_error
    return f"{MOST_FRUITLESS_ATTEMPTS} attempts in a row came no further; the last one: {ended}"


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

# The claimer's place gave the trial back, and a worker of a place that did not is there.
_IS_FOR_OTHERS = """
    EXISTS (SELECT FROM hpo_workers me, hpo_workers other
        WHERE me.worker_id = :worker AND me.place = ANY (l.refused_by)
            AND other.study_id = l.study_id AND other.place <> ALL (l.refused_by)
            AND other.state = 'working' AND other.seen_at > now() - make_interval(secs => (
                SELECT (h.spec->>'lease_seconds')::float FROM hpo_studies h
                WHERE h.study_id = l.study_id)))
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
        attempts = attempts + 1, fruitless_attempts = fruitless_attempts + 1
    WHERE lease_id = (
        SELECT lease_id FROM hpo_leases l
        WHERE study_id = :study AND trial_id IS NOT NULL AND {_FREE} AND NOT {_IS_FOR_OTHERS}
        ORDER BY trial_id LIMIT 1 FOR UPDATE SKIP LOCKED)
    RETURNING lease_id, token, study_id, trial_id, attempts, errors
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

_ADVANCE = text("""
    UPDATE hpo_leases SET position = :position, fruitless_attempts = 0
    WHERE lease_id = :lease AND token = :token AND ended_at IS NULL AND position < :position
""")

_GIVE_BACK = text("""
    UPDATE hpo_leases l SET worker_id = NULL, expires_at = NULL, last_error = :error,
        errors = errors + :count, refused_by = refused_by || coalesce(
            (SELECT ARRAY[place] FROM hpo_workers w WHERE w.worker_id = l.worker_id
                AND place <> ALL (l.refused_by)), '{}')
    WHERE lease_id = :lease AND token = :token AND ended_at IS NULL
""")

_RELEASE = text("""
    UPDATE hpo_leases SET worker_id = NULL, expires_at = NULL, fruitless_attempts = 0
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
    SELECT trial_id, last_error FROM hpo_leases l
    WHERE study_id = :study AND trial_id IS NOT NULL AND fruitless_attempts >= :most AND {_FREE}
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
    INSERT INTO hpo_workers (worker_id, study_id, host, pid, device, place, state)
    VALUES (:worker, :study, :host, :pid, :device, :place, :state)
    ON CONFLICT (worker_id) DO UPDATE SET study_id = excluded.study_id, pid = excluded.pid,
        host = excluded.host, device = excluded.device, place = excluded.place,
        state = excluded.state, reason = NULL, seen_at = now()
""")

_SEE_WORKER = text("""
    UPDATE hpo_workers w SET seen_at = now() FROM hpo_studies s
    WHERE w.worker_id = :worker AND s.study_id = w.study_id
    RETURNING NOT (s.stop_requested OR coalesce(s.deadline <= now(), false))
""")

# why a sick one has left stays to be seen
_FORGET_WORKER = text("DELETE FROM hpo_workers WHERE worker_id = :worker AND state <> 'sick'")

_FORGET_SICK = text("""
    DELETE FROM hpo_workers WHERE study_id = :study AND place = :place AND state = 'sick'
""")

# the newest of a place: one that is started again and again leaves one row
_MARK_SICK = text("""
    WITH sick AS (
        UPDATE hpo_workers SET state = 'sick', reason = :cause, seen_at = now()
        WHERE worker_id = :worker RETURNING study_id, place)
    DELETE FROM hpo_workers w USING sick s
    WHERE w.study_id = s.study_id AND w.place = s.place AND w.state = 'sick'
        AND w.worker_id <> :worker
""")

_FREE_LEASES_OF_WORKER = text("""
    UPDATE hpo_leases SET worker_id = NULL, expires_at = NULL,
        last_error = coalesce(CAST(:cause AS text), last_error)
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
