"""What a training reports after each leg, and what ends it there."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from trainer.batches import Leg
from trainer.config import Objective, TrainConfig, TrainingDiverged
from trainer.evaluate import Evaluation
from trainer.state import STEPS_AN_EPOCH, TrainState


@dataclass(frozen=True, kw_only=True)
class ReportValues:
    """How far a training is, as plain values."""

    step: int
    """Quarter epochs done."""
    epoch: float
    """Epochs done: step / 4."""
    images_seen: int
    train_loss: float
    """Mean over the images since the last report, as it was trained on (smoothed, augmented, mixed,
    weighted)."""
    val_loss: float
    """Mean cross-entropy; NaN without validation images."""
    val_accuracy: float
    """NaN without validation images."""
    val_balanced_accuracy: float
    """Mean recall of the classes; NaN without validation images."""
    val_macro_f1: float
    """Mean F1 of the classes; NaN without validation images."""
    seconds: float
    """Spent training and evaluating so far, by all attempts together."""
    images_per_second: float
    """Trained on since the last report, without evaluation."""
    finished: bool
    """Whether this is the last report."""
    reason: str | None = None
    """Why training ended before its last epoch."""
    averages: Mapping[str, float] = field(default_factory=dict)
    """Validation value of each average that is kept; empty before the last epoch's end."""

    def value(self, objective: Objective) -> float:
        """What the training is judged by: val_accuracy, val_balanced_accuracy or val_macro_f1."""
        return float(getattr(self, f"val_{objective}"))

    def to_dict(self) -> dict[str, Any]:
        """All but the state, as plain values."""
        names = [field.name for field in dataclasses.fields(self) if field.name != "state"]
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True, kw_only=True)
class ProgressReport(ReportValues):
    """How far a training is, and its state."""

    state: TrainState = field(repr=False, compare=False)
    """Valid until the next report is asked for."""


def make_report(
    state: TrainState,
    train_loss: float,
    val: Evaluation,
    images_per_second: float,
    averages: Mapping[str, float],
    objective: Objective,
    *,
    ended: str | None = None,
) -> ProgressReport:
    """The report of the leg just done, which joins the state's history.

    ended: why there will be no other one, if that is known.
    """
    last = state.step >= state.last_step
    history, value = state.history, val.value(objective)
    if ended is None and not last:
        ended = stop_reason(state.config, history, state.step, value, objective)
    report = ProgressReport(
        step=state.step,
        epoch=state.step / STEPS_AN_EPOCH,
        images_seen=state.images_seen,
        train_loss=train_loss,
        val_loss=val.loss,
        val_accuracy=val.accuracy,
        val_balanced_accuracy=val.balanced_accuracy,
        val_macro_f1=val.macro_f1,
        seconds=state.seconds,
        images_per_second=images_per_second,
        finished=last or ended is not None,
        reason=ended,
        averages=averages,
        state=state,
    )
    state.history.append(report.to_dict())
    return report


def stop_reason(
    config: TrainConfig,
    history: Sequence[Mapping[str, Any]],
    step: int,
    value: float,
    objective: Objective,
) -> str | None:
    """Early stopping: why the training should end with this validation value, or None.

    history: the reports before, oldest first, of which the first best one counts.
    """
    name = f"val_{objective}"
    known = [report for report in history if not math.isnan(report[name])]
    best = max(known, key=lambda report: float(report[name]), default=None)
    patience = config.patience
    if not patience or best is None or value > best[name]:
        return None
    if step - best["step"] < patience * STEPS_AN_EPOCH:
        return None
    return (
        f"early stopping: no better validation {objective.replace('_', ' ')} than "
        f"{best[f'val_{objective}']:.4f} of epoch {best['epoch']:g} in {patience} epochs"
    )


def check_finite(train_loss: float, val: Evaluation, leg: Leg, config: TrainConfig) -> None:
    """Raise TrainingDiverged if a loss isn't finite."""
    epochs = leg.step / STEPS_AN_EPOCH
    if not math.isfinite(train_loss):
        raise TrainingDiverged(
            f"the training loss is {train_loss} after {epochs:g} epochs (lr {config.lr:g})"
        )
    if val.num_images and not math.isfinite(val.loss):
        raise TrainingDiverged(
            f"the validation loss is {val.loss} after {epochs:g} epochs (lr {config.lr:g})"
        )
