"""Starting points: trials that are there before a worker asks, each with what it is to run."""

from collections.abc import Mapping
from typing import Any

import optuna
from optuna.trial import TrialState
from sqlalchemy import Connection, text

from storage.database import Database
from storage.schema import optuna_storage
from storage.studies import StudyRecord

KEY = "starting_point"
"""The user attribute that holds a point's key."""


def add_starting_points(
    database: Database,
    record: StudyRecord,
    points: Mapping[str, Mapping[str, Any]],
    *,
    params: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """See to it that the study has a WAITING trial, or what became of it, for each key.

    points: key -> the trial's user attributes, JSON values. A key that is there stays as it is.
    params: key -> what Optuna proposes for the trial, in place of its sampler.
    The budget grows to hold all points; the study goes on if it was stopped.
    """
    fixed = params or {}
    storage = optuna_storage(database)

    def make_sure() -> None:
        with database.engine.begin() as connection:
            # held while Optuna adds trials over a second connection of this process
            connection.execute(_LOCK, {"study": record.study_id})
            for key, attributes in points.items():
                # asked anew for each: many points take longer than a transaction may be idle
                if key not in _keys(connection, record):
                    waiting = optuna.trial.create_trial(
                        state=TrialState.WAITING,
                        user_attrs={**attributes, KEY: key},
                        system_attrs={"fixed_params": dict(fixed[key])} if key in fixed else {},
                    )
                    storage.create_new_trial(record.study_id, template_trial=waiting)
            connection.execute(_GO_ON, {"study": record.study_id})

    try:
        database.patiently(make_sure)
    finally:
        storage.remove_session()


def _keys(connection: Connection, record: StudyRecord) -> set[str]:
    return set(connection.execute(_KEYS, {"study": record.study_id, "key": KEY}).scalars())


_LOCK = text("SELECT pg_advisory_xact_lock(hashtextextended('hpo:points', :study))")

_KEYS = text("""
    SELECT a.value_json::json #>> '{}' FROM trial_user_attributes a JOIN trials t USING (trial_id)
    WHERE t.study_id = :study AND a.key = :key AND t.state <> 'FAIL'
""")

_GO_ON = text("""
    UPDATE hpo_studies s SET stop_requested = false, deadline = NULL, launched_at = now(),
        budget = greatest(budget, (SELECT count(*) FROM trials t
            WHERE t.study_id = s.study_id AND t.state <> 'FAIL'))
    WHERE s.study_id = :study
""")
