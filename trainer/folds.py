"""train_folds: K trainings in lockstep, each validated on what the others train on."""

import contextlib
import dataclasses
import functools
import io
import itertools
import statistics
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from trainer.config import Objective, TrainConfig
from trainer.data.dataset import ImageDataset
from trainer.device import DevicePlan
from trainer.evaluate import no_pulse
from trainer.loop import no_keep, train
from trainer.reports import ProgressReport, ReportValues, stop_reason
from trainer.seeds import derived_seed
from trainer.state import (
    FOLDS_KEYS,
    FORMAT,
    STEPS_AN_EPOCH,
    CheckpointError,
    TrainState,
    check_config,
    open_checkpoint,
    position_of,
)


@dataclass(kw_only=True, eq=False)
class FoldsState:
    """How far all folds are, and the reports of all together.

    At a report the folds are at the same step. Between two reports one fold is within its leg, and
    those before it may have made their next report already.
    """

    config: TrainConfig
    folds: Sequence[TrainState | bytes | None]
    """A fold that this process has not trained yet is the bytes that it goes on from, or None."""
    history: list[dict[str, Any]]
    position: int = 0
    """As TrainState.position, of all folds together."""
    underway: bool = False
    """Whether a fold has gone on from the newest report of all together."""

    @property
    def states(self) -> list[TrainState]:
        """Of the folds that this process has trained: at a report, of all."""
        return [fold for fold in self.folds if isinstance(fold, TrainState)]

    def to_bytes(self) -> bytes:
        """As TrainState.to_bytes: each fold's own checkpoint is in it as a tensor of its bytes."""
        file = io.BytesIO()
        folds = [
            _as_tensor(fold.to_bytes() if isinstance(fold, TrainState) else fold)
            for fold in self.folds
        ]
        content = {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "folds": folds,
            "history": self.history,
            "underway": self.underway,
        }
        torch.save(content, file)
        return file.getvalue()


@dataclass(frozen=True, kw_only=True)
class FoldsReport(ReportValues):
    """How far all folds are.

    Losses, accuracies and averages are means over the folds; images_seen, seconds and the images
    of images_per_second are those of all together.
    """

    state: FoldsState = field(repr=False, compare=False)
    """Valid until the next report is asked for."""


def train_folds(
    config: TrainConfig,
    folds: Sequence[ImageDataset],
    plan: DevicePlan,
    *,
    resume: bytes | None = None,
    pulse: Callable[[], None] = no_pulse,
    keep: Callable[[FoldsState], None] = no_keep,
    try_averages: Collection[str] = (),
    objective: Objective = "accuracy",
) -> Generator[FoldsReport, None, None]:
    """One training on each of the folds, in turn from report to report; else as train.

    A report comes at each step that all of them report. keep is given the state of all folds, one
    of them between two optimizer steps. Each has weights, order and augmentation of a seed of its
    own. Early stopping is decided by the mean's history, for all at once. The
    device holds all models. Raises what train raises.
    """
    checkpoints, history = _resumed(resume, config, len(folds))
    if history and history[-1]["finished"]:
        return
    now: list[TrainState | bytes | None] = list(checkpoints)
    positions = [0 if checkpoint is None else position_of(checkpoint) for checkpoint in checkpoints]

    def keep_fold(index: int, state: TrainState) -> None:
        now[index], positions[index] = state, state.position
        position = sum(positions)
        keep(
            FoldsState(config=config, folds=now, history=history, position=position, underway=True)
        )

    with contextlib.ExitStack() as stack:
        trainings = [
            stack.enter_context(
                contextlib.closing(
                    train(
                        fold_config(config, index),
                        data,
                        plan,
                        resume=checkpoint,
                        pulse=pulse,
                        keep=functools.partial(keep_fold, index),
                        reported=history[-1]["step"] if history else 0,
                        try_averages=try_averages,
                        objective=objective,
                    )
                )
            )
            for index, (data, checkpoint) in enumerate(zip(folds, checkpoints, strict=True))
        ]
        while not history or not history[-1]["finished"]:
            yield make_report(config, _next_reports(trainings), history, objective)


