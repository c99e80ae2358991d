"""What a worker tells of its trial: reports and the end, each one statement under its lease.

They write the rows that Optuna's own storage would write, without its dozen round trips a call.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.trial import TrialState
from sqlalchemy import text

from storage.database import Database
from storage.errors import LeaseLost
from storage.leases import Lease

LONGEST_REASON = 500
"""Characters of a reason that stay with a trial."""


@dataclass(frozen=True, kw_only=True)
class Standing:
    """Where a value stands among those that the study's other trials reported at its step."""

    num_better: int
    num_others: int


@dataclass(frozen=True, kw_only=True)
class Middle:
    """A trial's best value so far, and the median of the COMPLETE trials at a step.

    median: None if none of them reported at this step.
    """

    best: float
    median: float | None
    num_complete: int


@dataclass(frozen=True, kw_only=True)
class Group:
    """The trials whose number times `stride`, divided by `total`, leaves from `first` to `last`."""

    stride: int
    total: int
    first: int
    last: int

    def holds(self, number: int) -> bool:
        """Whether the trial of this number is among them."""
        return self.first <= number * self.stride % self.total <= self.last


EVERYBODY = Group(stride=0, total=1, first=0, last=0)


def report(
    database: Database, lease: Lease, *, step: int, value: float, images_per_second: float
) -> None:
    """Store an intermediate value; a step reported again, after a resume, is one row still.

    Only a step beyond those that the trial has reported makes the attempt a fruitful one. Raises
    LeaseLost.
    """
    given = {"step": step, "value": value, "images_per_second": images_per_second}
    database.patiently(lambda: _write(database, _REPORT, lease, given))


def end(
    database: Database,
    lease: Lease,
    *,
    state: TrialState,
    value: float | None,
    reason: str,
    attributes: Mapping[str, Any] | None = None,
) -> None:
    """End the trial and its lease; reason and attributes, plain values, stay with the trial.

    Raises LeaseLost if the trial was somebody else's.
    """
    kept = {**(attributes or {}), "reason": reason[:LONGEST_REASON]}
    given = {"state": state.name, "value": value, "attributes": json.dumps(kept)}

    def transaction() -> None:
        try:
            _write(database, _END, lease, given)
        except LeaseLost:
            # the COMMIT of an earlier try may have gone through
            if not _has_ended(database, lease, state):
                raise

    database.patiently(transaction)


def standing(
    database: Database,
    study_id: int,
    *,
    step: int,
    value: float,
    except_trial_id: int,
    among: Group = EVERYBODY,
) -> Standing:
    """Where the value stands among those of all other trials of the group at this step."""
    given = {"study": study_id, "step": step, "value": value, "trial": except_trial_id}

    def query() -> Standing:
        with database.engine.connect() as connection:
            found = connection.execute(_STANDING, {**given, **dataclasses.asdict(among)})
            return Standing(**found.one()._mapping)

    return database.patiently(query)


def middle(database: Database, study_id: int, *, step: int, trial_id: int) -> Middle:
    """How the trial, which has reported at this step, compares with the study's COMPLETE ones."""
    given = {"study": study_id, "step": step, "trial": trial_id}

    def query() -> Middle:
        with database.engine.connect() as connection:
            return Middle(**connection.execute(_MIDDLE, given).one()._mapping)

    return database.patiently(query)


def _write(database: Database, statement: Any, lease: Lease, given: dict[str, Any]) -> None:
    given = {**given, "lease": lease.lease_id, "token": lease.token}
    with database.engine.begin() as connection:
        if connection.execute(statement, given).one_or_none() is None:
            raise LeaseLost(f"lease {lease.lease_id} is not ours any more")


def _has_ended(database: Database, lease: Lease, state: TrialState) -> bool:
    given = {"lease": lease.lease_id, "token": lease.token, "state": state.name}
    with database.engine.connect() as connection:
        return bool(connection.execute(_HAS_ENDED, given).scalar())


_REPORT = text("""
    WITH lease AS (
        UPDATE hpo_leases l SET reported_at = now(), images_per_second = :images_per_second,
            fruitless_attempts = CASE WHEN EXISTS (
                SELECT FROM trial_intermediate_values v
                WHERE v.trial_id = l.trial_id AND v.step >= :step)
                THEN fruitless_attempts ELSE 0 END
        WHERE lease_id = :lease AND token = :token AND ended_at IS NULL RETURNING trial_id)
    INSERT INTO trial_intermediate_values
        (trial_id, step, intermediate_value, intermediate_value_type)
    SELECT trial_id, :step, :value, 'FINITE' FROM lease JOIN trials USING (trial_id)
    WHERE state = 'RUNNING'
    ON CONFLICT (trial_id, step) DO UPDATE SET intermediate_value = excluded.intermediate_value
    RETURNING trial_id
""")

_END = text("""
    WITH lease AS (
        UPDATE hpo_leases SET ended_at = now(), worker_id = NULL, expires_at = NULL
        WHERE lease_id = :lease AND token = :token AND ended_at IS NULL RETURNING trial_id),
    ended AS (
        UPDATE trials t SET state = CAST(:state AS trialstate),
            datetime_complete = now() AT TIME ZONE 'UTC'
        FROM lease WHERE t.trial_id = lease.trial_id AND t.state = 'RUNNING'
        RETURNING t.trial_id),
    value AS (
        INSERT INTO trial_values (trial_id, objective, value, value_type)
        SELECT trial_id, 0, :value, 'FINITE' FROM ended
        WHERE CAST(:value AS double precision) IS NOT NULL),
    attributes AS (
        INSERT INTO trial_user_attributes (trial_id, key, value_json)
        SELECT trial_id, key, value FROM ended, json_each(CAST(:attributes AS json))
        ON CONFLICT (trial_id, key) DO UPDATE SET value_json = excluded.value_json)
    SELECT trial_id FROM ended
""")

_HAS_ENDED = text("""
    SELECT count(*) FROM hpo_leases l JOIN trials t USING (trial_id)
    WHERE l.lease_id = :lease AND l.token = :token AND l.ended_at IS NOT NULL
        AND t.state = CAST(:state AS trialstate)
""")

_STANDING = text("""
    SELECT count(*) AS num_others, count(*) FILTER (WHERE intermediate_value > :value) AS num_better
    FROM trial_intermediate_values v JOIN trials t USING (trial_id)
    WHERE t.study_id = :study AND v.step = :step AND v.trial_id <> :trial
        AND v.intermediate_value_type = 'FINITE'
        AND CAST(t.number AS bigint) * :stride % :total BETWEEN :first AND :last
""")

_MIDDLE = text("""
    SELECT
        (SELECT max(intermediate_value) FROM trial_intermediate_values v
            WHERE v.trial_id = :trial AND v.step <= :step
            AND v.intermediate_value_type = 'FINITE') AS best,
        (SELECT percentile_cont(0.5) WITHIN GROUP (ORDER BY intermediate_value)
            FROM trial_intermediate_values v JOIN trials t USING (trial_id)
            WHERE t.study_id = :study AND t.state = 'COMPLETE' AND v.step = :step
            AND v.intermediate_value_type = 'FINITE') AS median,
        (SELECT count(*) FROM trials t
            WHERE t.study_id = :study AND t.state = 'COMPLETE') AS num_complete
""")
