import dataclasses
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy import text

from storage import leases
from storage.database import Database
from storage.errors import LeaseLost, StudyDeleted
from storage.leases import Lease, NoWork
from storage.snapshots import snapshot
from storage.studies import OpenStudy, StudyRecord, relaunch, request_stop
from tests.parts import make_study

SHORT = 0.3


def claim(database: Database, record: StudyRecord, worker: str = "w", seconds: float = 30) -> Any:
    return leases.claim(database, record.study_id, worker, lease_seconds=seconds)


def begin(database: Database, study: OpenStudy, worker: str = "w", seconds: float = 30) -> Lease:
    """A lease that is bound to a trial."""
    lease = claim(database, study.record, worker, seconds)
    assert isinstance(lease, Lease)
    return dataclasses.replace(lease, trial_id=study.bind(lease))


def end(study: OpenStudy, lease: Lease, state: TrialState) -> None:
    value = 0.5 if state == TrialState.COMPLETE else None
    study.end(lease, state, value=value, reason="said")


def states(database: Database, record: StudyRecord) -> list[str]:
    return [trial.state for trial in snapshot(database, record.study_id).trials]


def let_expire(database: Database, record: StudyRecord) -> None:
    """As if the lease's time had passed, and the database had run for long."""
    with database.engine.begin() as connection:
        connection.execute(
            text("UPDATE hpo_leases SET expires_at = now() - interval '1 s' WHERE study_id = :s"),
            {"s": record.study_id},
        )


def test_claims_end_with_the_budget(database: Database) -> None:
    record = make_study(database, budget=3)
    claimed = [claim(database, record) for _ in range(4)]
    assert [isinstance(each, Lease) for each in claimed] == [True, True, True, False]
    assert claimed[3] is NoWork.BUSY


def test_a_study_whose_budget_is_used_up_is_done(database: Database) -> None:
    record = make_study(database, budget=2)
    study = OpenStudy(database, record)
    end(study, begin(database, study), TrialState.COMPLETE)
    end(study, begin(database, study), TrialState.PRUNED)
    assert claim(database, record) is NoWork.DONE


def test_a_failed_trial_does_not_count(database: Database) -> None:
    record = make_study(database, budget=1)
    study = OpenStudy(database, record)
    end(study, begin(database, study), TrialState.FAIL)
    assert isinstance(claim(database, record), Lease)


def test_sixteen_claimers_at_once_get_the_budget_exactly(database_url: str) -> None:
    databases = [Database(database_url) for _ in range(16)]
    record = make_study(databases[0], budget=20)

    def drain(database: Database) -> list[Lease]:
        found = []
        while isinstance(claimed := claim(database, record), Lease):
            found.append(claimed)
        return found

    with ThreadPoolExecutor(16) as pool:
        drained = [lease for found in pool.map(drain, databases) for lease in found]
    for database in databases:
        database.engine.dispose()
    assert len(drained) == len({lease.token for lease in drained}) == 20


def test_trial_and_lease_are_bound_in_one_transaction(database: Database) -> None:
    record = make_study(database)
    study = OpenStudy(database, record)
    lease = claim(database, record)
    let_expire(database, record)
    leases.reap(database, record.study_id)  # the unbound lease is gone
    with pytest.raises(LeaseLost):
        study.bind(lease)
    assert states(database, record) == []


def test_binding_again_after_a_lost_commit_makes_no_second_trial(database: Database) -> None:
    record = make_study(database)
    study = OpenStudy(database, record)
    lease = claim(database, record)
    assert study.bind(lease) == study.bind(lease)
    assert states(database, record) == ["RUNNING"]


def test_an_expired_lease_is_taken_over_with_its_trial(database: Database) -> None:
    record = make_study(database, lease_seconds=SHORT)
    study = OpenStudy(database, record)
    first = begin(database, study, "first", SHORT)
    assert claim(database, record, "other").trial_id is None  # it is still held
    time.sleep(2 * SHORT)
    second = claim(database, record, "second")
    assert second.trial_id == study.bind(first)
    assert second.token > first.token
    assert second.attempts == 2


def test_nothing_is_taken_over_within_one_lease_of_the_databases_start(database: Database) -> None:
    record = make_study(database, lease_seconds=3600, budget=1)
    study = OpenStudy(database, record)
    begin(database, study)
    let_expire(database, record)
    assert claim(database, record) is NoWork.BUSY


def test_who_lost_the_lease_writes_nothing(database: Database) -> None:
    record = make_study(database, lease_seconds=SHORT)
    study = OpenStudy(database, record)
    old = begin(database, study, "old", SHORT)
    trial_id = study.bind(old)
    trial = study.trial(trial_id)
    time.sleep(2 * SHORT)
    new = claim(database, record, "new")
    for write in (
        lambda: study.report(old, 1, 0.9, images_per_second=1.0),
        lambda: study.write(old, lambda: trial.suggest_float("lr", 0, 1)),
        lambda: study.write(old, lambda: trial.set_user_attr("plan", {})),
        lambda: study.end(old, TrialState.COMPLETE, value=0.9, reason="old"),
    ):
        with pytest.raises(LeaseLost):
            write()
    found = snapshot(database, record.study_id).trials[0]
    assert (found.steps, found.params, found.attributes, found.state) == ((), {}, {}, "RUNNING")
    assert leases.renew(database, old, "old", lease_seconds=30).holds_lease is False
    assert leases.renew(database, new, "new", lease_seconds=30).holds_lease is True


