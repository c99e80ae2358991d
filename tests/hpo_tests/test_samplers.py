"""Samplers: the same proposal wherever a trial is resumed, whatever else goes on."""

import functools
import itertools
import math
import random
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from hpo.errors import UsageError
from hpo.objective import trial_seed
from hpo.samplers import SAMPLERS, Draw, grid_point, grid_size, ranked
from hpo.space import Range, SearchSpace
from storage import leases
from storage.database import Database
from storage.leases import Lease
from storage.studies import OpenStudy, StudyRecord
from tests.parts import make_study

SPACE = SearchSpace(
    fields={
        "lr": Range(low=1e-4, high=1e-1, log=True),
        "batch_size": (32, 64),
        "translate": Range(low=0, high=3),
        "backbone": ("smallcnn",),
        "epochs": 2,
    }
)
GRID = SearchSpace(
    fields={"lr": (0.1, 0.01, 0.001), "batch_size": (32, 64), "flip": (False, True), "epochs": 2}
)


def no_grid(_size: int) -> int:
    raise AssertionError("only a grid has points")


def draw(number: int, *, space: SearchSpace = SPACE, seed: int = 0) -> Draw:
    return Draw(
        space=space,
        study_seed=seed,
        seed=trial_seed(seed, number),
        number=number,
        take_point=no_grid,
    )


def propose(
    study: optuna.Study, sampler: optuna.samplers.BaseSampler, space: SearchSpace = SPACE
) -> dict[str, Any]:
    """What a trial is proposed; it leaves nothing behind that a sampler learns from."""
    study.sampler = sampler
    trial = study.ask()
    space.suggest(trial, seed=0)
    study.tell(trial, state=TrialState.FAIL)
    return trial.params


def run_trials(study: optuna.Study, count: int) -> None:
    """Trials of random values; one in two is pruned after a step, some without any value."""
    for number in range(count):
        study.sampler = optuna.samplers.RandomSampler(seed=number)
        trial = study.ask()
        config = SPACE.suggest(trial, seed=0)
        value = 0.9 - abs(math.log10(config.lr) + 2) / 4
        if number % 7 == 6:
            trial.set_constraint("trainable", 1.0)
            study.tell(trial, state=TrialState.PRUNED)
        elif number % 2:
            trial.report(value / 2, 1)
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, value)


@pytest.fixture
def study() -> optuna.Study:
    return optuna.create_study(direction="maximize")


@pytest.mark.parametrize("name", ["tpe", "gp", "random", "qmc"])
def test_a_resumed_trial_is_proposed_what_it_would_have_been(
    study: optuna.Study, name: str
) -> None:
    run_trials(study, 14)
    first = propose(study, SAMPLERS[name](draw(5)))
    assert propose(study, SAMPLERS[name](draw(5))) == first
    assert propose(study, SAMPLERS[name](draw(6))) != first


def test_tpe_proposes_what_optunas_own_does(study: optuna.Study) -> None:
    for number in range(15):
        own = optuna.samplers.TPESampler(seed=trial_seed(0, number))
        assert propose(study, SAMPLERS["tpe"](draw(number))) == propose(study, own)
        run_trials(study, 2)


def test_a_trial_without_parameters_does_not_hurt_tpe(study: optuna.Study) -> None:
    run_trials(study, 12)
    before = propose(study, SAMPLERS["tpe"](draw(3)))
    recipe = study.ask()
    study.tell(recipe, 0.0)
    sampler = SAMPLERS["tpe"](draw(3))
    trial = optuna.trial.create_trial(state=TrialState.RUNNING)
    assert set(sampler.infer_relative_search_space(study, trial)) == {
        "batch_size", "lr", "translate",
    }  # fmt: skip
    assert propose(study, sampler).keys() == before.keys()


def test_a_gaussian_process_learns_from_pruned_trials(study: optuna.Study) -> None:
    """Ten trials are there, four of them COMPLETE: Optuna's own would still draw at random."""
    run_trials(study, 10)
    at_random = optuna.samplers.RandomSampler(seed=trial_seed(0, 1))
    assert propose(study, SAMPLERS["gp"](draw(1))) != propose(study, at_random)
    lrs = [propose(study, SAMPLERS["gp"](draw(number)))["lr"] for number in range(4)]
    assert all(abs(math.log10(lr) + 2) < 1.2 for lr in lrs), lrs


