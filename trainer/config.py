"""TrainConfig: the frozen, complete description of one training. Imports without torch."""

import dataclasses
import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

Optimizer = Literal["sgd", "adam", "adamw"]
Schedule = Literal["constant", "step", "cosine", "onecycle"]
Average = Literal["none", "ema", "tail"]
Trainable = Literal["all", "head", "last1", "last2", "last3", "gradual"]
Policy = Literal["none", "trivialaugment", "randaugment"]
Balance = Literal["none", "loss", "sampling", "smote"]
Precision = Literal["fp32", "bf16"]
Objective = Literal["accuracy", "balanced_accuracy", "macro_f1"]
"""Validation values that a training can be judged by; the names are those of Evaluation."""
Argument = bool | int | float | str
MODULE = "lightning:"
"""Begins the name of a LightningModule as backbone, and of a LightningDataModule as data."""
ARGUMENT = "module."
"""Begins the name of an argument of a LightningModule among the fields of a training."""


class ConfigError(ValueError):
    """A setting that can't be: the message is one line, for the user."""


class DataError(Exception):
    """Data that can't be used: the message is one line, for the user."""


class CheckpointError(ValueError):
    """Bytes that aren't a checkpoint of this training: the message is one line."""


class TrainingFailure(Exception):
    """A result rather than a fault: this configuration can't be trained; the message says why."""


class TrainingDiverged(TrainingFailure):
    """The training loss is not finite any more."""


class OutOfMemory(TrainingFailure):
    """The device's memory doesn't hold this configuration."""


class DeviceBusy(Exception):
    """The device's memory would hold this configuration, were it not for other processes on it.

    No result of the configuration: it can be tried again later, or elsewhere.
    """


def unknown_name(kind: str, name: str, known: Iterable[str]) -> str:
    """One line that lists the known names and the nearest match."""
    names = sorted(known)
    nearest = difflib.get_close_matches(str(name), names, n=1)  # true, in a space file, is none
    hint = f", did you mean {nearest[0]}?" if nearest else ""
    return f"unknown {kind} {name!r}{hint} (known: {', '.join(names)})"


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """All that decides a training, but for the data and the device.

    Raises ConfigError if a field is out of its range.
    """

    backbone: str = "resnet8"
    """Name of the network: a key of trainer.backbones.BACKBONES, timm:NAME, package:function of
    one's own, or lightning:package:Class, a LightningModule of one's own (trainer.modules)."""
    module: Mapping[str, Argument] = field(default_factory=dict, hash=False)
    """Arguments of a LightningModule of one's own, by name, which are fixed and searched as
    module.NAME; it is given num_classes, input_size and the fields that it takes besides."""
    pretrained: bool = False
    """Start from torchvision's published weights, fed with their mean and standard deviation."""
    weights: str = ""
    """Start from this file's weights: an export of ours, safetensors, or a .pth of tensors by
    name; the head is new. Empty: none."""
    trainable: Trainable = "all"
    """What is trained: all, the head alone, the last stages beside it, or gradually more of them
    (trainer.heads)."""
    backbone_lr: float = 1.0
    """Learning rate of all but the head, as a share of lr; > 0."""
    head_hidden: int = 0
    """Width of a hidden layer in the head (Linear, ReLU, Dropout, Linear); 0: one layer."""
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
    """Weights that the finished model has: its last ones, or an average over the last quarter of
    the training (trainer.averaging). Where patience ends a training they are its last ones."""
    flip: bool = False
    """Mirror half of the images left to right."""
    translate: int = 0
    """Largest shift in pixels, each way, filled with zeros (a random crop of a padded image)."""
    rotation: float = 0.0
    """Largest turn in degrees, each way, in [0, 180]."""
    cutout: int = 0
    """Side of a square set to zero, in pixels (DeVries & Taylor 2017); 0 is off."""
    policy: Policy = "none"
    """Randomly drawn operations on each image: one of any strength (trivialaugment, Müller & Hutter
    2021, its wide ranges) or two of policy_magnitude (randaugment, Cubuk et al. 2020)."""
    policy_magnitude: int = 9
    """Strength of randaugment's operations, in [0, 30] (torchvision's scale and default)."""
    erasing: float = 0.0
    """Probability that a rectangle of an image is overwritten with noise, in [0, 1]; 0 is off
    (Zhong et al. 2020, who take 0.5)."""
    mixup: float = 0.0
    """alpha of the Beta(alpha, alpha) by which two images are mixed, in [0, 1000]; 0 is off
    (Zhang et al. 2018, who take 0.1 to 0.4). With cutmix on, too, a coin decides for each batch."""
    cutmix: float = 0.0
    """alpha of the Beta(alpha, alpha) that says how much of an image a rectangle of another leaves,
    in [0, 1000]; 0 is off (Yun et al. 2019, who take 1)."""
    balance: Balance = "none"
    """For classes of unequal size: loss weighs each image by the inverse of its class's size (the
    mean weight is 1), sampling draws the images of an epoch with all classes equally likely, smote
    (Chawla et al. 2002; for a head alone) does so after it has filled the small classes with points
    between the features of their images."""
    seed: int = 0
    """Of weights, order and augmentation; >= 0."""

    def __post_init__(self) -> None:
        for each in dataclasses.fields(self):
            value = getattr(self, each.name)
            if each.type is float and isinstance(value, int) and not isinstance(value, bool):
                object.__setattr__(self, each.name, float(value))
            elif each.type in (bool, int, float, str) and type(value) is not each.type:
                raise ConfigError(f"{each.name} must be {_name(each.type)}, got {value!r}")
        object.__setattr__(self, "module", _checked_arguments(self.module))
        _check(self.lr > 0 and math.isfinite(self.lr), "lr must be > 0", self.lr)
        _check(self.batch_size >= 2, "batch_size must be >= 2", self.batch_size)
        _check(self.epochs >= 1, "epochs must be >= 1", self.epochs)
        _choice("optimizer", self.optimizer, get_args(Optimizer))
        _choice("schedule", self.schedule, get_args(Schedule))
        _choice("average", self.average, get_args(Average))
        _choice("trainable", self.trainable, get_args(Trainable))
        _check(self.backbone_lr > 0, "backbone_lr must be > 0", self.backbone_lr)
        both = self.pretrained and bool(self.weights)
        _check(not both, "pretrained and weights exclude one another", self.weights)
        _choice("policy", self.policy, get_args(Policy))
        _choice("balance", self.balance, get_args(Balance))
        for name in ("momentum", "label_smoothing", "dropout"):
            value = getattr(self, name)
            _check(0 <= value < 1, f"{name} must be in [0, 1)", value)
        for name in (
            "weight_decay",
            "clip_norm",
            "patience",
            "translate",
            "cutout",
            "seed",
            "head_hidden",
        ):
            value = getattr(self, name)
            _check(value >= 0 and math.isfinite(value), f"{name} must be >= 0", value)
        _check(0 <= self.rotation <= 180, "rotation must be in [0, 180]", self.rotation)
        _check(
            0 <= self.policy_magnitude <= 30,
            "policy_magnitude must be in [0, 30]",
            self.policy_magnitude,
        )
        _check(0 <= self.erasing <= 1, "erasing must be in [0, 1]", self.erasing)
        _check(0 <= self.mixup <= 1000, "mixup must be in [0, 1000]", self.mixup)
        _check(0 <= self.cutmix <= 1000, "cutmix must be in [0, 1000]", self.cutmix)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    def from_scratch(self) -> "TrainConfig":
        """The same with random weights: for whoever only needs a network of this shape."""
        return dataclasses.replace(self, pretrained=False, weights="")

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "TrainConfig":
        """The config of these fields. Raises ConfigError if one is unknown or out of range.

        module.NAME is an argument of a LightningModule.
        """
        known = [each.name for each in dataclasses.fields(cls)]
        own = {name: value for name, value in values.items() if not name.startswith(ARGUMENT)}
        for name in own:
            if name not in known:
                raise ConfigError(unknown_name("field", name, known))
        arguments = {
            name.removeprefix(ARGUMENT): value
            for name, value in values.items()
            if name.startswith(ARGUMENT)
        }
        if arguments:
            own["module"] = {**own.get("module", {}), **arguments}
        return cls(**own)


def flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields with each argument of a LightningModule by itself, as module.NAME."""
    found = {name: value for name, value in fields.items() if name != "module"}
    arguments = fields.get("module", {})
    if not isinstance(arguments, Mapping):
        raise ConfigError(f"module holds arguments by name, module.NAME, got {arguments!r}")
    return found | {f"{ARGUMENT}{name}": value for name, value in arguments.items()}


def is_module(backbone: str) -> bool:
    """Whether the name is that of a LightningModule."""
    return backbone.startswith(MODULE)


def _checked_arguments(arguments: Any) -> dict[str, Argument]:
    for name, value in flat({"module": arguments}).items():
        _check(name.removeprefix(ARGUMENT).isidentifier(), "module.NAME needs a name", name)
        allowed = type(value) in (bool, int, float, str)
        finite = not isinstance(value, float) or math.isfinite(value)
        _check(allowed and finite, f"{name} must be true, false, a number or a word", value)
    return dict(arguments)


def _name(kind: Any) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number", str: "a word"}[kind]


def trains_on_features(config: TrainConfig) -> bool:
    """Whether each epoch would show the same pictures to the same frozen network."""
    changes = (
        config.flip, config.translate, config.rotation, config.cutout, config.erasing,
        config.policy != "none", config.mixup, config.cutmix,
    )  # fmt: skip
    # other people's networks may drop out where we don't see it
    known = ":" not in config.backbone or config.dropout == 0
    return config.trainable == "head" and known and not any(changes)


def check_balance(config: TrainConfig) -> None:
    """Raise ConfigError where SMOTE would have no features to work on."""
    if config.balance == "smote" and not trains_on_features(config):
        raise ConfigError(
            "balance smote needs features that stay the same: trainable = head, and nothing that "
            "changes pictures (flip, translate, rotation, cutout, policy, erasing, mixup, cutmix)"
        )


def _check(holds: bool, rule: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"{rule}, got {value}")


def _choice(name: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise ConfigError(unknown_name(name, value, known))