def test_ending_again_after_a_lost_commit_changes_nothing(database: Database) -> None:
    record = make_study(database)
    study = OpenStudy(database, record)
    lease = begin(database, study)
    end(study, lease, TrialState.COMPLETE)
    end(study, lease, TrialState.COMPLETE)
    assert states(database, record) == ["COMPLETE"]
    with pytest.raises(LeaseLost):
        end(study, lease, TrialState.PRUNED)


def test_a_released_trial_is_resumed_before_anything_new(database: Database) -> None:
    record = make_study(database)
    study = OpenStudy(database, record)
    lease = begin(database, study)
    leases.release(database, lease)
    assert states(database, record) == ["WAITING"]
    assert claim(database, record).trial_id == study.bind(lease)


def test_the_lease_of_a_dead_worker_is_free_at_once(database: Database) -> None:
    record = make_study(database)
    study = OpenStudy(database, record)
    lease = begin(database, study, "dead")
    leases.forget_worker(database, "dead")
    assert claim(database, record).trial_id == study.bind(lease)


def test_three_attempts_without_a_report_end_a_trial(database: Database) -> None:
    record = make_study(database, budget=1)
    study = OpenStudy(database, record)
    for attempt in (1, 2, 3):
        lease = begin(database, study, f"w{attempt}")
        assert lease.attempts == attempt
        leases.forget_worker(database, f"w{attempt}", cause="killed by signal 9")
    leases.reap(database, record.study_id)
    trial = snapshot(database, record.study_id).trials[0]
    assert trial.state == "FAIL"
    assert trial.attributes["reason"] == (
        "3 attempts in a row came no further; the last one: killed by signal 9"
    )


def test_only_a_new_step_makes_the_count_of_fruitless_attempts_begin_anew(
    database: Database,
) -> None:
    record = make_study(database, budget=1)
    study = OpenStudy(database, record)
    for attempt in range(6):
        lease = begin(database, study, f"w{attempt}")
        study.report(lease, attempt, 0.1, images_per_second=1.0)
        leases.forget_worker(database, f"w{attempt}")
    assert states(database, record) == ["WAITING"]


def test_an_attempt_that_only_repeats_what_was_reported_is_fruitless(database: Database) -> None:
    record = make_study(database, budget=1)
    study = OpenStudy(database, record)
    for attempt in range(4):
        lease = begin(database, study, f"w{attempt}")
        study.report(lease, 1, 0.1, images_per_second=1.0)
        study.report(lease, 4, 0.1, images_per_second=1.0)
        leases.forget_worker(database, f"w{attempt}")
    leases.reap(database, record.study_id)
    assert states(database, record) == ["FAIL"]


def test_a_checkpoint_further_on_within_an_epoch_is_progress_too(database: Database) -> None:
    record = make_study(database, budget=1)
    study = OpenStudy(database, record)
    for attempt in range(6):
        lease = begin(database, study, f"w{attempt}")
        leases.advance(database, lease, 100 + attempt)
        leases.forget_worker(database, f"w{attempt}")
    assert states(database, record) == ["WAITING"]
    for attempt in range(2):
        lease = begin(database, study, f"v{attempt}")
        leases.advance(database, lease, 100)
        leases.forget_worker(database, f"v{attempt}")
    lease = begin(database, study, "v3")
    leases.forget_worker(database, "v3")
    leases.reap(database, record.study_id)
    assert states(database, record) == ["FAIL"]


def known(database: Database, record: StudyRecord, worker: str, place: str) -> None:
    leases.register_worker(
        database, record.study_id, worker, host="h", pid=1, device="cpu", place=place
    )


def test_a_place_that_gave_a_trial_back_leaves_it_to_another_one(database: Database) -> None:
    record = make_study(database)
    study = OpenStudy(database, record)
    known(database, record, "sick", "here")
    known(database, record, "well", "there")
    first = begin(database, study, "sick")
    leases.give_back(database, first, "OSError: no space", may_be_the_trials=True)
    known(database, record, "sick again", "here")
    assert claim(database, record, "sick again").trial_id is None
    second = claim(database, record, "well")
    assert (second.trial_id, second.errors) == (first.trial_id, 1)


def test_a_place_takes_its_own_trial_again_where_there_is_no_other(database: Database) -> None:
    record = make_study(database)
    study = OpenStudy(database, record)
    known(database, record, "w", "here")
    first = begin(database, study, "w")
    leases.give_back(database, first, "OSError: no space", may_be_the_trials=False)
    second = claim(database, record, "w")
    assert (second.trial_id, second.errors) == (first.trial_id, 0)


