"""train: the whole loop, a generator of ProgressReports."""

import dataclasses
import math
import time
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from trainer.augment import augment
from trainer.backbones import as_fed, find_backbone
from trainer.balance import balanced_order, loss_weights, with_smote
from trainer.config import (
    DataError,
    Objective,
    TrainConfig,
    TrainingDiverged,
    check_balance,
    is_module,
    trains_on_features,
)
from trainer.data.dataset import ImageDataset, Split
from trainer.device import DevicePlan
from trainer.evaluate import Evaluation, Normaliser, early_part, evaluate, no_pulse
from trainer.features import as_features, on_features
from trainer.heads import freeze
from trainer.loss import summed_loss
from trainer.memory import memory_errors
from trainer.mixing import Partners, mix
from trainer.optim import clip_gradients, lr_at, set_lr
from trainer.seeds import own_randomness, seeded_generator
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


def train(
    config: TrainConfig,
    data: ImageDataset,
    plan: DevicePlan,
    *,
    resume: bytes | None = None,
    pulse: Callable[[], None] = no_pulse,
    try_averages: Collection[str] = (),
    objective: Objective = "accuracy",
) -> Generator[ProgressReport, None, None]:
    """Train on data.train, report after a quarter of an epoch and after each epoch.

    An epoch of fewer than 8 batches has no report at its quarter, and what is reported there is of
    a fixed part of the validation images (early_part). resume: a state's to_bytes();
    training goes on after it, on a CPU bit for bit as if it had never stopped. pulse is called
    before each batch, and what it raises ends the training. try_averages: names of averages whose
    value the last report is to say. objective: which validation value that is, and patience looks
    at. torch's own random state is the caller's between reports. Raises TrainingDiverged,
    OutOfMemory, CheckpointError, ConfigError.
    """
    if is_module(config.backbone):
        from trainer.module_loop import train_module  # which is made of parts of this file

        yield from train_module(config, data, plan, resume=resume, pulse=pulse, objective=objective)
        return
    check_balance(config)
    data = as_fed(config, data)
    batches = batch_bounds(len(data.train), config.batch_size)
    num_steps, last_step = config.epochs * len(batches), config.epochs * STEPS_AN_EPOCH
    with memory_errors(config, plan.device):
        state = TrainState.start(
            config,
            data,
            plan,
            steps_per_epoch=len(batches),
            resume=resume,
            try_averages=try_averages,
        )
        plan, optimizer = state.plan, state.optimizer
        view = _whole
        if trains_on_features(config) and not state.finished:
            data, view = as_features(state.model, data, plan, pulse), on_features
            if config.balance == "smote":
                data = with_smote(data, seed=config.seed)
        model = view(state.model)
        normalise = Normaliser(data.mean, data.std, plan.device)
        train_split, val_split = to_device(data.train, plan), to_device(data.val, plan)
        weights = loss_weights(config, data, plan.device)
    for leg in [] if state.finished else legs(config.epochs, len(batches), state.step):
        started = time.perf_counter()
        randomness = own_randomness("leg", config.seed, leg.step, device=plan.device)
        with memory_errors(config, plan.device), randomness:
            generator = seeded_generator("augment", config.seed, leg.step)
            order = order_of(config, leg.epoch, data.train.labels).to(plan.device)
            total_loss = torch.zeros((), device=plan.device)
            model.train()
            thaw(state, (leg.epoch * len(batches) + leg.first_batch) / num_steps)
            for index in range(leg.first_batch, leg.end_batch):
                pulse()
                steps_done = leg.epoch * len(batches) + index
                set_lr(optimizer, lr_at(config, steps_done / num_steps))
                chosen = order[slice(*batches[index])]
                images = augment(train_split.images.index_select(0, chosen), config, generator)
                labels = train_split.labels.index_select(0, chosen)
                images, partners = mix(normalise(images), labels, config, generator)
                total_loss += optimizer_step(state, images, labels, partners, weights, model=model)
                state.averages.after_step(state.model, steps_done / num_steps)
            state.averages.after_epoch(state.model, leg.step / last_step)
            num_images = batches[leg.end_batch - 1][1] - batches[leg.first_batch][0]
            train_loss = float(total_loss) / num_images  # waits for the device
            trained = time.perf_counter()
            state.step, state.images_seen = leg.step, state.images_seen + num_images
            judged = state.averages.models() if leg.step == last_step else {}
            shown = early_part(val_split) if leg.step < STEPS_AN_EPOCH else val_split
            val, *others = [
                evaluate(view(judge), shown, plan, mean=data.mean, std=data.std, pulse=pulse)
                for judge in (state.result, *judged.values())
            ]
        check_finite(train_loss, val, leg, config)
        state.seconds += time.perf_counter() - started
        averages = dict(zip(judged, (other.value(objective) for other in others), strict=True))
        speed = num_images / (trained - started)
        yield make_report(state, train_loss, val, speed, averages, objective)
        if state.finished:
            return


