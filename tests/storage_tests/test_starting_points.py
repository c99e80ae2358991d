"""Starting points, and studies of re-checks, which have nothing else."""

import pytest
from optuna.trial import TrialState

from storage import leases
from storage.database import Database
from storage.leases import Lease, NoWork
from storage.snapshots import snapshot
from storage.starting_points import KEY, add_starting_points
from storage.studies import (
    OpenStudy,
    StudyRecord,
    create_study,
    find_studies,
    find_study,
    request_stop,
)
from tests.parts import make_study


@pytest.fixture
def child(database: Database) -> StudyRecord:
    parent = make_study(database)
    return create_study(
        database,
        "study:recheck-1",
        spec={"lease_seconds": 30},
        budget=1,
        parent_id=parent.study_id,
    )


def claimed(database: Database, record: StudyRecord) -> Lease | NoWork:
    return leases.claim(database, record.study_id, "w", lease_seconds=30)


def run_one(database: Database, record: StudyRecord, state: TrialState) -> str:
    """The key of the point that was run."""
    study = OpenStudy(database, record)
    lease = claimed(database, record)
    assert isinstance(lease, Lease)
    trial_id = study.bind(lease)
    key = str(study.trial(trial_id).user_attrs[KEY])
    value = 0.5 if state == TrialState.COMPLETE else None
    study.end(lease, state, value=value, reason="said")
    return key


def test_points_are_run_once_each_in_their_order_and_nothing_else_is(
    database: Database, child: StudyRecord
) -> None:
    points = {"b": {"config": {"lr": 1}}, "a": {"config": {"lr": 2}}}
    for _ in range(2):
        add_starting_points(database, child, points)
    ran = [run_one(database, child, TrialState.COMPLETE) for _ in points]
    assert ran == ["b", "a"]
    assert claimed(database, child) is NoWork.DONE
    found = snapshot(database, child.study_id)
    assert [trial.attributes["config"] for trial in found.trials] == [{"lr": 1}, {"lr": 2}]


def test_a_study_of_rechecks_makes_no_trial_of_its_own(
    database: Database, child: StudyRecord
) -> None:
    assert claimed(database, child) is NoWork.DONE
    assert snapshot(database, child.study_id).trials == ()


def test_a_point_that_failed_is_added_again_and_does_not_block_the_end(
    database: Database, child: StudyRecord
) -> None:
    add_starting_points(database, child, {"a": {}, "b": {}})
    run_one(database, child, TrialState.FAIL)
    assert run_one(database, child, TrialState.PRUNED) == "b"
    assert claimed(database, child) is NoWork.DONE
    add_starting_points(database, child, {"a": {}, "b": {}})
    assert run_one(database, child, TrialState.COMPLETE) == "a"
    assert claimed(database, child) is NoWork.DONE


def test_others_wait_while_a_point_is_run(database: Database, child: StudyRecord) -> None:
    add_starting_points(database, child, {"a": {}})
    assert isinstance(claimed(database, child), Lease)
    assert claimed(database, child) is NoWork.BUSY


def test_points_of_a_users_study_come_before_its_own_trials(database: Database) -> None:
    record = make_study(database, budget=2)
    add_starting_points(database, record, {"mine": {}})
    assert run_one(database, record, TrialState.COMPLETE) == "mine"
    own = claimed(database, find_study(database, record.name))
    assert isinstance(own, Lease)
    assert own.trial_id is None


def test_rechecks_are_found_by_name_and_not_listed(database: Database, child: StudyRecord) -> None:
    assert find_study(database, child.name) == child
    assert [record.name for record in find_studies(database)] == ["study"]


def test_a_stop_of_the_study_stops_its_rechecks_until_points_are_added(
    database: Database, child: StudyRecord
) -> None:
    add_starting_points(database, child, {"a": {}})
    assert child.parent_id is not None
    request_stop(database, child.parent_id)
    assert claimed(database, child) is NoWork.STOPPED
    add_starting_points(database, child, {"a": {}})
    assert isinstance(claimed(database, child), Lease)