def test_errors_of_its_own_make_a_worker_sick_until_one_of_its_place_works(
    database: Database,
) -> None:
    record = make_study(database)
    for number in (1, 2):
        known(database, record, f"w{number}", "here")
        leases.mark_sick(database, f"w{number}", f"no disk {number}")
        leases.forget_worker(database, f"w{number}")
    study = snapshot(database, record.study_id)
    assert [(sick.id, sick.reason) for sick in study.sick] == [("w2", "no disk 2")]
    assert study.workers == ()
    known(database, record, "w3", "here")
    assert snapshot(database, record.study_id).sick == ()


def test_a_launch_without_a_time_limit_leaves_the_limit_of_one_that_runs(
    database: Database,
) -> None:
    record = make_study(database)
    relaunch(database, record.study_id, budget=None, timeout_seconds=3600)
    known(database, record, "w", "here")
    relaunch(database, record.study_id, budget=None, timeout_seconds=None)
    assert has_deadline(database, record)
    leases.forget_worker(database, "w")
    relaunch(database, record.study_id, budget=None, timeout_seconds=None)
    assert not has_deadline(database, record)


def has_deadline(database: Database, record: StudyRecord) -> bool:
    with database.engine.connect() as connection:
        found = connection.execute(
            text("SELECT deadline IS NOT NULL FROM hpo_studies WHERE study_id = :s"),
            {"s": record.study_id},
        )
        return bool(found.scalar())


def test_a_trial_asked_for_outside_is_swept(database: Database) -> None:
    record = make_study(database)
    study = OpenStudy(database, record)
    study.study.ask()
    leases.reap(database, record.study_id)
    assert states(database, record) == ["FAIL"]


def test_starting_points_are_claimed_first_and_once(database: Database) -> None:
    record = make_study(database, budget=3)
    study = OpenStudy(database, record)
    study.study.enqueue_trial({"lr": 0.25})
    first, second = claim(database, record, "a"), claim(database, record, "b")
    assert first.trial_id is not None
    assert second.trial_id is None
    trial = study.trial(first.trial_id)
    assert study.write(first, lambda: trial.suggest_float("lr", 0, 1)) == 0.25


@pytest.mark.parametrize(
    ("ends", "fails"),
    [
        ("FFF", True),
        ("FF", False),
        ("FFCF", False),
        ("FCFCFCF", True),  # four are more than a tenth of 30
        ("FCFCFC", False),  # three are not more than a tenth of 30
    ],
)
def test_a_study_that_only_fails_ends(database: Database, ends: str, fails: bool) -> None:
    record = make_study(database, budget=30)
    study = OpenStudy(database, record)
    kinds = {"F": TrialState.FAIL, "C": TrialState.COMPLETE}
    for each in ends:
        end(study, begin(database, study), kinds[each])
    assert (claim(database, record) is NoWork.FAILING) is fails
    relaunch(database, record.study_id, budget=None, timeout_seconds=None)
    assert isinstance(claim(database, record), Lease)


def test_a_stopped_study_gives_no_work_until_it_is_launched_again(database: Database) -> None:
    record = make_study(database)
    leases.register_worker(database, record.study_id, "w", host="h", pid=1, device="cpu")
    request_stop(database, record.study_id)
    assert claim(database, record) is NoWork.STOPPED
    assert leases.renew(database, None, "w", lease_seconds=30).study_goes_on is False
    relaunch(database, record.study_id, budget=None, timeout_seconds=0.2)
    assert isinstance(claim(database, record), Lease)
    time.sleep(0.3)
    assert claim(database, record) is NoWork.STOPPED


def test_a_deleted_study_is_told_as_such(database: Database) -> None:
    record = make_study(database)
    study = OpenStudy(database, record)
    leases.register_worker(database, record.study_id, "w", host="h", pid=1, device="cpu")
    lease = begin(database, study)
    optuna.delete_study(study_name=record.name, storage=study.study._storage)
    with pytest.raises(StudyDeleted, match="the study was deleted"):
        claim(database, record)
    with pytest.raises(StudyDeleted):
        snapshot(database, record.study_id)
    renewal = leases.renew(database, lease, "w", lease_seconds=30)
    assert (renewal.holds_lease, renewal.study_goes_on) == (False, False)


def test_a_trial_ended_in_the_dashboard_is_lost_to_its_worker(database: Database) -> None:
    record = make_study(database)
    study = OpenStudy(database, record)
    lease = begin(database, study)
    trial_id = study.bind(lease)
    study.study._storage.set_trial_state_values(trial_id, TrialState.FAIL)
    with pytest.raises(LeaseLost):
        study.report(lease, 1, 0.5, images_per_second=1.0)
    leases.reap(database, record.study_id)
    assert leases.renew(database, lease, "w", lease_seconds=30).holds_lease is False
