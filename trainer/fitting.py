"""Fitting: Lightning's Trainer at work on our batches, in a thread that pauses for each report."""

import contextlib
import importlib
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.augment import augment
from trainer.config import ConfigError, TrainConfig
from trainer.data.dataset import ImageDataset, Split
from trainer.device import DevicePlan, prepare
from trainer.evaluate import Normaliser, early_part
from trainer.foreign import one_line
from trainer.handover import Handover
from trainer.memory import is_out_of_memory
from trainer.modules import kept_modes, lightning_of
from trainer.seeds import reseed, seeded_generator
from trainer.state import STEPS_AN_EPOCH, CheckpointError

Bounds = tuple[int, int]
_PACKAGES = "site-packages"
_CHATTER = r"(lightning|pytorch_lightning|lightning_utilities)(\.|$)"


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained, on what, and how far it was."""

    config: TrainConfig
    data: ImageDataset
    plan: DevicePlan
    model: nn.Module
    train: Split
    """On the plan's device."""
    val: Split
    """On the plan's device."""
    batches: Sequence[Bounds]
    """Of an epoch."""
    quarter: int | None
    """Batches until the pause within the first epoch; None: there is none."""
    order: Callable[[int], Tensor]
    """Epoch -> which images it takes: int64 (M,)."""
    pulse: Callable[[], None]
    epochs_done: int = 0
    checkpoint: Mapping[str, Any] = field(default_factory=dict)
    """Lightning's own, to go on from."""
    loops: Mapping[str, Any] = field(default_factory=dict)


class Fitting:
    """Trainer.fit, which pauses where a report is due: after the quarter, and after each epoch.

    An epoch's pause lies at the next one's start, when schedulers, validation and hooks have had
    their turn. The last one is the end.
    """

    def __init__(self, task: Task, folder: str) -> None:
        """folder: empty, for whatever Lightning writes."""
        self._task, self._folder = task, folder
        self._handover = Handover(self._fit, name="lightning-fit")
        self._normalise = Normaliser(task.data.mean, task.data.std, task.plan.device)
        self._epoch = task.epochs_done
        self._begun = False
        self._interruption: BaseException | None = None
        self._last_batch: tuple[Tensor, Tensor] | None = None
        self._losses = torch.zeros((), device=task.plan.device)
        self._num_images = 0
        self._leg_began, self._trained_until = 0.0, 0.0
        self.loops: Mapping[str, Any] = task.loops
        self.trainer = self._make_trainer()

    @property
    def ended(self) -> bool:
        """Whether there is no more to come."""
        return self._handover.ended

    def advance(self) -> None:
        """Train until the next pause or the end.

        Raises what `pulse` raised; of the user's code ConfigError, one line with its place, or what
        says that memory is used up; CheckpointError if there is no going on.
        """
        with _quietly():
            try:
                self._handover.advance()
            except Exception as error:
                raise self._told(error) from error

    def close(self) -> None:
        """End it where it is, and leave the model without a Trainer."""
        with _quietly():
            self._handover.close()
        self._task.model.trainer = None  # type: ignore[assignment]

    def train_loss(self) -> float:
        """Mean of what training_step gave since the last call, an image.

        Where it gives nothing (optimized by hand): the cross-entropy of the last batch.
        """
        if self._num_images:
            mean = float(self._losses) / self._num_images
            self._losses, self._num_images = torch.zeros_like(self._losses), 0
            return mean
        if self._last_batch is None:
            raise ConfigError(f"backbone {self._task.config.backbone}: it ended before a batch")
        images, labels = self._last_batch
        with kept_modes(self._task.model) as model, torch.no_grad(), self._task.plan.autocast():
            logits = model.eval()(images)
        return float(functional.cross_entropy(logits.float(), labels))

    @property
    def train_seconds(self) -> float:
        """From the first batch since the last pause to the newest one's end."""
        return self._trained_until - self._leg_began

    def _told(self, error: Exception) -> BaseException:
        """What the caller is to hear of it."""
        if self._interruption is not None:
            return self._interruption
        if isinstance(error, MemoryError | RuntimeError) and is_out_of_memory(error):
            return error
        if self._task.checkpoint and not self._begun:
            return CheckpointError(f"the checkpoint doesn't fit: {one_line(error)}")
        backbone = self._task.config.backbone
        return ConfigError(f"backbone {backbone}: {one_line(error)}{_place(error)}")

    def _make_trainer(self) -> Any:
        task, package = self._task, lightning_of(self._task.model)
        kind, _, index = task.plan.device.partition(":")
        callbacks = importlib.import_module(f"{package.__name__}.callbacks")
        alone = importlib.import_module(f"{package.__name__}.plugins.environments")
        hooks = type("Hooks", (_Hooks, callbacks.Callback), {})(self)
        with _quietly():
            return package.Trainer(
                accelerator="gpu" if kind == "cuda" else kind,
                devices=[int(index or 0)] if kind == "cuda" else 1,
                plugins=[alone.LightningEnvironment()],  # whatever cluster this process runs on
                precision="bf16-mixed" if task.plan.precision == "bf16" else "32-true",
                max_epochs=task.config.epochs,
                limit_val_batches=1.0 if self._validates() else 0,
                num_sanity_val_steps=0,
                callbacks=[hooks],
                default_root_dir=self._folder,
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                use_distributed_sampler=False,
            )

    def _validates(self) -> bool:
        own = getattr(type(self._task.model), "validation_step", None)
        return own is not lightning_of(self._task.model).LightningModule.validation_step

    def _fit(self) -> None:
        task, resumed = self._task, None
        prepare(task.plan.device, task.plan.num_threads)
        reseed("fit", task.config.seed, device=task.plan.device)
        if task.checkpoint:
            resumed = f"{self._folder}/resume.ckpt"
            torch.save(dict(task.checkpoint), resumed)
        self.trainer.fit(
            task.model,
            train_dataloaders=_Batches(len(task.batches), self._train_batches),
            val_dataloaders=self._val_batches() if self._validates() else None,
            ckpt_path=resumed,
        )

    def _beat(self) -> None:
        self._handover.check()
        try:
            self._task.pulse()
        except BaseException as error:
            self._interruption = error  # Lightning would exit the process on some of them
            raise RuntimeError("the training was interrupted") from error

    def _train_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        task, epoch = self._task, self._epoch
        order = task.order(epoch).to(task.plan.device)
        for index, bounds in enumerate(task.batches):
            if index == 0 or (epoch == 0 and index == task.quarter):
                step = STEPS_AN_EPOCH * (epoch + 1)
                if index == 0 and epoch == 0 and task.quarter is not None:
                    step = 1
                self._leg_began = time.perf_counter()
                reseed("leg", task.config.seed, step, device=task.plan.device)
                generator = seeded_generator("augment", task.config.seed, step)
            self._beat()
            chosen = order[slice(*bounds)]
            images = augment(task.train.images.index_select(0, chosen), task.config, generator)
            yield self._batch(images, task.train.labels.index_select(0, chosen))

    def _val_batches(self) -> "_Batches":
        """The validation images; where all are trained on, some of these, for what watches them."""
        task, size = self._task, self._task.config.batch_size
        split = task.val if len(task.val) else early_part(task.train)
        starts = range(0, len(split), size)

        def batches() -> Iterator[tuple[Tensor, Tensor]]:
            for start in starts:
                self._beat()
                part = slice(start, start + size)
                yield self._batch(split.images[part], split.labels[part])

        return _Batches(len(starts), batches)

    def _batch(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        return self._task.plan.lay_out(self._normalise(images)), labels

    def on_start(self) -> None:
        """Lightning is about to begin, or to go on."""
        if self._task.loops:
            loop = self.trainer.fit_loop
            loop.load_state_dict(dict(self._task.loops))
            loop.epoch_progress.total.ready = loop.epoch_progress.total.completed
            loop.epoch_progress.current.ready = loop.epoch_progress.current.completed
            loop.restarting = False  # all of an epoch is done: there is nothing to go back to
        self._begun = True

    def on_epoch_start(self) -> None:
        """What belongs to the epoch before has been done."""
        if self.trainer.current_epoch > self._task.epochs_done:
            self.loops = self.trainer.fit_loop.state_dict()
            self._handover.pause()
        self._epoch = self.trainer.current_epoch

    def on_batch_end(self, outputs: Any, batch: tuple[Tensor, Tensor], index: int) -> None:
        """outputs: what Lightning made of what training_step gave."""
        self._trained_until, self._last_batch = time.perf_counter(), batch
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, Tensor):
            self._losses += loss.detach().float().mean() * len(batch[1])
            self._num_images += len(batch[1])
        if self._epoch == 0 and index + 1 == self._task.quarter:
            self._handover.pause()


