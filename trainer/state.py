"""TrainState: all of a training that changes, as bytes and back."""

import io
from collections.abc import Collection, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import nn

from trainer.averaging import Averages
from trainer.backbones import build
from trainer.config import CheckpointError as CheckpointError  # raised here
from trainer.config import TrainConfig
from trainer.data.dataset import ImageDataset
from trainer.device import DevicePlan, prepare
from trainer.optim import make_optimizer
from trainer.underway import Underway

FORMAT = 4
STEPS_AN_EPOCH = 4
_MOST_BATCHES = 1 << 32
"""More than an epoch has."""
_COMMON = {
    "config",
    "plan",
    "data_identity",
    "step",
    "images_seen",
    "seconds",
    "history",
    "end_step",
}
_KEYS = _COMMON | {"model", "optimizer", "averages", "underway"}
FOLDS_KEYS = {"config", "folds", "history"}
"""Of several trainings that go on together (trainer.folds)."""
MODULE_KEYS = _COMMON | {"lightning", "loops"}
"""Of a LightningModule's training (trainer.module_state)."""


@dataclass(kw_only=True, eq=False)
class TrainState:
    """Model, optimizer and counters between two optimizer steps.

    Between two reports there is no random state in it: each leg of a training has streams of its
    own, from the config's seed and the leg's step (trainer.seeds). Within a leg they are in
    `underway`.
    """

    config: TrainConfig
    plan: DevicePlan
    data_identity: list[Any]
    model: nn.Module
    optimizer: torch.optim.Optimizer
    averages: Averages
    step: int = 0
    """Quarter epochs done."""
    images_seen: int = 0
    seconds: float = 0.0
    history: list[dict[str, Any]] = field(default_factory=list)
    """The reports so far, as plain values."""
    end_step: int | None = None
    """Where the training ends, if that isn't after the last of the config's epochs."""
    underway: Underway | None = None
    """How far the leg is that has begun; None between two legs."""
    is_whole: bool = True
    """Whether all of the above belongs together, so that it can be saved."""

    @classmethod
    def start(
        cls,
        config: TrainConfig,
        data: ImageDataset,
        plan: DevicePlan,
        *,
        steps_per_epoch: int,
        resume: bytes | None = None,
        try_averages: Collection[str] = (),
        end_step: int | None = None,
    ) -> Self:
        """A new training, or the one whose to_bytes() `resume` is.

        try_averages: names of averages to keep beside the one that config asks for. Precision,
        memory format, micro-batch and threads stay as they were in the checkpoint; only the
        device is the given plan's. Raises CheckpointError if the bytes are no checkpoint, or one
        of another config or data; ConfigError if the device isn't there.
        """
        saved = None if resume is None else read_checkpoint(resume, config, data, _KEYS, end_step)
        if saved is not None:
            plan = DevicePlan.from_dict(saved["plan"]).on(plan.device)
        prepare(plan.device, plan.num_threads)
        size, num_classes = data.input_size, data.num_classes
        start = config if saved is None else config.from_scratch()
        model = plan.place(build(start, input_size=size, num_classes=num_classes))
        averages = {*try_averages, config.average} - {"none"}
        state = cls(
            config=config,
            plan=plan,
            data_identity=identity_of(data),
            model=model,
            optimizer=make_optimizer(config, model),
            averages=Averages(model, averages, steps_per_epoch=steps_per_epoch),
            end_step=end_step,
        )
        if saved is not None:
            state._load(saved, steps_per_epoch)
        return state

    def to_bytes(self) -> bytes:
        """Tensors and plain Python only: torch.load(weights_only=True) reads it.

        To be called at a report or by `keep` (trainer.loop.train): elsewhere a step or an
        evaluation is half done, and RuntimeError is raised.
        """
        if not self.is_whole:
            raise RuntimeError("a training can be saved at a report and by keep, not in a step")
        file = io.BytesIO()
        content = {
            "format": FORMAT,
            "config": self.config.to_dict(),
            "plan": self.plan.to_dict(),
            "data_identity": self.data_identity,
            "end_step": self.end_step,
            "step": self.step,
            "images_seen": self.images_seen,
            "seconds": self.seconds,
            "history": self.history,
            **self._learnt(),
        }
        torch.save(content, file)
        return file.getvalue()

    def _learnt(self) -> dict[str, Any]:
        """What of the content is weights, and what goes with them."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "averages": self.averages.state_dict(),
            "underway": None if self.underway is None else self.underway.to_dict(self.plan.device),
        }

    @contextmanager
    def between_steps(self, next_batch: int) -> Iterator[None]:
        """Within a leg: in here it may be saved, and what that takes is no training."""
        assert self.underway is not None
        self.underway.next_batch = next_batch
        self.underway.stop_clock()
        self.is_whole = True
        try:
            yield
        finally:
            self.is_whole = False
        self.underway.start_clock()

    @property
    def position(self) -> int:
        """Grows with each batch of the training: two states are compared by it."""
        return _position(self.step, None if self.underway is None else self.underway.next_batch)

    @property
    def last_step(self) -> int:
        """The step of the last report, unless patience ends the training before."""
        whole = self.config.epochs * STEPS_AN_EPOCH
        return whole if self.end_step is None else min(whole, self.end_step)

    @property
    def averaging(self) -> str:
        """Which average of weights `result` is; "none" where it is the last weights.

        From the last step on it is the one that config asks for. A training that its patience ends
        has been judged by its last weights, and hands over those.
        """
        if self.step < self.last_step or self.config.average not in self.averages.models():
            return "none"
        return self.config.average

    @property
    def result(self) -> nn.Module:
        """The model as it stands, by which reports judge: its last weights or their average."""
        name = self.averaging
        return self.model if name == "none" else self.averages.models()[name]

    @property
    def finished(self) -> bool:
        """Whether the last report has been made."""
        return bool(self.history) and self.history[-1]["finished"] is True

    def _load(self, saved: dict[str, Any], steps_per_epoch: int) -> None:
        try:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.averages.load_state_dict(saved["averages"])
            self.step, self.images_seen = saved["step"], saved["images_seen"]
            self.seconds, self.history = saved["seconds"], saved["history"]
            if saved["underway"] is not None:
                self.underway = Underway.from_dict(saved["underway"], device=self.plan.device)
                if self.underway.next_batch not in range(steps_per_epoch):
                    raise ValueError(f"an epoch has {steps_per_epoch} batches")
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise CheckpointError(f"the checkpoint doesn't fit: {first_line(error)}") from error


def read_history(content: bytes) -> list[dict[str, Any]]:
    """The reports made until this checkpoint, oldest first. Raises CheckpointError."""
    history: list[dict[str, Any]] = open_checkpoint(content, _KEYS, FOLDS_KEYS, MODULE_KEYS)[
        "history"
    ]
    return history


def position_of(content: bytes) -> int:
    """TrainState.position of a checkpoint of one training. Raises CheckpointError."""
    saved = open_checkpoint(content, _KEYS, MODULE_KEYS)
    underway = saved.get("underway")
    return _position(saved["step"], None if underway is None else underway["next_batch"])


def _position(step: int, next_batch: int | None) -> int:
    return step * _MOST_BATCHES + (0 if next_batch is None else 1 + next_batch)


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a checkpoint's training is."""

    history: list[dict[str, Any]]
    """The reports made until then, oldest first, as plain values."""
    is_underway: bool
    """Whether the training has gone on from the newest of them."""
    seconds: float
    """Spent so far, by all attempts together."""


