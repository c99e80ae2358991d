"""Pruners: whether a trial goes on after a report.

Each decides from the database alone, in one statement, and in the same way when it is asked again:
a trial that is resumed is judged as it was.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from hpo.rungs import STEPS_PER_EPOCH, Verdict, is_rung, judge
from hpo.spec import StudySpec
from hpo.spread import golden_stride
from storage.results import EVERYBODY, Group
from storage.studies import OpenStudy

MEDIAN_STARTS = 5
"""Trials that are trained to their end before the median stops any (as Optuna's MedianPruner)."""


@dataclass(frozen=True, kw_only=True)
class Moment:
    """A trial's newest report, before its last step."""

    study: OpenStudy
    spec: StudySpec
    trial_id: int
    number: int
    step: int
    value: float


def rungs(moment: Moment) -> Verdict | None:
    """Asynchronous successive halving (hpo.rungs)."""
    return _at_rung(moment, first=moment.spec.first_rung)


def hyperband(moment: Moment) -> Verdict | None:
    """Brackets of rungs that begin ever later (Li et al. 2018, "Hyperband").

    A trial's bracket comes from its number, and it is judged among those of its own; samplers learn
    from all of them (with Optuna's pruner, TPE would see one bracket only).
    """
    spec = moment.spec
    for index, bracket in enumerate(brackets(spec)):
        if bracket.holds(moment.number):
            return _at_rung(moment, first=spec.first_rung * spec.eta**index, among=bracket)
    raise AssertionError(f"trial {moment.number} is in no bracket")


def median(moment: Moment) -> Verdict | None:
    """Stops a trial whose best value so far is below the median, as Optuna's MedianPruner does.

    The median of the trials that were trained to their end, at this step, once there are five;
    nothing is stopped before the first rung, where all classify by chance.
    """
    if moment.step < moment.spec.first_rung:
        return None
    middle = moment.study.middle(moment.step, trial_id=moment.trial_id)
    if middle.num_complete < MEDIAN_STARTS or middle.median is None:
        return None
    epochs = moment.step / STEPS_PER_EPOCH
    goes_on = middle.best >= middle.median
    reason = (
        f"{middle.best:.4f} after {epochs:g} epochs is {'not ' if goes_on else ''}below the median "
        f"{middle.median:.4f} of the {middle.num_complete} trained to their end"
    )
    if not goes_on:
        saved = moment.spec.epochs - epochs
        reason += f": {saved:g} of {moment.spec.epochs} epochs saved"
    return Verdict(goes_on=goes_on, reason=reason)


def none(_moment: Moment) -> Verdict | None:
    """Every trial is trained to its end."""
    return None


PRUNERS: Mapping[str, Callable[[Moment], Verdict | None]] = {
    "rungs": rungs,
    "median": median,
    "hyperband": hyperband,
    "none": none,
}


def brackets(spec: StudySpec) -> list[Group]:
    """The trials of each bracket, in shares like those of Optuna's HyperbandPruner.

    Any run of numbers is spread over all of them.
    """
    longest = spec.epochs * STEPS_PER_EPOCH
    count = 1
    while spec.first_rung * spec.eta**count <= longest:
        count += 1
    shares = [math.ceil(count * spec.eta**late / (late + 1)) for late in reversed(range(count))]
    ends = list(itertools.accumulate(shares))
    return [
        Group(stride=golden_stride(ends[-1]), total=ends[-1], first=end - share, last=end - 1)
        for share, end in zip(shares, ends, strict=True)
    ]


def _at_rung(moment: Moment, *, first: int, among: Group = EVERYBODY) -> Verdict | None:
    spec = moment.spec
    if not is_rung(moment.step, first=first, num_epochs=spec.epochs, eta=spec.eta):
        return None
    standing = moment.study.standing(
        moment.step, moment.value, except_trial_id=moment.trial_id, among=among
    )
    return judge(
        step=moment.step,
        value=moment.value,
        num_better=standing.num_better,
        num_others=standing.num_others,
        num_epochs=spec.epochs,
        eta=spec.eta,
    )
