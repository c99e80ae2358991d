"""The study: Optuna's, on our database, with what a worker needs to run it.

The only module that knows which storage a study has, and what of Optuna's inside we rely on
(held by contract tests): `Trial(study, trial_id)`, `study._storage`, and the sessions of
RDBStorage.
"""

import contextlib
import json
import secrets
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState
from sqlalchemy import Connection, text

from storage import leases, points, results
from storage.checkpoints import Checkpoints, TrialCheckpoints, checkpoint_root, checkpoint_url
from storage.database import Database, Result
from storage.errors import LeaseLost, StorageError, StudyNotFound
from storage.folders import make_folder
from storage.kept_states import KeptStates
from storage.leases import Fence, Lease
from storage.leftovers import mark
from storage.object_checkpoints import ObjectCheckpoints
from storage.object_store import ObjectStore
from storage.schema import optuna_storage


@dataclass(frozen=True, kw_only=True)
class StudyRecord:
    """What is stored of a study beside Optuna's tables; `spec` is JSON that hpo/ understands."""

    study_id: int
    name: str
    spec: Mapping[str, Any]
    budget: int
    checkpoint_key: int
    test_openings: int
    parent_id: int | None
    """The study whose best trials this one runs again; None for a study of the user's."""


def find_studies(database: Database) -> list[StudyRecord]:
    """All studies that users made with this program, oldest first."""
    return [record for record in _all_studies(database) if record.parent_id is None]


def _all_studies(database: Database) -> list[StudyRecord]:
    def query() -> list[StudyRecord]:
        with database.engine.connect() as connection:
            return [StudyRecord(**row._mapping) for row in connection.execute(_STUDIES)]

    return database.patiently(query)


def find_study(database: Database, name: str) -> StudyRecord:
    """The study of this name, be it the user's or one of re-checks. Raises StudyNotFound."""
    for record in _all_studies(database):
        if record.name == name:
            return record
    raise StudyNotFound(name)


def create_study(
    database: Database,
    name: str,
    *,
    spec: Mapping[str, Any],
    budget: int,
    parent_id: int | None = None,
) -> StudyRecord:
    """Make the study, or find it: whoever comes second gets what the first one made.

    With a parent it is one of re-checks: its workers take starting points and make no trial of
    their own. Raises StorageError if the name belongs to an Optuna study that is not ours.
    """

    def transaction() -> None:
        with database.engine.begin() as connection:
            connection.execute(_LOCK_NAME, {"name": name})
            if connection.execute(_IS_OURS, {"name": name}).scalar():
                return
            if connection.execute(_IS_THERE, {"name": name}).scalar():
                raise StorageError(
                    f"the database holds an Optuna study {name!r} that hpo did not make: "
                    "give another --study"
                )
            given = {
                "name": name,
                "spec": json.dumps(spec),
                "budget": budget,
                "key": secrets.randbits(62),
                "parent": parent_id,
            }
            connection.execute(_CREATE, given)

    database.patiently(transaction)
    return find_study(database, name)


def relaunch(
    database: Database, study_id: int, *, budget: int | None, timeout_seconds: float | None
) -> None:
    """Let a study go on: not stopped any more, its failures and sick workers so far forgiven.

    timeout_seconds: None leaves the time limit of a launch whose workers run as it is; a limit of
    an earlier launch is lifted.
    """
    given = {"study": study_id, "budget": budget, "timeout": timeout_seconds}
    _execute(database, _RELAUNCH, given)


def request_stop(database: Database, study_id: int) -> None:
    """Workers of the study and of its re-checks leave; `relaunch` undoes it."""
    _execute(database, _STOP, {"study": study_id})


def count_test_opening(database: Database, study_id: int) -> int:
    """Record that the test split is opened; returns how often it has been, this time included."""
    return int(_execute(database, _OPEN_TEST, {"study": study_id}))


def check_checkpoint_place() -> None:
    """Raises StorageError if HPO_CHECKPOINTS names nothing that can keep checkpoints."""
    url = checkpoint_url()
    if url is None:
        checkpoint_root()
    else:
        ObjectStore.of(url)