def read_progress(content: bytes) -> Progress:
    """Of a checkpoint of any kind. Raises CheckpointError."""
    saved = open_checkpoint(content, _KEYS, FOLDS_KEYS, MODULE_KEYS)
    underway = saved.get("underway")
    if "folds" in saved:
        folds = [fold.numpy().tobytes() for fold in saved["folds"]]
        seconds = sum(read_progress(fold).seconds for fold in folds if fold)
    else:
        seconds = saved["seconds"] + (underway["seconds"] if underway else 0.0)
    return Progress(history=saved["history"], is_underway=bool(underway), seconds=seconds)


def identity_of(data: ImageDataset) -> list[Any]:
    """The data, and which of its images are trained on."""
    return [data.fingerprint, len(data.train), len(data.val), *data.mean]


def open_checkpoint(content: bytes, *kinds: Set[str]) -> dict[str, Any]:
    """What it holds. kinds: the keys that one of each kind has. Raises CheckpointError."""
    try:
        saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception as error:  # torch.load raises whatever a broken file leads to
        raise CheckpointError("the checkpoint can't be read: it is broken") from error
    if isinstance(saved, dict) and saved.get("format") == FORMAT:
        found: dict[str, Any] = saved
        if any(keys <= set(found) for keys in kinds):
            return found
    raise CheckpointError("the checkpoint can't be read: it has another format")


def check_config(saved: Mapping[str, Any], config: TrainConfig) -> None:
    """Raises CheckpointError if a checkpoint's config is another."""
    own = config.to_dict()
    differing = [name for name in own if saved.get(name) != own[name]]
    if differing:
        raise CheckpointError(f"the checkpoint is of another config: {', '.join(differing)}")


def read_checkpoint(
    content: bytes,
    config: TrainConfig,
    data: ImageDataset,
    keys: Set[str],
    end_step: int | None = None,
) -> dict[str, Any]:
    """One with these keys. Raises CheckpointError if it is of another config, data or end."""
    saved = open_checkpoint(content, keys)
    check_config(saved["config"], config)
    if saved["data_identity"] != identity_of(data):
        raise CheckpointError(f"the checkpoint is of other data than {data.name}")
    if saved["end_step"] != end_step:
        raise CheckpointError(
            f"the checkpoint is of a training until step {saved['end_step']}, not {end_step}"
        )
    return saved


def first_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
