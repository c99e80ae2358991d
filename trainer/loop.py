"""train: the whole loop, a generator of ProgressReports."""

import functools
from collections.abc import Callable, Collection, Generator

import torch
from torch import Tensor, nn

from trainer.augment import augment
from trainer.backbones import as_fed, find_backbone
from trainer.balance import loss_weights, with_smote
from trainer.batches import Leg, batch_bounds, legs, num_micro_batches, order_of, to_device
from trainer.config import (
    Objective,
    TrainConfig,
    check_balance,
    is_module,
    trains_on_features,
)
from trainer.data.dataset import ImageDataset
from trainer.device import DevicePlan
from trainer.evaluate import Normaliser, early_part, evaluate, no_pulse
from trainer.features import as_features, on_features
from trainer.graphs import GraphedStep, Step
from trainer.heads import freeze
from trainer.loss import summed_loss
from trainer.memory import memory_errors
from trainer.mixing import Partners, mix
from trainer.module_loop import train_module
from trainer.optim import clip_gradients, lr_at, set_lr
from trainer.reports import ProgressReport, check_finite, make_report
from trainer.seeds import own_randomness
from trainer.state import STEPS_AN_EPOCH, TrainState
from trainer.transfer import sent
from trainer.underway import Underway


def no_keep(_state: object) -> None:
    """Nothing."""


def train(
    config: TrainConfig,
    data: ImageDataset,
    plan: DevicePlan,
    *,
    resume: bytes | None = None,
    pulse: Callable[[], None] = no_pulse,
    keep: Callable[[TrainState], None] = no_keep,
    reported: int | None = None,
    end_step: int | None = None,
    try_averages: Collection[str] = (),
    objective: Objective = "accuracy",
) -> Generator[ProgressReport, None, None]:
    """Train on data.train, report after a quarter of an epoch and after each epoch.

    An epoch of fewer than 8 batches has no report at its quarter, and what is reported there is of
    a fixed part of the validation images (early_part). resume: a state's to_bytes();
    training goes on after it, on a CPU bit for bit as if it had never stopped. pulse is called
    before each batch, and what it raises ends the training. keep is called with the state before
    each batch of training, before pulse: there the state stands between two optimizer steps, and
    its to_bytes() may be called. The time that keep takes counts in no report. A LightningModule's
    training goes on from whole epochs and never calls keep. reported: the step of the newest report
    that the caller has; later ones that `resume` holds are yielded again first, as they were (None:
    none of them is). end_step: the training ends with the first report at or after this step (None:
    that of the last epoch); the learning rate's schedule remains that of all epochs, and averages
    are taken over the last quarter of what is trained. try_averages: names of averages whose value
    the last report is to say. objective: which validation value that is, and patience looks at.
    torch's own random state is the caller's between reports. Raises TrainingDiverged, OutOfMemory,
    DeviceBusy, CheckpointError, ConfigError.
    """
    if is_module(config.backbone):
        yield from train_module(
            config, data, plan, resume=resume, pulse=pulse, objective=objective, end_step=end_step
        )
        return
    check_balance(config)
    data = as_fed(config, data)
    batches = batch_bounds(len(data.train), config.batch_size)
    num_steps = config.epochs * len(batches)
    *_, last = legs(config.epochs, len(batches), 0, end_step)
    num_trained = last.epoch * len(batches) + last.end_batch
    with memory_errors(config, plan.device):
        state = TrainState.start(
            config,
            data,
            plan,
            steps_per_epoch=len(batches),
            resume=resume,
            try_averages=try_averages,
            end_step=end_step,
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
        step: Step = functools.partial(optimizer_step, state, weights=weights, model=model)
        if plan.graphs:
            step = GraphedStep(step, state.model, optimizer)
    for past in [] if reported is None else list(state.history):
        if past["step"] > reported:
            yield ProgressReport(**past, state=state)
    for leg in [] if state.finished else legs(config.epochs, len(batches), state.step, end_step):
        state.is_whole = False
        randomness = own_randomness("leg", config.seed, leg.step, device=plan.device)
        with memory_errors(config, plan.device), randomness:
            underway = state.underway = state.underway or begin_leg(config, leg, plan)
            underway.go_on(plan.device)
            order = sent(order_of(config, leg.epoch, data.train.labels), plan.device)
            model.train()
            thaw(state, (leg.epoch * len(batches) + leg.first_batch) / num_steps)
            for index in range(underway.next_batch, leg.end_batch):
                with state.between_steps(index):
                    keep(state)
                pulse()
                steps_done = leg.epoch * len(batches) + index
                set_lr(optimizer, lr_at(config, steps_done / num_steps))
                chosen = order[slice(*batches[index])]
                images = train_split.images.index_select(0, chosen)
                images = augment(images, config, underway.generator)
                labels = train_split.labels.index_select(0, chosen)
                images, partners = mix(normalise(images), labels, config, underway.generator)
                underway.total_loss += step(images, labels, partners)
                ends = steps_done + 1 == num_trained
                state.averages.after_step(state.model, 1.0 if ends else steps_done / num_trained)
            state.averages.after_epoch(state.model, leg.step / last.step)
            num_images = batches[leg.end_batch - 1][1] - batches[leg.first_batch][0]
            train_loss = float(underway.total_loss) / num_images  # waits for the device
            speed = num_images / underway.stop_clock()
            state.underway = None
            state.step, state.images_seen = leg.step, state.images_seen + num_images
            judged = state.averages.models() if leg.step == last.step else {}
            shown = early_part(val_split) if leg.step < STEPS_AN_EPOCH else val_split
            val, *others = [
                evaluate(view(judge), shown, plan, mean=data.mean, std=data.std, pulse=pulse)
                for judge in (state.result, *judged.values())
            ]
        check_finite(train_loss, val, leg, config)
        state.seconds += underway.stop_clock()
        averages = dict(zip(judged, (other.value(objective) for other in others), strict=True))
        state.is_whole = True
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


def begin_leg(config: TrainConfig, leg: Leg, plan: DevicePlan) -> Underway:
    """None of its batches has been trained on."""
    return Underway.begin(config, step=leg.step, first_batch=leg.first_batch, device=plan.device)


def thaw(state: TrainState, progress: float) -> None:
    """Have the stages trained that are due at this share of all steps."""
    stages = find_backbone(state.config.backbone).stages
    freeze(state.model, state.config.trainable, stages, progress)


def _whole(model: nn.Module) -> nn.Module:
    return model
