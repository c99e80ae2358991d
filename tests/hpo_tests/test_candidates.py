import dataclasses

import pytest

from hpo.candidates import Candidate, choose, plan_recheck
from hpo.errors import UsageError
from storage.snapshots import StudySnapshot, TrialSnapshot


def trial(number: int, value: float, epochs: float, *, speed: float = 100.0) -> TrialSnapshot:
    return TrialSnapshot(
        trial_id=number,
        number=number,
        state="COMPLETE" if epochs == 10 else "PRUNED",
        value=value,
        params={},
        attributes={},
        steps=(int(epochs * 4),),
        values=(value,),
        is_feasible=True,
        attempts=1,
        seconds=1.0,
        images_per_second=speed,
    )


def study(*trials: TrialSnapshot) -> StudySnapshot:
    return StudySnapshot(
        budget=len(trials), stop_requested=False, seconds=1.0, trials=trials, workers=()
    )


def searched(num_epochs: int) -> StudySnapshot:
    """Three trials in full, and others until so many epochs were trained."""
    whole = [trial(number, 0.9 - number / 100, 10) for number in range(3)]
    rest = [trial(number, 0.5, 1) for number in range(3, 3 + num_epochs - 30)]
    return study(*whole, *rest)


def planned(num_epochs: int, top_k: int = 3, num_seeds: int = 3) -> tuple[list[int], int]:
    plan = plan_recheck(searched(num_epochs), top_k=top_k, num_seeds=num_seeds, epochs=10)
    return [each.number for each in plan.trials], plan.num_seeds


@pytest.mark.parametrize(
    ("num_epochs", "expected"),
    [
        (180, ([0, 1, 2], 3)),
        (179, ([0, 1, 2], 2)),
        (119, ([0, 1], 2)),
        (79, ([0, 1, 2], 1)),
        (59, ([0, 1], 1)),
        (39, ([0], 1)),
    ],
)
def test_a_recheck_costs_at_most_half_of_the_search(
    num_epochs: int, expected: tuple[list[int], int]
) -> None:
    assert planned(num_epochs) == expected


def test_a_slower_backbone_costs_more() -> None:
    slow = [dataclasses.replace(each, images_per_second=1.0) for each in searched(180).trials[:1]]
    plan = plan_recheck(study(*slow, *searched(180).trials[1:]), top_k=3, num_seeds=3, epochs=10)
    assert ([each.number for each in plan.trials], plan.num_seeds) == ([0], 0)
    assert "more than half" in str(plan.note)


def test_fewer_candidates_or_seeds_than_wished_for_are_said() -> None:
    plan = plan_recheck(searched(119), top_k=3, num_seeds=3, epochs=10)
    assert plan.note is not None
    assert "2 candidates with 2 seeds each instead of 3 with 3" in plan.note
    assert plan_recheck(searched(180), top_k=3, num_seeds=3, epochs=10).note is None
    few = plan_recheck(searched(30), top_k=5, num_seeds=1, epochs=1)
    assert few.note == "the study has 3 trials to choose from"


def test_a_search_that_was_too_short_is_not_rechecked() -> None:
    plan = plan_recheck(study(trial(0, 0.9, 10)), top_k=3, num_seeds=3, epochs=10)
    assert plan.num_seeds == 0
    assert "more than half" in str(plan.note)


def test_no_seeds_are_the_quick_way_and_say_so() -> None:
    assert planned(180, top_k=1, num_seeds=0) == ([0], 0)
    plan = plan_recheck(searched(180), top_k=3, num_seeds=0, epochs=10)
    assert "probably too high" in str(plan.note)


@pytest.mark.parametrize(("top_k", "num_seeds"), [(0, 3), (-1, 3), (3, -1)])
def test_numbers_that_can_not_be_are_refused(top_k: int, num_seeds: int) -> None:
    with pytest.raises(UsageError, match="--top-k must be >= 1 and --seeds >= 0"):
        planned(180, top_k, num_seeds)


def candidate(number: int, *values: float, failures: int = 0) -> Candidate:
    return Candidate(
        trial=trial(number, 0.95, 10), values=values, failures=("it diverged",) * failures
    )


def test_a_candidate_that_does_not_hold_up_loses() -> None:
    lucky, steady = candidate(0, 0.80, 0.82), candidate(1, 0.90, 0.88)
    assert choose([lucky, steady]) is steady
    assert choose([candidate(0, 0.99, failures=1), steady]) is steady
    assert choose([candidate(0), steady]) is steady
    assert choose([candidate(0), candidate(1)]).trial.number == 0


def test_mean_spread_and_every_value_are_shown_and_how_much_too_high_the_search_was() -> None:
    text = candidate(7, 0.90, 0.92).text()
    assert "0.9100 on average with fresh seeds (n = 2, std 0.0141: 0.9000, 0.9200)" in text
    assert "so the search's value was 0.0400 too high" in text
    assert candidate(7, 0.9).std is None


def test_an_average_is_kept_only_if_it_wins_on_validation() -> None:
    found = dataclasses.replace(
        candidate(0, 0.90, 0.92), averages={"ema": (0.91, 0.93), "tail": (0.91,)}
    )
    assert found.best_average() == "ema"  # a tail for one of two seeds is no comparison
    equal = dataclasses.replace(found, averages={"ema": (0.92, 0.90)})
    assert equal.best_average() == "none"
    assert candidate(0).best_average() == "none"
