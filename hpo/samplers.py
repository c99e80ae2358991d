"""Samplers: who proposes what a trial is to be.

A worker makes one for each trial, from the study's seed and the trial's number: a trial that is
resumed elsewhere is proposed what it would have been. The search space is known and flat, so no
sampler has to find it out from the history, as Optuna's own do.
"""

import contextlib
import copy
import math
import statistics
import warnings
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    PartialFixedSampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import FrozenTrial, TrialState

from hpo.errors import UsageError
from hpo.space import Range, SearchSpace
from hpo.spread import golden_stride

_INFEASIBLE = -1.0


@dataclass(frozen=True, kw_only=True)
class Draw:
    """What a sampler is made from."""

    space: SearchSpace
    study_seed: int
    seed: int
    """The trial's own."""
    number: int
    take_point: Callable[[int], int]
    """Number of points in a list -> the index of one that no other trial has."""

    @property
    def distributions(self) -> dict[str, BaseDistribution]:
        """Of the searched fields with more than one value, in Optuna's own order."""
        found = sorted(self.space.distributions().items())
        return {name: distribution for name, distribution in found if not distribution.single()}


class _KnownSpace(BaseSampler):
    """Is told the search space: 30 ms at 1,000 trials to find it out from them, at each trial.

    A trial without some of the parameters (a recipe's) does no harm: where Optuna intersects, a
    parameter that one trial lacks would be sampled by itself from then on.
    """

    _draw: Draw

    def infer_relative_search_space(
        self, _study: optuna.Study, _trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        """All that has more than one value, for the first trial too."""
        return self._draw.distributions


class KnownSpaceTPE(_KnownSpace, TPESampler):
    """Optuna's TPE."""

    def __init__(self, draw: Draw) -> None:
        super().__init__(seed=draw.seed)
        self._draw = draw


class RankedGP(_KnownSpace, GPSampler):
    """Optuna's Gaussian process, which learns from pruned trials too.

    Optuna's own sees COMPLETE ones only: where rungs stop three of four it would have forty random
    starts, and propose again and again what can't be trained or breaks a limit. Here it is given
    all that ended, in the order in which TPE has them (by step, then value; what can't be trained
    last), and as scores the quantiles of a normal distribution at their ranks: accuracies after a
    quarter epoch and after ten can't be compared, ranks can (Salinas et al. 2020, "A quantile-based
    approach for hyperparameter transfer learning").
    """

    def __init__(self, draw: Draw) -> None:
        super().__init__(seed=draw.seed, warn_independent_sampling=False)
        self._draw = draw

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """As Optuna's, with a study whose pruned trials are complete."""
        seen = _RankedStudy(study, trial, search_space)
        return super().sample_relative(seen, trial, search_space)


class _RankedStudy(optuna.Study):
    """What a trial's Gaussian process sees: other trials with all of its parameters, ranked."""

    def __init__(
        self, study: optuna.Study, trial: FrozenTrial, space: Mapping[str, BaseDistribution]
    ) -> None:
        super().__init__(study.study_name, study._storage, sampler=study.sampler)
        self._number, self._space = trial.number, space

    def _get_trials(
        self,
        deepcopy: bool = True,
        states: Container[TrialState] | None = None,
        use_cache: bool = False,
    ) -> list[FrozenTrial]:
        wanted = [state for state in TrialState if states is None or state in states]
        found = super()._get_trials(deepcopy, [*wanted, TrialState.PRUNED], use_cache)
        others = [trial for trial in found if trial.number != self._number]
        whole = [trial for trial in others if self._space.keys() <= trial.params.keys()]
        ended = [trial for trial in whole if trial.state.is_finished()]
        return [*ranked(ended), *(trial for trial in others if not trial.state.is_finished())]


def ranked(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """The trials, COMPLETE and with a normal quantile at its rank for a value; equals share one."""
    merits = [_merit(trial) for trial in trials]
    order = sorted(merits)
    scores = []
    for trial, merit in zip(trials, merits, strict=True):
        first = order.index(merit)
        middle = first + (order.count(merit) - 1) / 2
        score = statistics.NormalDist().inv_cdf((middle + 0.5) / len(trials))
        scores.append(_scored(trial, score))
    return scores


def _merit(trial: FrozenTrial) -> tuple[float, float]:
    if trial.value is None or any(value > 0 for value in trial.constraints.values()):
        return (_INFEASIBLE, 0.0)
    complete = trial.state == TrialState.COMPLETE
    return (math.inf if complete else float(trial.last_step or 0), trial.value)


def _scored(trial: FrozenTrial, score: float) -> FrozenTrial:
    scored = copy.copy(trial)
    scored.state, scored.value = TrialState.COMPLETE, score
    scored.system_attrs = {}  # where Optuna keeps constraints, of which the score knows
    return scored


class NumberedQMC(_KnownSpace, QMCSampler):
    """A scrambled Sobol sequence, one for the study, of which each trial has its number's point.

    Optuna's own counts in the database, without a lock: workers get the same point.
    """

    def __init__(self, draw: Draw) -> None:
        super().__init__(scramble=True, seed=draw.study_seed)
        self._draw = draw

    def _find_sample_id(self, _study: optuna.Study, _space: dict[str, BaseDistribution]) -> int:
        return self._draw.number


def _grid(draw: Draw) -> BaseSampler:
    point = grid_point(draw.space, draw.take_point(grid_size(draw.space)), seed=draw.study_seed)
    with _quietly():
        return PartialFixedSampler(dict(point), RandomSampler())


def _qmc(draw: Draw) -> BaseSampler:
    with _quietly():
        return NumberedQMC(draw)


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without Optuna's word that a class, which it has had for years, is experimental."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


SAMPLERS: Mapping[str, Callable[[Draw], BaseSampler]] = {
    "tpe": KnownSpaceTPE,
    "gp": RankedGP,
    "random": lambda draw: RandomSampler(seed=draw.seed),
    "grid": _grid,
    "qmc": _qmc,
}
"""CMA-ES is not among them: Optuna's unpickles what it finds in the database."""


def grid_size(space: SearchSpace) -> int:
    """Combinations of all choices. Raises UsageError if there is no end of them."""
    endless = [name for name in space.searched if isinstance(space.fields[name], Range)]
    if endless:
        raise UsageError(
            f"--sampler grid needs lists of choices, and {', '.join(endless)} "
            f"{'is a range' if len(endless) == 1 else 'are ranges'}: give choices in --space, fix "
            "it by --set, or use another sampler"
        )
    return math.prod(len(space.fields[name]) for name in space.searched)


def grid_point(space: SearchSpace, index: int, *, seed: int) -> Mapping[str, Any]:
    """The combination at this place, in [0, grid_size), of an order that is mixed by the seed.

    Neighbours in it lie far apart, so that a budget smaller than the grid is spread over it.
    """
    size = grid_size(space)
    place = (seed + index * golden_stride(size)) % size
    point = {}
    for name in sorted(space.searched):
        place, choice = divmod(place, len(space.fields[name]))
        point[name] = space.fields[name][choice]
    return point
