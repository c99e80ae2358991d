"""What a study looks like at this moment, in two statements. Reads only."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from optuna.distributions import json_to_distribution
from sqlalchemy import text

from storage.database import Database
from storage.errors import StudyDeleted


@dataclass(frozen=True, kw_only=True)
class TrialSnapshot:
    """A trial with its curve: `values[i]` is the objective's value at `steps[i]`.

    state: COMPLETE, PRUNED, FAIL, RUNNING, or WAITING: for a worker to begin it or go on with it.
    """

    trial_id: int
    number: int
    state: str
    value: float | None
    params: Mapping[str, Any]
    attributes: Mapping[str, Any]
    steps: tuple[int, ...]
    values: tuple[float, ...]
    is_feasible: bool
    attempts: int
    seconds: float
    images_per_second: float
    token: int = 0
    """Of its newest lease."""


@dataclass(frozen=True, kw_only=True)
class WorkerSnapshot:
    """A worker that was seen within one lease's time. state: starting or working."""

    id: str
    host: str
    pid: int
    device: str
    trial: int | None
    step: int | None
    images_per_second: float
    state: str = "working"


@dataclass(frozen=True, kw_only=True)
class SickWorker:
    """A worker that has left for a reason of its own since the study was last launched."""

    id: str
    host: str
    device: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class StudySnapshot:
    """Counts of a study; `seconds` from the first claim to the last report."""

    budget: int
    stop_requested: bool
    seconds: float
    trials: tuple[TrialSnapshot, ...]
    workers: tuple[WorkerSnapshot, ...]
    sick: tuple[SickWorker, ...] = ()

    def count(self, state: str) -> int:
        """Trials in this state."""
        return sum(trial.state == state for trial in self.trials)

    @property
    def num_finished(self) -> int:
        """Trials that count for the budget."""
        return self.count("COMPLETE") + self.count("PRUNED")


def snapshot(database: Database, study_id: int) -> StudySnapshot:
    """The study now, consistent in itself. Raises StudyDeleted."""

    def query() -> StudySnapshot:
        with database.engine.connect() as connection:
            connection = connection.execution_options(isolation_level="REPEATABLE READ")
            given = {"study": study_id}
            study = connection.execute(_STUDY, given).one_or_none()
            if study is None:
                raise StudyDeleted
            trials = tuple(_trial(row) for row in connection.execute(_TRIALS, given))
            workers = tuple(
                WorkerSnapshot(**row._mapping) for row in connection.execute(_WORKERS, given)
            )
            sick = tuple(SickWorker(**row._mapping) for row in connection.execute(_SICK, given))
            return StudySnapshot(**study._mapping, trials=trials, workers=workers, sick=sick)

    return database.patiently(query)


def _trial(row: Any) -> TrialSnapshot:
    params = {}
    for name, (stored, distribution) in (row.params or {}).items():
        params[name] = json_to_distribution(distribution).to_external_repr(stored)
    curve = row.curve or []
    return TrialSnapshot(
        trial_id=row.trial_id,
        number=row.number,
        state=row.state,
        value=row.value,
        params=dict(sorted(params.items())),
        attributes={key: json.loads(value) for key, value in (row.attributes or {}).items()},
        steps=tuple(int(step) for step, _ in curve),
        values=tuple(value for _, value in curve),
        is_feasible=row.is_feasible,
        attempts=row.attempts,
        seconds=row.seconds,
        images_per_second=row.images_per_second,
        token=row.token,
    )


_STUDY = text("""
    SELECT s.budget, s.stop_requested,
        coalesce(extract(epoch FROM max(l.reported_at) - min(l.claimed_at)), 0)::float AS seconds
    FROM hpo_studies s LEFT JOIN hpo_leases l USING (study_id)
    WHERE s.study_id = :study GROUP BY s.study_id
""")

# A running trial whose lease is released or has expired waits for its next worker.
_TRIALS = text("""
    SELECT t.trial_id, t.number,
        CASE WHEN t.state = 'RUNNING' AND (l.expires_at IS NULL OR l.expires_at < now())
            THEN 'WAITING' ELSE t.state::text END AS state,
        (SELECT value FROM trial_values v WHERE v.trial_id = t.trial_id
            AND v.value_type = 'FINITE') AS value,
        (SELECT json_object_agg(param_name, json_build_array(param_value, distribution_json))
            FROM trial_params p WHERE p.trial_id = t.trial_id) AS params,
        (SELECT json_object_agg(key, value_json)
            FROM trial_user_attributes a WHERE a.trial_id = t.trial_id) AS attributes,
        (SELECT json_agg(json_build_array(step, intermediate_value) ORDER BY step)
            FROM trial_intermediate_values i WHERE i.trial_id = t.trial_id
            AND i.intermediate_value_type = 'FINITE') AS curve,
        NOT EXISTS (SELECT FROM trial_system_attributes c WHERE c.trial_id = t.trial_id
            AND c.key LIKE 'constraints:%' AND c.value_json::float > 0) AS is_feasible,
        coalesce(l.attempts, 0) AS attempts, coalesce(l.token, 0) AS token,
        coalesce(extract(epoch FROM
            coalesce(l.ended_at, l.reported_at) - l.claimed_at), 0)::float AS seconds,
        coalesce(l.images_per_second, 0)::float AS images_per_second
    FROM trials t LEFT JOIN hpo_leases l USING (trial_id)
    WHERE t.study_id = :study ORDER BY t.number
""")

_WORKERS = text("""
    SELECT w.worker_id AS id, w.host, w.pid, w.device, w.state, t.number AS trial,
        (SELECT max(step) FROM trial_intermediate_values i WHERE i.trial_id = t.trial_id) AS step,
        CASE WHEN t.number IS NULL THEN 0
            ELSE coalesce(l.images_per_second, 0)::float END AS images_per_second
    FROM hpo_workers w JOIN hpo_studies s USING (study_id)
        LEFT JOIN hpo_leases l ON l.worker_id = w.worker_id AND l.ended_at IS NULL
        LEFT JOIN trials t USING (trial_id)
    WHERE w.study_id = :study AND w.state <> 'sick' AND w.seen_at > now() -
        make_interval(secs => (s.spec->>'lease_seconds')::float)
    ORDER BY w.worker_id
""")

_SICK = text("""
    SELECT worker_id AS id, host, device, coalesce(reason, '') AS reason FROM hpo_workers
    WHERE study_id = :study AND state = 'sick' ORDER BY seen_at, worker_id
""")
