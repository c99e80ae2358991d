"""Re-checks: the best few of a search trained again, by workers, with the same leases.

They are starting points of a study of their own, whose parent is the search's: its workers train
each to its end, no rung stops them, and none of it counts in the search's status.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

from hpo.candidates import Candidate, RecheckPlan
from hpo.errors import Interrupted
from hpo.spec import StudySpec
from storage.database import Database
from storage.errors import StudyNotFound
from storage.snapshots import StudySnapshot, TrialSnapshot, snapshot
from storage.starting_points import KEY, add_starting_points
from storage.studies import StudyRecord, create_study, find_study

AVERAGES = ("ema", "tail")
_SEED_STRIDE = 7_919
_NO_TRIALS: tuple[TrialSnapshot, ...] = ()


class RunWorkers(Protocol):
    """Runs a study's workers until nothing is left for them; returns the study as it is then."""

    def __call__(self, record: StudyRecord, /, *, alone: bool = False) -> StudySnapshot:
        """alone: one worker, which has all cores of a CPU."""


def fresh_seed(trial: TrialSnapshot, index: int) -> int:
    """A seed that the trial was not trained with: 0 for its retraining, 1, ... for re-checks."""
    return int((trial.attributes["config"]["seed"] + _SEED_STRIDE * (index + 1)) % 2**31)


def recheck(
    database: Database, record: StudyRecord, plan: RecheckPlan, *, run_workers: RunWorkers
) -> list[Candidate]:
    """Train what the plan asks for, but for what was trained before, and say what came of it.

    Raises what `run_workers` raises, and Interrupted if somebody stopped the study.
    """
    if plan.num_seeds:
        child = _study_of_rechecks(database, record)
        points = {
            _key(trial, index): _point(trial, index)
            for index in range(1, plan.num_seeds + 1)
            for trial in plan.trials
        }
        if not set(points) <= _ended(snapshot(database, child.study_id).trials):
            add_starting_points(database, child, points)
            ended = run_workers(find_study(database, child.name))
            if ended.count("WAITING") or ended.count("RUNNING"):
                raise Interrupted("the re-check was stopped; the same command goes on with it")
    return known_candidates(database, record, plan)


def known_candidates(database: Database, record: StudyRecord, plan: RecheckPlan) -> list[Candidate]:
    """The plan's candidates with the re-checks that are there; trains nothing."""
    try:
        child = find_study(database, _name(record))
        found = snapshot(database, child.study_id).trials
    except StudyNotFound:
        found = _NO_TRIALS
    runs = {str(run.attributes.get(KEY)): run for run in found}
    return [
        _candidate(trial, [runs.get(_key(trial, index + 1)) for index in range(plan.num_seeds)])
        for trial in plan.trials
    ]


def runs_of(database: Database, record: StudyRecord, candidate: Candidate) -> list[TrialSnapshot]:
    """The whole re-checks of a candidate, in the order of its values."""
    try:
        child = find_study(database, _name(record))
    except StudyNotFound:
        return []
    prefix = f"{candidate.trial.number}/"
    runs = snapshot(database, child.study_id).trials
    return [
        run
        for run in sorted(runs, key=_place)
        if str(run.attributes.get(KEY)).startswith(prefix) and run.state == "COMPLETE"
    ]


def _study_of_rechecks(database: Database, record: StudyRecord) -> StudyRecord:
    spec = StudySpec.from_json(record.spec)
    without_rungs = dataclasses.replace(spec, pruner="none")
    return create_study(
        database,
        _name(record),
        spec=without_rungs.to_json(),
        budget=1,
        parent_id=record.study_id,
    )


def _name(record: StudyRecord) -> str:
    """No user's study can have it, and no earlier study of that name had it."""
    return f"{record.name}:recheck-{record.study_id}"


def _key(trial: TrialSnapshot, index: int) -> str:
    return f"{trial.number}/{index}"


def _point(trial: TrialSnapshot, index: int) -> Mapping[str, Any]:
    return {
        "config": {**trial.attributes["config"], "seed": fresh_seed(trial, index)},
        "plan": trial.attributes["plan"],
        "try_averages": AVERAGES,
        "of_trial": trial.number,
    }


def _place(run: TrialSnapshot) -> list[int]:
    """Of a run among others: its key's numbers, which as text would have 10 before 2."""
    return [int(part) for part in str(run.attributes.get(KEY)).split("/") if part.isdecimal()]


def _ended(runs: Sequence[TrialSnapshot]) -> set[str]:
    return {str(run.attributes.get(KEY)) for run in runs if run.state in ("COMPLETE", "PRUNED")}


def _candidate(trial: TrialSnapshot, runs: Sequence[TrialSnapshot | None]) -> Candidate:
    whole = [run for run in runs if run is not None and run.state == "COMPLETE"]
    failed = [run for run in runs if run is not None and run.state in ("PRUNED", "FAIL")]
    return Candidate(
        trial=trial,
        values=tuple(run.value for run in whole if run.value is not None),
        averages={
            name: tuple(
                run.attributes["averages"][name]
                for run in whole
                if name in run.attributes.get("averages", {})
            )
            for name in AVERAGES
        },
        failures=tuple(str(run.attributes.get("reason", "no reason known")) for run in failed),
    )