class OpenStudy:
    """An Optuna study whose every write goes through the fence of a lease.

    Calls are repeated while the database is away, and are safe to repeat.
    """

    def __init__(self, database: Database, record: StudyRecord) -> None:
        """Raises StudyNotFound if the study is gone."""
        self.record = record
        self._database = database
        self._is_marked = False
        storage = database.patiently(lambda: optuna_storage(database))
        self._fence = Fence(storage)
        try:
            self.study = database.patiently(
                lambda: optuna.load_study(study_name=record.name, storage=storage)
            )
        except KeyError as error:
            raise StudyNotFound(record.name) from error

    def bind(self, lease: Lease) -> int:
        """The trial id of the lease: its own, or that of a new trial, bound as it is made."""
        if lease.trial_id is not None:
            return lease.trial_id

        def ask() -> int:
            bound = _bound_trial(self._database, lease)
            if bound is not None:
                return bound  # the COMMIT of an earlier try went through
            try:
                with self._fence.binding(lease):
                    return self.study._storage.create_new_trial(self.study._study_id)
            except LeaseLost:
                # Optuna tries again by itself, and so meets what its own first try has bound
                bound = _bound_trial(self._database, lease)
                if bound is None:
                    raise
                return bound

        return self._database.patiently(ask)

    def trial(self, trial_id: int) -> optuna.Trial:
        """A fresh handle, with all that the database has of the trial."""

        def handle() -> optuna.Trial:
            # Optuna's cache must know a trial that another process made, or writing a parameter
            # is a KeyError
            self.study.get_trials(deepcopy=False)
            return optuna.Trial(self.study, trial_id)

        return self._database.patiently(handle)

    def write(self, lease: Lease, call: Callable[[], Result]) -> Result:
        """`call` under the fence: suggestions, attributes, constraints. Raises LeaseLost.

        It may run again, so it makes its own `optuna.Trial`: an older one doesn't know what an
        earlier try has stored.
        """

        def fenced() -> Result:
            with self._fence.holding(lease):
                return call()

        try:
            return self._database.patiently(fenced)
        except optuna.exceptions.UpdateFinishedTrialError as error:
            raise LeaseLost("the trial was ended by somebody else") from error

    def report(self, lease: Lease, step: int, value: float, *, images_per_second: float) -> None:
        """Store an intermediate value. Raises LeaseLost."""
        results.report(
            self._database, lease, step=step, value=value, images_per_second=images_per_second
        )

    def advance(self, lease: Lease, position: int) -> None:
        """A checkpoint within an epoch is kept: the attempt has got to this position."""
        leases.advance(self._database, lease, position)

    def standing(
        self,
        step: int,
        value: float,
        *,
        except_trial_id: int,
        among: results.Group = results.EVERYBODY,
    ) -> results.Standing:
        """Where the value stands among those of all other trials of the group at this step."""
        return results.standing(
            self._database,
            self.record.study_id,
            step=step,
            value=value,
            except_trial_id=except_trial_id,
            among=among,
        )

    def middle(self, step: int, *, trial_id: int) -> results.Middle:
        """How the trial, which has reported at this step, compares with the COMPLETE ones."""
        return results.middle(self._database, self.record.study_id, step=step, trial_id=trial_id)

    def remembered(self, key: str, found: Any) -> Any:
        """What the study remembers under this key: the first value that was given for it.

        found: a JSON value, which is kept if there is none yet. Re-checks share their study's.
        """
        given = {
            "study": self.record.parent_id or self.record.study_id,
            "key": key,
            "found": json.dumps(found),
        }
        kept = _execute(self._database, _REMEMBER, given)
        if kept is None:
            raise StudyNotFound(self.record.name)
        return kept

    def take_point(self, lease: Lease, num_points: int) -> int:
        """The point of a list of so many that the lease's trial has. Raises LeaseLost."""
        return points.take_point(self._database, lease, num_points=num_points)

    def end(
        self,
        lease: Lease,
        state: TrialState,
        *,
        value: float | None,
        reason: str,
        attributes: Mapping[str, Any] | None = None,
    ) -> None:
        """End the trial and its lease; reason and attributes stay with it. Raises LeaseLost."""
        results.end(
            self._database, lease, state=state, value=value, reason=reason, attributes=attributes
        )

    @property
    def kept_states(self) -> KeptStates:
        """Where trials whose models are wanted leave them. Raises StorageError."""
        return KeptStates(self.record.checkpoint_key)

    def checkpoints(self, lease: Lease, trial_id: int, *, trial_number: int) -> Checkpoints:
        """Where this attempt keeps them: what HPO_CHECKPOINTS says. Raises StorageError."""
        key, url = self.record.checkpoint_key, checkpoint_url()
        if url is None:
            root = checkpoint_root()
            self._mark(root / f"{key:d}")
            return TrialCheckpoints(
                root, study_key=key, trial_number=trial_number, token=lease.token
            )
        store = ObjectStore.of(url)
        return ObjectCheckpoints(store, self._database, lease, trial_id=trial_id, study_key=key)

    def _mark(self, folder: Path) -> None:
        """Once: what is wrong with the place is found where a checkpoint is saved."""
        if not self._is_marked:
            self._is_marked = True
            with contextlib.suppress(OSError):
                make_folder(folder)
                mark(self._database, folder)


