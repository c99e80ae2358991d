"""Points of a list that is tried once through: which trial has which.

An index that a trial has stays its own, unless the trial ends as FAIL: then it is free again, and
is taken once all others have been.
"""

from typing import Any

from sqlalchemy import text

from storage.database import Database
from storage.errors import LeaseLost, StorageError
from storage.leases import Lease


def take_point(database: Database, lease: Lease, *, num_points: int) -> int:
    """The index in [0, num_points) of the lease's trial: the one it has, or a free one.

    One transaction under a lock of the study's points, so that no two trials have the same one.
    Raises LeaseLost, or StorageError if none is free.
    """
    given = {
        "study": lease.study_id,
        "lease": lease.lease_id,
        "token": lease.token,
        "most": num_points,
    }

    def transaction() -> int:
        with database.engine.begin() as connection:
            connection.execute(_LOCK, given)
            trial = connection.execute(_HOLD, given).scalar()
            if trial is None:
                raise LeaseLost(f"lease {lease.lease_id} is not ours any more")
            found: Any = connection.execute(_MINE, {"trial": trial}).scalar()
            if found is None:
                found = connection.execute(_TAKE, {**given, "trial": trial}).scalar()
            if found is None:
                raise StorageError(f"all {num_points} points of the grid are taken")
            return int(found)

    return database.patiently(transaction)


_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended('hpo:grid', :study))")

_HOLD = text("""
    SELECT trial_id FROM hpo_leases
    WHERE lease_id = :lease AND token = :token AND ended_at IS NULL FOR UPDATE
""")

_MINE = text("""
    SELECT value_json FROM trial_user_attributes WHERE trial_id = :trial AND key = 'grid_point'
""")

# Of the first free ones, one that has failed least often: so a point that always fails is met again
# only after all others.
_TAKE = text("""
    WITH tried AS (
        SELECT a.value_json::int AS point, bool_or(t.state <> 'FAIL') AS is_held, count(*) AS times
        FROM trial_user_attributes a JOIN trials t USING (trial_id)
        WHERE t.study_id = :study AND a.key = 'grid_point' GROUP BY 1),
    free AS (
        SELECT point FROM generate_series(
            0, least(:most - 1, (SELECT count(*) FROM tried))) AS point
        LEFT JOIN tried USING (point) WHERE NOT coalesce(is_held, false)
        ORDER BY coalesce(times, 0), point LIMIT 1)
    INSERT INTO trial_user_attributes (trial_id, key, value_json)
    SELECT :trial, 'grid_point', point::text FROM free RETURNING value_json
""")
