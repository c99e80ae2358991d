"""TrainConfig: the frozen, complete description of one training. Imports without torch."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

Optimizer = Literal["sgd", "adam", "adamw"]
Schedule = Literal["constant", "step", "cosine", "onecycle"]
Average = Literal["none", "ema", "tail"]


class ConfigError(ValueError):
    """A setting that can't be: the message is one line, for the user."""


class DataError(Exception):
    """Data that can't be used: the message is one line, for the user."""


class TrainingFailure(Exception):
    """A result rather than a fault: this configuration can't be trained; the message says why."""


class TrainingDiverged(TrainingFailure):
    """The training loss is not finite any more."""


class OutOfMemory(TrainingFailure):
    """The device's memory doesn't hold this configuration."""


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """One line that lists the known names and the nearest match."""
    names = sorted(known)
    nearest = difflib.get_close_matches(name, names, n=1)
    hint = f", did you mean {nearest[0]}?" if nearest else ""
    return f"unknown {kind} {name!r}{hint} (known: {', '.join(names)})"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that decides a training, but for the data and the device.

    Raises ConfigError if a field is out of its range.
    """

    backbone: str = "resnet8"
    """Name of the network, a key of trainer.backbones.BACKBONES."""
    pretrained: bool = False
    """Start from torchvision's published weights."""
    lr: float = 1e-3
    """Peak learning rate of the schedule, per optimizer step; > 0."""
    batch_size: int = 128
    """Images per optimizer step; >= 2 (batch norm)."""
    epochs: int = 10
    """Passes over the training split; >= 1."""
    optimizer: Optimizer = "adamw"
    """Rule by which weights are updated (trainer.optim.make_optimizer)."""
    momentum: float = 0.9
    """Of sgd, in [0, 1); adam and adamw take it as beta1."""
    weight_decay: float = 1e-2
    """Decoupled for adamw, L2 for sgd and adam; norms and biases are left out; >= 0."""
    schedule: Schedule = "onecycle"
    """Course of the learning rate over the training (trainer.optim.lr_at)."""
    label_smoothing: float = 0.0
    """Share of the target spread over all classes, in [0, 1) (Szegedy et al. 2016)."""
    dropout: float = 0.0
    """Before the last layer, in [0, 1)."""
    clip_norm: float = 0.0
    """Largest norm of all gradients together; 0 is off."""
    patience: int = 0
    """Epochs without a better validation accuracy before training ends; 0 is off."""
    average: Average = "none"
    """Weights that the finished model has: its last ones, or an average (trainer.averaging)."""
    flip: bool = False
    """Mirror half of the images left to right."""
    translate: int = 0
    """Largest shift in pixels, each way, filled with zeros (a random crop of a padded image)."""
    rotation: float = 0.0
    """Largest turn in degrees, each way, in [0, 180]."""
    cutout: int = 0
    """Side of a square set to zero, in pixels (DeVries & Taylor 2017); 0 is off."""
    seed: int = 0
    """Of weights, order and augmentation; >= 0."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type is float and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, field.name, float(value))
            elif field.type in (bool, int, float, str) and type(value) is not field.type:
                raise ConfigError(f"{field.name} must be {_name(field.type)}, got {value!r}")
        _check(self.lr > 0 and math.isfinite(self.lr), "lr must be > 0", self.lr)
        _check(self.batch_size >= 2, "batch_size must be >= 2", self.batch_size)
        _check(self.epochs >= 1, "epochs must be >= 1", self.epochs)
        _choice("optimizer", self.optimizer, get_args(Optimizer))
        _choice("schedule", self.schedule, get_args(Schedule))
        _choice("average", self.average, get_args(Average))
        for name in ("momentum", "label_smoothing", "dropout"):
            value = getattr(self, name)
            _check(0 <= value < 1, f"{name} must be in [0, 1)", value)
        for name in ("weight_decay", "clip_norm", "patience", "translate", "cutout", "seed"):
            value = getattr(self, name)
            _check(value >= 0 and math.isfinite(value), f"{name} must be >= 0", value)
        _check(0 <= self.rotation <= 180, "rotation must be in [0, 180]", self.rotation)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """The config of these fields. Raises ConfigError if one is unknown or out of range."""
        known = [field.name for field in dataclasses.fields(cls)]
        for name in values:
            if name not in known:
                raise ConfigError(unknown_name("field", name, known))
        return cls(**values)


def _name(kind: Any) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}[kind]


def _check(holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"{rule}, got {value}")


def _choice(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ConfigError(unknown_name(name, value, known))
