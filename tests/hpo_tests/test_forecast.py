import pytest

from hpo import forecast as forecasting
from hpo.forecast import TRIAL_SECONDS, Pace, expected_epochs, forecast
from hpo.pruners import MEDIAN_STARTS, PRUNERS
from hpo.space import SearchSpace
from hpo.spec import StudySpec


def spec(*, epochs: int, first_rung: int, pruner: str = "rungs") -> StudySpec:
    return StudySpec(
        data="digits",
        fingerprint="0" * 64,
        space=SearchSpace(fields={"epochs": epochs}),
        seed=0,
        first_rung=first_rung,
        pruner=pruner,
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


def test_each_pruner_of_a_study_has_its_forecast() -> None:
    assert forecasting._PRUNERS.keys() == PRUNERS.keys()
    found = {
        pruner: expected_epochs(spec(epochs=16, first_rung=4, pruner=pruner), 60)
        for pruner in PRUNERS
    }
    assert found["none"] == (60 * 16, 60 * 17)
    assert found["rungs"][0] < found["hyperband"][0] < found["none"][0]
    assert found["rungs"][0] < found["median"][0] < found["none"][0]


def test_the_median_stops_none_of_the_first_and_half_of_the_later_ones_or_more() -> None:
    starts, _ = expected_epochs(spec(epochs=16, first_rung=4, pruner="median"), MEDIAN_STARTS)
    assert starts == MEDIAN_STARTS * 16
    epochs, _ = expected_epochs(spec(epochs=16, first_rung=4, pruner="median"), 105)
    # of a hundred, less than half go on to their end, as the median rises with each that does
    assert starts + 100 + 15 * 10 <= epochs <= starts + 100 + 15 * 50


def test_hyperband_judges_each_bracket_by_itself_and_the_last_one_never() -> None:
    two = spec(epochs=4, first_rung=4, pruner="hyperband")  # rungs at 4; and none before the end
    epochs, _ = expected_epochs(two, 60)
    rungs, _ = expected_epochs(spec(epochs=4, first_rung=4), 60)
    # four of six trials are in the first bracket, the others are trained to their end
    first, _ = expected_epochs(spec(epochs=4, first_rung=4), 40)
    assert epochs == pytest.approx(first + 20 * 4, rel=0.05)
    assert epochs > rungs


def seconds_of(pace: Pace, num_refused: int = 0) -> float:
    return forecast(
        spec(epochs=2, first_rung=4, pruner="none"),
        num_trials=10,
        num_workers=2,
        num_train=1000,
        num_val=500,
        num_val_early=100,
        paces={"a": pace},
        num_refused=num_refused,
    ).seconds


def test_what_breaks_a_limit_trains_nothing() -> None:
    pace = Pace(train=100, evaluate=1000)
    tail = 2 * 10.5 / 4
    work = 10 * 2 * 10 + 10 * (0.1 + 2 * 0.5)
    assert seconds_of(pace) == pytest.approx((work + 10 * TRIAL_SECONDS) / 2 + tail)
    third = (work / 3 + 10 * TRIAL_SECONDS) / 2 + tail
    assert seconds_of(pace, num_refused=2) == pytest.approx(third)


def test_features_are_computed_once_a_trial_or_once_a_worker_with_the_same_weights() -> None:
    plain = seconds_of(Pace(train=100, evaluate=1000))
    each = seconds_of(Pace(train=100, evaluate=1000, features=300))
    assert each - plain == pytest.approx(10 * 1500 / 300 / 2)
    shared = seconds_of(Pace(train=100, evaluate=1000, features=300, shares_features=True))
    assert shared - plain == pytest.approx(1500 / 300)