def test_a_gaussian_process_leaves_what_can_not_be_trained(study: optuna.Study) -> None:
    space = SearchSpace(fields={"batch_size": (32, 64, 128), "dropout": Range(low=0, high=0.9)})
    chosen: Counter[int] = Counter()
    for number in range(25):
        study.sampler = SAMPLERS["gp"](draw(number, space=space))
        trial = study.ask()
        config = space.suggest(trial, seed=0)
        chosen[config.batch_size] += number >= 12
        if config.batch_size == 128:
            trial.set_constraint("trainable", 1.0)
            study.tell(trial, state=TrialState.PRUNED)
        else:
            study.tell(trial, 0.5 - abs(config.dropout - 0.4))
    assert chosen[128] <= 3, chosen


def test_ranks_are_by_step_then_value_and_what_can_not_be_trained_is_last() -> None:
    def trial(state: TrialState, value: float | None, step: int) -> optuna.trial.FrozenTrial:
        return optuna.trial.create_trial(
            state=state, value=value, intermediate_values={step: value or 0.0}
        )

    trials = [
        trial(TrialState.COMPLETE, 0.5, 8),
        trial(TrialState.PRUNED, 0.9, 1),
        trial(TrialState.PRUNED, 0.4, 4),
        trial(TrialState.PRUNED, None, 1),
        trial(TrialState.COMPLETE, 0.6, 8),
        trial(TrialState.PRUNED, 0.9, 1),
    ]
    scores = [each.value for each in ranked(trials)]
    assert all(score is not None for score in scores)
    order = sorted(range(6), key=lambda index: scores[index] or 0.0)
    assert order == [3, 1, 5, 2, 0, 4]
    assert scores[1] == scores[5]
    assert trials[3].state == TrialState.PRUNED  # they are left as they were


def test_qmc_has_a_point_of_its_own_for_each_number_and_covers_the_space(
    study: optuna.Study,
) -> None:
    order = list(range(32))
    random.Random(0).shuffle(order)  # workers come in any order
    found = {number: propose(study, SAMPLERS["qmc"](draw(number))) for number in order}
    assert len({params["lr"] for params in found.values()}) == 32
    decades = Counter(math.floor(math.log10(params["lr"]) * 4) for params in found.values())
    assert len(decades) == 12
    assert max(decades.values()) <= 4  # a random sample has five or more in one of twelve
    assert Counter(params["batch_size"] for params in found.values()) == {32: 16, 64: 16}
    other = propose(study, SAMPLERS["qmc"](draw(0, seed=1)))
    assert other["lr"] != found[0]["lr"]


@pytest.mark.parametrize("seed", [0, 1, 12_345])
def test_the_order_of_a_grid_has_each_combination_once(seed: int) -> None:
    points = [grid_point(GRID, index, seed=seed) for index in range(grid_size(GRID))]
    expected = itertools.product((0.1, 0.01, 0.001), (32, 64), (False, True))
    assert sorted((p["lr"], p["batch_size"], p["flip"]) for p in points) == sorted(expected)
    assert {p["lr"] for p in points[:6]} == {0.1, 0.01, 0.001}


def test_a_grid_with_a_range_has_no_end() -> None:
    with pytest.raises(UsageError, match="lr, translate are ranges: give choices in --space"):
        grid_size(SPACE)


def try_points(url: str, record: StudyRecord, worker: int) -> list[Mapping[str, Any]]:
    """Work like a worker, in a thread with its own connections: trials 2 and 5 fail."""
    database = Database(url)
    database.open()
    study = OpenStudy(database, record)
    done: list[Mapping[str, Any]] = []
    while True:
        lease = leases.claim(database, record.study_id, f"w{worker}", lease_seconds=30)
        if not isinstance(lease, Lease):
            database.engine.dispose()
            return done
        trial_id = study.bind(lease)
        number = study.trial(trial_id).number
        take = functools.partial(study.take_point, lease)
        given = Draw(space=GRID, study_seed=0, seed=number, number=number, take_point=take)
        for _ in range(2):  # a trial that is resumed has the point that it had
            study.study.sampler = SAMPLERS["grid"](given)
        GRID.suggest(optuna.Trial(study.study, trial_id), seed=0)
        if number in (2, 5):
            study.end(lease, TrialState.FAIL, value=None, reason="said")
        else:
            done.append(study.trial(trial_id).params)
            study.end(lease, TrialState.COMPLETE, value=0.5, reason="said")


def test_workers_try_each_point_of_a_grid_once_and_a_failed_one_again(
    database_url: str, database: Database
) -> None:
    record = make_study(database, budget=grid_size(GRID))
    work = functools.partial(try_points, database_url, record)
    with ThreadPoolExecutor(4) as pool:
        done = [point for points in pool.map(work, range(4)) for point in points]
    tried = sorted((point["lr"], point["batch_size"], point["flip"]) for point in done)
    assert tried == sorted(itertools.product((0.1, 0.01, 0.001), (32, 64), (False, True)))
