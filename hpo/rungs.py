"""Rungs: where a trial's right to go on is decided.

Asynchronous successive halving (Li et al. 2020, "A System for Massively Parallel Hyperparameter
Tuning"), with its first rung at a quarter of an epoch and no waiting: a trial is judged when it
arrives, among all that have arrived before.
"""

from dataclasses import dataclass

STEPS_PER_EPOCH = 4
_LEAST_OPTIMIZER_STEPS = 16


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether the trial goes on, and why, in words."""

    goes_on: bool
    reason: str


def first_rung(*, num_train: int, largest_batch: int) -> int:
    """The step of a study's first rung: 1 (a quarter epoch), 4 or 16.

    Before some optimizer steps have been made, every trial classifies by chance and its place says
    nothing: on 1,150 images with batches of 128 a quarter epoch is two steps.
    """
    num_batches = num_train / largest_batch
    for step in (1, STEPS_PER_EPOCH):
        if num_batches * step / STEPS_PER_EPOCH >= _LEAST_OPTIMIZER_STEPS:
            return step
    return 4 * STEPS_PER_EPOCH


def is_rung(step: int, *, first: int, num_epochs: int, eta: int) -> bool:
    """Rungs lie at steps `first`, `first` * eta, ... before the end of training."""
    rung = first
    while rung < step:
        rung *= eta
    return step == rung and step < num_epochs * STEPS_PER_EPOCH


def judge(
    *,
    step: int,
    value: float,
    num_better: int,
    num_others: int,
    num_epochs: int,
    eta: int,
) -> Verdict:
    """About one in `eta` goes on, the best always; equals share their place.

    num_others: trials beside this one that reported at this step; num_better of them more.
    """
    num_reached = num_others + 1
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
