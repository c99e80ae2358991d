"""When a study will end: how many epochs its rungs let it train, and how long they take."""

import random
import statistics
from collections.abc import Mapping
from dataclasses import dataclass

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
) -> Forecast:
    """Epochs and seconds of a study whose trials draw their backbones evenly from `paces`.

    The rungs are the study's own, run on trials of random quality. num_val_early: images of the
    report at a quarter epoch.
    """
    num_epochs, num_reports = expected_epochs(spec, num_trials)
    train = statistics.fmean(num_train / pace.train for pace in paces.values())
    check = statistics.fmean(num_val / pace.evaluate for pace in paces.values())
    early = statistics.fmean(num_val_early / pace.evaluate for pace in paces.values())
    checks = (num_reports - num_trials) * check + num_trials * early
    work = num_epochs * train + checks + num_trials * TRIAL_SECONDS
    # the last ones in full are alone: nothing is left for the other workers
    longest = spec.epochs * (train + check)
    tail = longest * (num_workers - 1) / (2 * num_workers)
    return Forecast(num_epochs=num_epochs, seconds=work / num_workers + tail)


def expected_epochs(spec: StudySpec, num_trials: int) -> tuple[float, float]:
    """Epochs and reports of a study of so many trials, on average over simulated ones."""
    simulated = min(num_trials, _MOST_SIMULATED)
    rounds = [_simulate(spec, simulated, random.Random(seed)) for seed in range(_ROUNDS)]
    scale = num_trials / simulated
    epochs, reports = zip(*rounds, strict=True)
    return scale * statistics.fmean(epochs), scale * statistics.fmean(reports)


def _simulate(spec: StudySpec, num_trials: int, chance: random.Random) -> tuple[float, int]:
    last = spec.epochs * STEPS_PER_EPOCH
    steps = [1, *range(STEPS_PER_EPOCH, last + 1, STEPS_PER_EPOCH)]
    reached: dict[int, list[float]] = {}
    num_steps = num_reports = 0
    for _ in range(num_trials):
        quality = chance.random()
        for step in steps:
            num_reports += 1
            if step == last or not _goes_on(spec, step, quality, reached):
                num_steps += step
                break
    return num_steps / STEPS_PER_EPOCH, num_reports


def _goes_on(spec: StudySpec, step: int, quality: float, reached: dict[int, list[float]]) -> bool:
    if not is_rung(step, first=spec.first_rung, num_epochs=spec.epochs, eta=spec.eta):
        return True
    others = reached.setdefault(step, [])
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