class _Hooks:
    """The part of Lightning's callback that is the same for both of its packages."""

    def __init__(self, fitting: Fitting) -> None:
        super().__init__()
        self._fitting = fitting

    def on_train_start(self, *_: Any) -> None:
        self._fitting.on_start()

    def on_train_epoch_start(self, *_: Any) -> None:
        self._fitting.on_epoch_start()

    def on_train_batch_end(self, _t: Any, _m: Any, outputs: Any, batch: Any, index: int) -> None:
        self._fitting.on_batch_end(outputs, batch, index)

    def on_save_checkpoint(self, _trainer: Any, _module: Any, checkpoint: dict[str, Any]) -> None:
        for name in ("hyper_parameters", "hparams_name", "hparams_type", "loops"):
            checkpoint.pop(name, None)  # the config and ModuleState have these


class _Batches:
    """Batches with a known number, made anew for each epoch."""

    def __init__(self, number: int, make: Callable[[], Iterator[tuple[Tensor, Tensor]]]) -> None:
        self._number, self._make = number, make

    def __len__(self) -> int:
        return self._number

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self._make()


def _place(error: BaseException) -> str:
    """Where in the user's own files it came up."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if _PACKAGES not in Path(frame.filename).parts]
    return f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without Lightning's advice on loaders, loggers and hardware; the user's warnings stay.

    What the user's code prints goes to stderr: stdout belongs to results.
    """
    with warnings.catch_warnings(), contextlib.redirect_stdout(sys.stderr):
        warnings.filterwarnings("ignore", module=_CHATTER)
        yield
