"""When a study will end: how many epochs its rungs let it train, and how long they take."""

import random
import statistics
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from hpo.pruners import MEDIAN_STARTS, brackets
from hpo.rungs import STEPS_PER_EPOCH, is_rung, judge
from hpo.spec import StudySpec

_ROUNDS = 40
_MOST_SIMULATED = 200
"""Trials of a simulated study: larger ones are scaled from it."""
TRIAL_SECONDS = 0.5
"""Of a trial without its training: claim, suggestion, the first plan, the end."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """One backbone's images per second in one worker, while all workers train."""

    train: float
    evaluate: float
    features: float | None = None
    """Images whose features a frozen network computes, before the head is trained on them; None:
    each epoch goes through the network."""
    shares_features: bool = False
    """Whether all trials of a worker have the same ones, as with weights that they start from."""


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """Of a whole study."""

    num_epochs: float
    seconds: float


def forecast(
    spec: StudySpec,
    *,
    num_trials: int,
    num_workers: int,
    num_train: int,
    num_val: int,
    num_val_early: int,
    paces: Mapping[str, Pace],
    num_refused: int = 0,
) -> Forecast:
    """Epochs and seconds of a study whose trials draw evenly from `paces` and what is refused.

    The pruner is the study's own, run on trials of random quality. num_val_early: images of the
    report at a quarter epoch. num_refused: how many there are beside `paces` that break a limit, or
    can't be trained: a trial of these trains no epoch.
    """
    num_trained = num_trials * len(paces) / (len(paces) + num_refused)
    num_epochs, num_reports = expected_epochs(spec, num_trained)
    train = statistics.fmean(num_train / pace.train for pace in paces.values())
    check = statistics.fmean(num_val / pace.evaluate for pace in paces.values())
    early = statistics.fmean(num_val_early / pace.evaluate for pace in paces.values())
    checks = (num_reports - num_trained) * check + num_trained * early
    looked_at = num_train + num_val
    features = sum(
        looked_at / pace.features * (num_workers if pace.shares_features else each)
        for pace in paces.values()
        if pace.features and (each := num_trained / len(paces))
    )
    work = num_epochs * train + checks + features + num_trials * TRIAL_SECONDS
    # the last ones in full are alone: nothing is left for the other workers
    longest = spec.epochs * (train + check)
    tail = longest * (num_workers - 1) / (2 * num_workers)
    return Forecast(num_epochs=num_epochs, seconds=work / num_workers + tail)


def expected_epochs(spec: StudySpec, num_trials: float) -> tuple[float, float]:
    """Epochs and reports of a study of so many trials, on average over simulated ones."""
    simulated = min(max(1, round(num_trials)), _MOST_SIMULATED)
    rounds = [_simulate(spec, simulated, random.Random(seed)) for seed in range(_ROUNDS)]
    scale = num_trials / simulated
    epochs, reports = zip(*rounds, strict=True)
    return scale * statistics.fmean(epochs), scale * statistics.fmean(reports)


def _simulate(spec: StudySpec, num_trials: int, chance: random.Random) -> tuple[float, int]:
    last = spec.epochs * STEPS_PER_EPOCH
    steps = [1, *range(STEPS_PER_EPOCH, last + 1, STEPS_PER_EPOCH)]
    past = _Past(spec)
    num_steps = num_reports = 0
    for number in range(num_trials):
        quality = chance.random()
        for step in steps:
            num_reports += 1
            if step == last:
                past.complete.append(quality)
            elif _PRUNERS[spec.pruner](past, number, step, quality):
                continue
            num_steps += step
            break
    return num_steps / STEPS_PER_EPOCH, num_reports


@dataclass
class _Past:
    """What a simulated study knows of the trials before."""

    spec: StudySpec
    reached: dict[tuple[int, int], list[float]] = field(default_factory=dict)
    """Qualities at a bracket's rung."""
    complete: list[float] = field(default_factory=list)


def _rungs(past: _Past, _number: int, step: int, quality: float) -> bool:
    return _at_rung(past, 0, past.spec.first_rung, step, quality)


def _hyperband(past: _Past, number: int, step: int, quality: float) -> bool:
    spec = past.spec
    (index,) = (i for i, bracket in enumerate(brackets(spec)) if bracket.holds(number))
    return _at_rung(past, index, spec.first_rung * spec.eta**index, step, quality)


def _median(past: _Past, _number: int, step: int, quality: float) -> bool:
    if step < past.spec.first_rung or len(past.complete) < MEDIAN_STARTS:
        return True
    return quality >= statistics.median(past.complete)


def _none(_past: _Past, _number: int, _step: int, _quality: float) -> bool:
    return True


_PRUNERS: Mapping[str, Callable[[_Past, int, int, float], bool]] = {
    "rungs": _rungs,
    "median": _median,
    "hyperband": _hyperband,
    "none": _none,
}
"""Whether a trial of this number and quality goes on after this step: as hpo.pruners does it."""


def _at_rung(past: _Past, bracket: int, first: int, step: int, quality: float) -> bool:
    spec = past.spec
    if not is_rung(step, first=first, num_epochs=spec.epochs, eta=spec.eta):
        return True
    others = past.reached.setdefault((bracket, step), [])
    verdict = judge(
        step=step,
        value=quality,
        num_better=sum(theirs > quality for theirs in others),
        num_others=len(others),
        num_epochs=spec.epochs,
        eta=spec.eta,
    )
    others.append(quality)
    return verdict.goes_on