def _bound_trial(database: Database, lease: Lease) -> int | None:
    with database.engine.connect() as connection:
        given = {"lease": lease.lease_id, "token": lease.token}
        return connection.execute(_BOUND_TRIAL, given).scalar()


def _execute(database: Database, statement: Any, given: Mapping[str, Any]) -> Any:
    def transaction() -> Any:
        with database.engine.begin() as connection:
            return _scalar(connection, statement, given)

    return database.patiently(transaction)


def _scalar(connection: Connection, statement: Any, given: Mapping[str, Any]) -> Any:
    result = connection.execute(statement, dict(given))
    return result.scalar() if result.returns_rows else None


_STUDIES = text("""
    SELECT s.study_id, o.study_name AS name, s.spec, s.budget, s.checkpoint_key, s.test_openings,
        s.parent_id
    FROM hpo_studies s JOIN studies o USING (study_id) ORDER BY s.study_id
""")

_LOCK_NAME = text("SELECT pg_advisory_xact_lock(hashtextextended('hpo:' || :name, 0))")

_IS_OURS = text("SELECT count(*) FROM hpo_studies JOIN studies USING (study_id) "
                "WHERE study_name = :name")  # fmt: skip

_IS_THERE = text("SELECT count(*) FROM studies WHERE study_name = :name")

# Optuna's rows and ours in one transaction: there is no study without a spec
_CREATE = text("""
    WITH study AS (INSERT INTO studies (study_name) VALUES (:name) RETURNING study_id),
    direction AS (
        INSERT INTO study_directions (direction, study_id, objective)
        SELECT 'MAXIMIZE', study_id, 0 FROM study)
    INSERT INTO hpo_studies (study_id, spec, budget, checkpoint_key, parent_id)
    SELECT study_id, CAST(:spec AS jsonb), :budget, :key, CAST(:parent AS integer) FROM study
""")

_RELAUNCH = text("""
    WITH forgiven AS (DELETE FROM hpo_workers WHERE study_id = :study AND state = 'sick')
    UPDATE hpo_studies s SET stop_requested = false, launched_at = now(),
        budget = coalesce(CAST(:budget AS integer), budget),
        deadline = coalesce(now() + make_interval(secs => CAST(:timeout AS float)),
            CASE WHEN NOT stop_requested AND deadline > now() AND EXISTS (
                SELECT FROM hpo_workers w WHERE w.study_id = s.study_id AND w.state <> 'sick'
                    AND w.seen_at > now() -
                        make_interval(secs => (s.spec->>'lease_seconds')::float))
                THEN deadline END)
    WHERE study_id = :study
""")

_STOP = text("""
    UPDATE hpo_studies SET stop_requested = true WHERE study_id = :study OR parent_id = :study
""")

_OPEN_TEST = text("""
    UPDATE hpo_studies SET test_openings = test_openings + 1 WHERE study_id = :study
    RETURNING test_openings
""")

_REMEMBER = text("""
    UPDATE hpo_studies
        SET remembered = jsonb_build_object(:key, CAST(:found AS jsonb)) || remembered
    WHERE study_id = :study RETURNING remembered -> :key
""")

_BOUND_TRIAL = text("""
    SELECT trial_id FROM hpo_leases WHERE lease_id = :lease AND token = :token
""")