def fold_config(config: TrainConfig, index: int) -> TrainConfig:
    """The config of one fold's training, which does not stop early by itself."""
    return dataclasses.replace(config, patience=0, seed=derived_seed("fold", index, config.seed))


def make_report(
    config: TrainConfig,
    made: Sequence[Sequence[ProgressReport]],
    history: list[dict[str, Any]],
    objective: Objective,
) -> FoldsReport:
    """The report of all folds, which joins the history. made: what each has reported since."""
    now = [reports[-1] for reports in made]
    images = [_images_of(reports) for reports in made]
    losses = [
        sum(report.train_loss * number for report, number in zip(*each, strict=True)) / sum(each[1])
        for each in zip(made, images, strict=True)
    ]
    trained_seconds = sum(
        number / report.images_per_second
        for each in zip(made, images, strict=True)
        for report, number in zip(*each, strict=True)
    )
    step, value = now[0].step, statistics.fmean(report.value(objective) for report in now)
    last = step == config.epochs * STEPS_AN_EPOCH
    reason = None if last else stop_reason(config, history, step, value, objective)
    averaged = set.intersection(*(set(report.averages) for report in now))
    report = FoldsReport(
        step=step,
        epoch=step / STEPS_AN_EPOCH,
        images_seen=sum(report.images_seen for report in now),
        train_loss=statistics.fmean(losses),
        val_loss=statistics.fmean(report.val_loss for report in now),
        val_accuracy=statistics.fmean(report.val_accuracy for report in now),
        val_balanced_accuracy=statistics.fmean(report.val_balanced_accuracy for report in now),
        val_macro_f1=statistics.fmean(report.val_macro_f1 for report in now),
        seconds=sum(report.seconds for report in now),
        images_per_second=sum(map(sum, images)) / trained_seconds,
        finished=last or reason is not None,
        reason=reason,
        averages={
            name: statistics.fmean(report.averages[name] for report in now)
            for name in sorted(averaged)
        },
        state=FoldsState(config=config, folds=[report.state for report in now], history=history),
    )
    history.append(report.to_dict())
    return report


def _next_reports(
    trainings: Sequence[Generator[ProgressReport, None, None]],
) -> list[list[ProgressReport]]:
    """Of each training its reports up to the first step that all of them have.

    They may differ by an image, which can be a batch, and by that in having a report at a quarter
    of the first epoch.
    """
    made = [[next(training)] for training in trainings]
    step = max(reports[-1].step for reports in made)
    for training, reports in zip(trainings, made, strict=True):
        while reports[-1].step < step:
            reports.append(next(training))
    return made


def _images_of(reports: Sequence[ProgressReport]) -> list[int]:
    """How many images each of a training's newest reports is about."""
    seen = [0, *(past["images_seen"] for past in reports[-1].state.history)]
    return [after - before for before, after in itertools.pairwise(seen)][-len(reports) :]


def _as_tensor(content: bytes | None) -> torch.Tensor:
    """uint8 (bytes,); empty for a fold that begins anew."""
    if content is None:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _resumed(
    resume: bytes | None, config: TrainConfig, num_folds: int
) -> tuple[Sequence[bytes | None], list[dict[str, Any]]]:
    """The checkpoint of each fold, and the reports of all together. Raises CheckpointError."""
    if resume is None:
        return [None] * num_folds, []
    saved = open_checkpoint(resume, FOLDS_KEYS)
    check_config(saved["config"], config)
    kept = saved["folds"]
    if not all(isinstance(fold, torch.Tensor) and fold.dtype == torch.uint8 for fold in kept):
        raise CheckpointError("the checkpoint doesn't fit: its folds are no checkpoints")
    if len(kept) != num_folds:
        raise CheckpointError(f"the checkpoint has {len(kept)} folds, not {num_folds}")
    return [fold.numpy().tobytes() or None for fold in kept], saved["history"]
