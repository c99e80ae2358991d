"""train_module: a LightningModule's training, in the reports that any other training makes."""

import contextlib
import functools
import tempfile
import time
from collections.abc import Callable, Generator
from typing import Any

from trainer.averaging import Averages
from trainer.backbones import build
from trainer.batches import Leg, batch_bounds, legs, order_of, to_device
from trainer.config import Objective, OutOfMemory, TrainConfig
from trainer.data.dataset import ImageDataset
from trainer.device import DevicePlan, prepare
from trainer.evaluate import Evaluation, early_part, evaluate
from trainer.fitting import Fitting, Task
from trainer.memory import memory_errors
from trainer.module_state import ModuleState
from trainer.modules import check_module_fields, kept_modes
from trainer.reports import ProgressReport, check_finite, make_report
from trainer.seeds import own_randomness
from trainer.state import MODULE_KEYS, STEPS_AN_EPOCH, identity_of, read_checkpoint


def train_module(
    config: TrainConfig,
    data: ImageDataset,
    plan: DevicePlan,
    *,
    resume: bytes | None,
    pulse: Callable[[], None],
    objective: Objective,
    end_step: int | None = None,
) -> Generator[ProgressReport, None, None]:
    """As trainer.loop.train, with the module's own training_step, optimizers and schedules.

    Its batches are (images, labels), float (N,C,H,W) normalised and augmented, int64 (N,). It is
    judged by its forward on the validation images, as any network; its own validation_step, if it
    has one, sees them too. It may end before its last epoch. On a CPU it goes on from a whole epoch
    bit for bit, as far as it draws its random numbers from torch; from the quarter of the first
    epoch it begins anew. Raises ConfigError for what its own code raises.
    """
    check_module_fields(config)
    saved = None if resume is None else read_checkpoint(resume, config, data, MODULE_KEYS, end_step)
    if saved is not None:
        plan = DevicePlan.from_dict(saved["plan"]).on(plan.device)
    if plan.micro_batch is not None:
        raise OutOfMemory(
            f"{config.backbone} with batch_size {config.batch_size} doesn't fit into the memory of "
            f"{plan.device}, and a LightningModule's batches are not split"
        )
    history = [] if saved is None else saved["history"]
    if history and history[-1]["finished"]:
        return
    task = _task(config, data, plan, saved, pulse)
    with (
        tempfile.TemporaryDirectory(prefix="hpo-lightning-") as folder,
        contextlib.closing(Fitting(task, folder)) as fitting,
    ):
        yield from _reports(task, fitting, saved or {}, objective, end_step)


def _task(
    config: TrainConfig,
    data: ImageDataset,
    plan: DevicePlan,
    saved: dict[str, Any] | None,
    pulse: Callable[[], None],
) -> Task:
    prepare(plan.device, plan.num_threads)
    batches = batch_bounds(len(data.train), config.batch_size)
    first = legs(config.epochs, len(batches), 0)[0]
    going_on = saved if saved is not None and saved["lightning"] else {}
    with memory_errors(config, plan.device):
        return Task(
            config=config,
            data=data,
            plan=plan,
            model=plan.place(
                build(config, input_size=data.input_size, num_classes=data.num_classes)
            ),
            train=to_device(data.train, plan),
            val=to_device(data.val, plan),
            batches=batches,
            quarter=first.end_batch if first.step < STEPS_AN_EPOCH else None,
            order=functools.partial(order_of, config, labels=data.train.labels),
            pulse=pulse,
            epochs_done=going_on.get("step", 0) // STEPS_AN_EPOCH,
            checkpoint=going_on.get("lightning", {}),
            loops=going_on.get("loops", {}),
        )


def _reports(
    task: Task, fitting: Fitting, saved: dict[str, Any], objective: Objective, end_step: int | None
) -> Generator[ProgressReport, None, None]:
    config, plan, batches = task.config, task.plan, task.batches
    last_step, reported = config.epochs * STEPS_AN_EPOCH, saved.get("step", 0)
    state: ModuleState | None = None
    for leg in legs(config.epochs, len(batches), task.epochs_done * STEPS_AN_EPOCH):
        started = time.perf_counter()
        randomness = own_randomness("leg", config.seed, leg.step, device=plan.device)
        with memory_errors(config, plan.device), randomness:
            fitting.advance()
            if fitting.ended:
                plan.place(task.model)  # Lightning leaves it on the CPU
            train_loss = fitting.train_loss()
            if leg.step <= reported:
                continue
            val = _judged(task, leg)
        check_finite(train_loss, val, leg, config)
        state = _state(task, fitting, saved, end_step) if state is None else state
        state.step = leg.step
        state.images_seen = leg.epoch * batches[-1][1] + batches[leg.end_batch - 1][1]
        state.seconds += time.perf_counter() - started
        state.trainer = None if fitting.ended else fitting.trainer
        state.loops = fitting.loops
        num_images = batches[leg.end_batch - 1][1] - batches[leg.first_batch][0]
        early = fitting.ended and leg.step < last_step
        ended = f"{config.backbone} ended its training by itself" if early else None
        speed = num_images / fitting.train_seconds
        yield make_report(state, train_loss, val, speed, {}, objective, ended=ended)
        if state.finished:
            return


def _judged(task: Task, leg: Leg) -> Evaluation:
    shown = early_part(task.val) if leg.step < STEPS_AN_EPOCH else task.val
    data = task.data
    with kept_modes(task.model) as model:
        return evaluate(model, shown, task.plan, mean=data.mean, std=data.std, pulse=task.pulse)


def _state(
    task: Task, fitting: Fitting, saved: dict[str, Any], end_step: int | None
) -> ModuleState:
    """Of a training that has begun: its optimizers are there."""
    return ModuleState(
        config=task.config,
        plan=task.plan,
        data_identity=identity_of(task.data),
        model=task.model,
        optimizer=fitting.trainer.optimizers[0],
        averages=Averages(task.model, (), steps_per_epoch=len(task.batches)),
        seconds=saved.get("seconds", 0.0),
        history=saved.get("history", []),
        end_step=end_step,
        trainer=fitting.trainer,
        loops=fitting.loops,
    )
