"""Pruners: each decides as its name says, in words, and alike when it is asked again."""

import dataclasses
import random
from collections import Counter

import optuna
import pytest
from optuna.trial import TrialState

from hpo.pruners import PRUNERS, Moment, brackets
from hpo.space import Range, SearchSpace
from hpo.spec import StudySpec
from storage import leases
from storage.database import Database
from storage.leases import Lease
from storage.studies import OpenStudy
from tests.parts import make_study

SPEC = StudySpec(
    data="digits",
    fingerprint="none",
    space=SearchSpace(fields={"lr": Range(low=1e-4, high=1e-2), "epochs": 5}),
    seed=0,
    first_rung=1,
)
STEPS = (1, 4, 8, 12, 16)


@pytest.fixture
def study(database: Database) -> OpenStudy:
    return OpenStudy(database, make_study(database, budget=1000))


def begin(database: Database, study: OpenStudy) -> tuple[Lease, int, int]:
    """A trial: its lease, id and number."""
    lease = leases.claim(database, study.record.study_id, "w", lease_seconds=30)
    assert isinstance(lease, Lease)
    trial_id = study.bind(lease)
    return lease, trial_id, study.trial(trial_id).number


def run_trial(
    database: Database, study: OpenStudy, spec: StudySpec, values: list[float]
) -> tuple[int, str]:
    """Report until the pruner stops it: the last step, and what it said."""
    lease, trial_id, number = begin(database, study)
    for step, value in zip(STEPS, values, strict=True):
        study.report(lease, step, value, images_per_second=1.0)
        moment = Moment(
            study=study, spec=spec, trial_id=trial_id, number=number, step=step, value=value
        )
        verdict = PRUNERS[spec.pruner](moment)
        assert PRUNERS[spec.pruner](moment) == verdict
        if verdict is not None and not verdict.goes_on:
            study.end(lease, TrialState.PRUNED, value=value, reason=verdict.reason)
            return step, verdict.reason
    study.end(lease, TrialState.COMPLETE, value=values[-1], reason="whole")
    return STEPS[-1], "whole"


def curves(count: int) -> list[list[float]]:
    """Growing, and noisy, so that some fall behind their own best."""
    drawn = random.Random(0)
    found = []
    for _ in range(count):
        level = drawn.uniform(0.3, 0.9)
        found.append([level * (1 - 0.5 / step) + drawn.gauss(0, 0.05) for step in STEPS])
    return found


def test_none_trains_every_trial_to_its_end(database: Database, study: OpenStudy) -> None:
    spec = dataclasses.replace(SPEC, pruner="none")
    ended = [run_trial(database, study, spec, [0.9 - n / 10] * 5)[0] for n in range(5)]
    assert ended == [16] * 5


def test_the_median_decides_as_optunas_pruner_does(database: Database, study: OpenStudy) -> None:
    pruner = optuna.pruners.MedianPruner(n_startup_trials=5)
    spec = dataclasses.replace(SPEC, pruner="median")
    decisions: Counter[bool] = Counter()
    for values in curves(14):
        lease, trial_id, number = begin(database, study)
        for step, value in zip(STEPS, values, strict=True):
            study.report(lease, step, value, images_per_second=1.0)
            moment = Moment(
                study=study, spec=spec, trial_id=trial_id, number=number, step=step, value=value
            )
            verdict = PRUNERS["median"](moment)
            stops = verdict is not None and not verdict.goes_on
            frozen = study.study._storage.get_trial(trial_id)
            assert stops == pruner.prune(study.study, frozen), (number, step)
            decisions[stops] += 1
            if stops:
                study.end(lease, TrialState.PRUNED, value=value, reason="stopped")
                break
        else:
            study.end(lease, TrialState.COMPLETE, value=values[-1], reason="whole")
    assert min(decisions[True], decisions[False]) >= 4


def test_the_median_says_what_it_compared(database: Database, study: OpenStudy) -> None:
    spec = dataclasses.replace(SPEC, pruner="median")
    for number in range(5):
        assert run_trial(database, study, spec, [0.5 + number / 10] * 5)[0] == 16
    assert run_trial(database, study, spec, [0.8, 0.6, 0.69, 0.7, 0.8]) == (16, "whole")
    assert run_trial(database, study, spec, [0.6, 0.65, 0.7, 0.7, 0.7]) == (
        1,
        "0.6000 after 0.25 epochs is below the median 0.7500 of the 6 trained to their end: "
        "4.75 of 5 epochs saved",
    )


def test_the_median_stops_nothing_before_the_first_rung(
    database: Database, study: OpenStudy
) -> None:
    spec = dataclasses.replace(SPEC, pruner="median", first_rung=4)
    for _ in range(5):
        run_trial(database, study, spec, [0.8] * 5)
    assert run_trial(database, study, spec, [0.1] * 5)[0] == 4


def test_hyperband_judges_a_trial_in_its_bracket_from_its_own_first_rung(
    database: Database, study: OpenStudy
) -> None:
    spec = dataclasses.replace(SPEC, pruner="hyperband")
    first_rungs: dict[int, int] = {}
    for number in range(20):
        step, reason = run_trial(database, study, spec, [0.9 - number / 100] * 5)
        (bracket,) = (i for i, group in enumerate(brackets(spec)) if group.holds(number))
        if bracket in first_rungs and step != 16:
            assert step == first_rungs[bracket], reason
        first_rungs.setdefault(bracket, 4**bracket)
    assert first_rungs == {0: 1, 1: 4, 2: 16}


def test_brackets_have_hyperbands_shares_in_any_run_of_trials() -> None:
    spec = dataclasses.replace(SPEC, pruner="hyperband")
    groups = brackets(spec)
    shares = [group.last - group.first + 1 for group in groups]
    own = optuna.pruners.HyperbandPruner(1, 20, reduction_factor=4)
    own._try_initialization(optuna.create_study())
    assert shares == own._trial_allocation_budgets
    for start in (0, 17, 400):
        run = range(start, start + 30)
        counted = [sum(group.holds(number) for number in run) for group in groups]
        assert sum(counted) == 30
        for count, share in zip(counted, shares, strict=True):
            assert abs(count - 30 * share / sum(shares)) <= 2


def test_a_study_whose_first_rung_lies_beyond_its_end_has_one_bracket() -> None:
    assert len(brackets(dataclasses.replace(SPEC, first_rung=1000))) == 1