def optimizer_step(
    state: TrainState,
    images: Tensor,
    labels: Tensor,
    partners: Partners | None = None,
    weights: Tensor | None = None,
    *,
    model: nn.Module | None = None,
) -> Tensor:
    """One step on a batch, in micro-batches if the plan says so: the sum of the losses, 0-d.

    images: (N,C,H,W) float; labels: (N,). partners: what the images were mixed with. weights:
    (classes,), how much an image of each class counts. model: the part of the state's that takes
    these images, None for all of it. Batch norm sees micro-batches one by one.
    """
    config, plan = state.config, state.plan
    model = state.model if model is None else model
    total = torch.zeros((), device=images.device)
    num_parts = num_micro_batches(len(images), plan.micro_batch)
    state.optimizer.zero_grad(set_to_none=True)
    parts = zip(
        images.tensor_split(num_parts),
        labels.tensor_split(num_parts),
        [None] * num_parts if partners is None else partners.split(num_parts),
        strict=True,
    )
    for part, part_labels, part_partners in parts:
        with plan.autocast():
            logits = model(plan.lay_out(part))
        loss = summed_loss(
            logits.float(), part_labels, part_partners, weights, smoothing=config.label_smoothing
        )
        torch.autograd.backward(loss / len(images))
        total += loss.detach()
    clip_gradients(state.model.parameters(), config.clip_norm)
    state.optimizer.step()
    return total


@dataclass(frozen=True, kw_only=True)
class Leg:
    """The batches from one report to the next; epoch counts from 0, step is the one reached."""

    epoch: int
    first_batch: int
    end_batch: int
    step: int


def legs(num_epochs: int, num_batches: int, steps_done: int) -> list[Leg]:
    """The legs still to go, in order. num_batches: of an epoch."""
    whole = [
        Leg(
            epoch=epoch,
            first_batch=0,
            end_batch=num_batches,
            step=(epoch + 1) * STEPS_AN_EPOCH,
        )
        for epoch in range(num_epochs)
    ]
    if num_batches >= 2 * STEPS_AN_EPOCH:
        quarter = math.ceil(num_batches / STEPS_AN_EPOCH)
        first = Leg(epoch=0, first_batch=0, end_batch=quarter, step=1)
        whole[:1] = [first, dataclasses.replace(whole[0], first_batch=quarter)]
    return [leg for leg in whole if leg.step > steps_done]


def batch_bounds(num_images: int, batch_size: int) -> list[tuple[int, int]]:
    """(first, end) of each batch of an epoch; no image is left out.

    A last batch of one image, which batch norm can't take, joins the one before. Raises
    DataError if there is only one image.
    """
    if num_images < 2:
        raise DataError(f"at least two images are needed to train, got {num_images}")
    starts = [start for start in range(0, num_images, batch_size) if num_images - start > 1]
    return list(zip(starts, [*starts[1:], num_images], strict=True))


def num_micro_batches(num_images: int, micro_batch: int | None) -> int:
    """Into how many parts a batch is split: none of one image, so three may go at once for 2."""
    if micro_batch is None:
        return 1
    return max(1, min(math.ceil(num_images / micro_batch), num_images // 2))


def epoch_order(seed: int, epoch: int, num_images: int) -> Tensor:
    """The order of the images in this epoch: int64 (num_images,)."""
    return torch.randperm(num_images, generator=seeded_generator("order", seed, epoch))


def thaw(state: TrainState, progress: float) -> None:
    """Have the stages trained that are due at this share of all steps."""
    stages = find_backbone(state.config.backbone).stages
    freeze(state.model, state.config.trainable, stages, progress)


def _whole(model: nn.Module) -> nn.Module:
    return model


def order_of(config: TrainConfig, epoch: int, labels: Tensor) -> Tensor:
    """Which images this epoch takes, and in which order: int64 (M,). labels: (N,), on the CPU.

    An epoch's batches take the first of them, which SMOTE makes fewer than all.
    """
    if config.balance == "sampling":
        return balanced_order(config.seed, epoch, labels)
    return epoch_order(config.seed, epoch, len(labels))


def to_device(split: Split, plan: DevicePlan) -> Split:
    """The split in the device's memory (the same one if it is there)."""
    return type(split)(split.images.to(plan.device), split.labels.to(plan.device))


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
    last = state.step == state.config.epochs * STEPS_AN_EPOCH
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
