"""The study, and what of Optuna's inside we rely on."""

import optuna
import pytest
from optuna.trial import TrialState
from sqlalchemy import text

from storage import leases
from storage.database import Database
from storage.errors import StorageError, StudyNotFound
from storage.leases import Lease
from storage.results import LONGEST_REASON, Standing
from storage.snapshots import snapshot
from storage.studies import (
    OpenStudy,
    count_test_opening,
    create_study,
    find_studies,
    find_study,
    relaunch,
)
from tests.parts import make_study


def begun(database: Database, study: OpenStudy) -> tuple[Lease, int]:
    lease = leases.claim(database, study.record.study_id, "w", lease_seconds=30)
    assert isinstance(lease, Lease)
    return lease, study.bind(lease)


def test_whoever_comes_second_finds_what_the_first_one_made(database: Database) -> None:
    first = create_study(database, "s", spec={"lease_seconds": 1, "is": "first"}, budget=3)
    second = create_study(database, "s", spec={"lease_seconds": 1, "is": "second"}, budget=9)
    assert first == second
    assert find_studies(database) == [first]


def test_an_unknown_study_is_not_found(database: Database) -> None:
    with pytest.raises(StudyNotFound):
        find_study(database, "nothing")


def test_an_optuna_study_of_somebody_else_is_left_alone(database: Database) -> None:
    study = OpenStudy(database, make_study(database)).study
    optuna.create_study(study_name="theirs", storage=study._storage)
    with pytest.raises(StorageError, match="hpo did not make"):
        create_study(database, "theirs", spec={"lease_seconds": 1}, budget=3)


def test_optuna_sees_the_study_as_its_own(database: Database) -> None:
    study = OpenStudy(database, make_study(database)).study
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE
    assert study.trials == []


def test_a_new_budget_replaces_the_old_one(database: Database) -> None:
    record = make_study(database, budget=3)
    relaunch(database, record.study_id, budget=7, timeout_seconds=None)
    assert find_study(database, record.name).budget == 7
    relaunch(database, record.study_id, budget=None, timeout_seconds=None)
    assert find_study(database, record.name).budget == 7


def test_openings_of_the_test_split_are_counted(database: Database) -> None:
    record = make_study(database)
    assert [count_test_opening(database, record.study_id) for _ in range(2)] == [1, 2]


def test_a_step_reported_twice_is_one_row(database: Database) -> None:
    study = OpenStudy(database, make_study(database))
    lease, _ = begun(database, study)
    for value in (0.5, 0.5):
        study.report(lease, 4, value, images_per_second=10.0)
    found = snapshot(database, study.record.study_id).trials[0]
    assert (found.steps, found.values) == ((4,), (0.5,))


def test_a_value_stands_among_those_of_all_other_trials_at_its_step(database: Database) -> None:
    study = OpenStudy(database, make_study(database))
    ids = []
    for value in (0.1, 0.2, 0.3):
        lease, trial_id = begun(database, study)
        study.report(lease, 4, value, images_per_second=1.0)
        ids.append(trial_id)
    for value, num_better in ((0.05, 2), (0.1, 1), (0.2, 1), (0.3, 0)):
        found = study.standing(4, value, except_trial_id=ids[1])
        assert (found.num_better, found.num_others) == (num_better, 2)
    assert study.standing(8, 0.5, except_trial_id=ids[1]) == Standing(num_better=0, num_others=0)


def test_a_constraint_makes_a_trial_infeasible(database: Database) -> None:
    study = OpenStudy(database, make_study(database))
    lease, trial_id = begun(database, study)
    study.write(lease, lambda: study.trial(trial_id).set_constraint("trainable", 1.0))
    study.end(lease, TrialState.PRUNED, value=None, reason="NaN")
    found = snapshot(database, study.record.study_id).trials[0]
    assert (found.is_feasible, found.value, found.state) == (False, None, "PRUNED")
    assert study.study.trials[0].constraints == {"trainable": 1.0}


def test_a_trial_that_is_taken_up_again_keeps_its_parameters(database: Database) -> None:
    study = OpenStudy(database, make_study(database))
    lease, trial_id = begun(database, study)
    first = study.write(lease, lambda: study.trial(trial_id).suggest_float("lr", 0, 1))
    elsewhere = OpenStudy(database, study.record)
    again = elsewhere.write(lease, lambda: elsewhere.trial(trial_id).suggest_float("lr", 0, 1))
    assert first == again


def test_a_trial_that_another_process_began_can_be_given_a_parameter_with_one_choice(
    database: Database,
) -> None:
    study = OpenStudy(database, make_study(database))
    lease, trial_id = begun(database, study)
    elsewhere = OpenStudy(database, study.record)
    trial = elsewhere.trial(trial_id)
    assert elsewhere.write(lease, lambda: trial.suggest_categorical("backbone", ["a"])) == "a"


def test_a_study_in_another_process_sees_what_has_ended(database: Database) -> None:
    study = OpenStudy(database, make_study(database))
    elsewhere = OpenStudy(database, study.record)
    assert elsewhere.study.trials == []
    lease, _ = begun(database, study)
    study.end(lease, TrialState.COMPLETE, value=0.75, reason="said")
    assert elsewhere.study.best_value == 0.75
    assert elsewhere.study.trials[0].user_attrs == {"reason": "said"}


def test_attributes_are_written_with_the_end(database: Database) -> None:
    study = OpenStudy(database, make_study(database))
    lease, _ = begun(database, study)
    given = {"spent": {"worker": "w", "training": 1.5}, "said": 'a "quoted" word, \\ and \u00e4'}
    study.end(lease, TrialState.COMPLETE, value=0.5, reason="done", attributes=given)
    assert study.study.trials[0].user_attrs == {**given, "reason": "done"}


def test_of_a_reason_without_end_a_part_stays(database: Database) -> None:
    study = OpenStudy(database, make_study(database))
    lease, _ = begun(database, study)
    study.end(lease, TrialState.FAIL, value=None, reason="x" * 100_000)
    assert study.study.trials[0].user_attrs == {"reason": "x" * LONGEST_REASON}


def test_a_snapshot_turns_stored_values_back_into_those_suggested(database: Database) -> None:
    study = OpenStudy(database, make_study(database))
    lease, trial_id = begun(database, study)

    def suggest() -> None:
        trial = study.trial(trial_id)
        trial.suggest_categorical("backbone", ["a", "b"])
        trial.suggest_int("batch_size", 32, 64)
        trial.suggest_float("lr", 1e-4, 1e-1, log=True)

    study.write(lease, suggest)
    found = snapshot(database, study.record.study_id).trials[0]
    assert dict(found.params) == study.study.trials[0].params


def test_optunas_own_tables_have_the_columns_that_our_statements_name(database: Database) -> None:
    wanted = {
        "studies": {"study_id", "study_name"},
        "study_directions": {"direction", "study_id", "objective"},
        "trials": {
            "trial_id", "number", "study_id", "state", "datetime_start", "datetime_complete",
        },
        "trial_params": {"trial_id", "param_name", "param_value", "distribution_json"},
        "trial_values": {"trial_id", "value", "value_type"},
        "trial_intermediate_values": {
            "trial_id", "step", "intermediate_value", "intermediate_value_type",
        },
        "trial_user_attributes": {"trial_id", "key", "value_json"},
        "trial_system_attributes": {"trial_id", "key", "value_json"},
    }  # fmt: skip
    with database.engine.connect() as connection:
        for table, columns in wanted.items():
            found = connection.execute(
                text("SELECT column_name FROM information_schema.columns WHERE table_name = :t"),
                {"t": table},
            )
            assert columns <= set(found.scalars()), table
