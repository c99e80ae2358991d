"""Rungs: where a trial's right to go on is decided.

Asynchronous successive halving (Li et al. 2020, "A System for Massively Parallel Hyperparameter
Tuning"), with its first rung at a quarter of an epoch and no waiting: a trial is judged when it
arrives, among all that have arrived before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

STEPS_PER_EPOCH = 4


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the trial goes on, and why, in words."""

    goes_on: bool
    reason: str


def is_rung(step: int, *, num_epochs: int, eta: int) -> bool:
    """Rungs lie at steps 1, 4, 16, ... before the end: a quarter epoch, one epoch, four, ..."""
    rung = 1
    while rung < step:
        rung *= eta
    return step == rung and step < num_epochs * STEPS_PER_EPOCH


def judge(
    *,
    step: int,
    number: int,
    value: float,
    others: Sequence[tuple[int, float]],
    num_epochs: int,
    eta: int,
) -> Verdict:
    """One in `eta` goes on, the best always; of equals the earlier trial is the better one.

    others: (trial number, value) of all other trials that reported at this step.
    """
    num_better = sum(
        theirs > value or (theirs == value and earlier < number) for earlier, theirs in others
    )
    num_reached = len(others) + 1
    num_places = max(1, num_reached // eta)
    epochs = step / STEPS_PER_EPOCH
    place = f"{value:.4f} after {epochs:g} epochs is place {num_better + 1} of {num_reached}"
    if num_better < num_places:
        return Verdict(goes_on=True, reason=f"{place}: goes on")
    saved = num_epochs - epochs
    return Verdict(
        goes_on=False,
        reason=f"{place}, the best {num_places} go on: {saved:g} of {num_epochs} epochs saved",
    )
