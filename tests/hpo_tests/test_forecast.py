import pytest

from hpo.forecast import TRIAL_SECONDS, Pace, expected_epochs, forecast
from hpo.space import SearchSpace
from hpo.spec import StudySpec


def spec(*, epochs: int, first_rung: int) -> StudySpec:
    return StudySpec(
        data="digits",
        fingerprint="0" * 64,
        space=SearchSpace(fields={"epochs": epochs}),
        seed=0,
        first_rung=first_rung,
    )


def test_without_rungs_every_trial_trains_to_its_end() -> None:
    epochs, reports = expected_epochs(spec(epochs=5, first_rung=1000), 20)
    assert (epochs, reports) == (100, 20 * 6)


def test_rungs_save_most_of_a_studys_epochs() -> None:
    epochs, _ = expected_epochs(spec(epochs=16, first_rung=1), 50)
    assert 50 * 0.25 < epochs < 50 * 16 / 4


def test_a_large_study_is_scaled_from_a_smaller_one() -> None:
    small, _ = expected_epochs(spec(epochs=4, first_rung=4), 200)
    large, _ = expected_epochs(spec(epochs=4, first_rung=4), 2000)
    assert large == pytest.approx(10 * small)


def test_the_end_is_work_over_workers_and_a_tail() -> None:
    found = forecast(
        spec(epochs=2, first_rung=1000),
        num_trials=10,
        num_workers=2,
        num_train=1000,
        num_val=500,
        num_val_early=100,
        paces={"a": Pace(train=100, evaluate=1000), "b": Pace(train=1000 / 30, evaluate=1000)},
    )
    assert found.num_epochs == 20
    work = 20 * 20 + 10 * (0.1 + 2 * 0.5) + 10 * TRIAL_SECONDS
    assert found.seconds == pytest.approx(work / 2 + 2 * 20.5 / 4)
