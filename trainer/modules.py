"""A LightningModule of the user's own as the network: found, given its arguments, checked."""

import contextlib
import dataclasses
import functools
import importlib
import inspect
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from trainer.config import (
    ARGUMENT,
    MODULE,
    Argument,
    ConfigError,
    TrainConfig,
    is_module,
    unknown_name,
)
from trainer.foreign import ONE_STAGE, Backbone, Shape, imported, one_line, size_in_words
from trainer.seeds import own_randomness

DISTRIBUTIONS = {"lightning": "lightning.pytorch", "pytorch_lightning": "pytorch_lightning"}
"""Packages that a LightningModule may come from, and where each has its Trainer: two hierarchies of
classes, of which one's Trainer takes no module of the other."""
OURS = frozenset({
    "backbone", "module", "batch_size", "epochs", "patience", "flip", "translate", "rotation",
    "cutout", "policy", "policy_magnitude", "erasing", "balance", "seed",
})  # fmt: skip
"""Fields that count whether or not the class takes them: they decide batches, or when to end."""
_NEVER: Mapping[str, Sequence[Any]] = {
    "pretrained": (False,),
    "weights": ("",),
    "trainable": ("all",),
    "average": ("none",),
    "balance": ("none", "sampling"),
}
"""What of a field makes sense with somebody else's training_step, whatever the class takes."""
_UNLESS_TAKEN: Mapping[str, Any] = {
    "backbone_lr": 1.0,
    "head_hidden": 0,
    "mixup": 0.0,
    "cutmix": 0.0,
}
"""What is off where the class doesn't do it itself."""
_OFFERED = frozenset(each.name for each in dataclasses.fields(TrainConfig)) - {
    "backbone", "module", *_NEVER,
}  # fmt: skip
_SAYS_NOTHING = "_jit_is_scripting"
"""With it set, a module without a Trainer says that it has None, instead of raising."""
_CHOSEN_BY_DATA = frozenset({"epochs", "batch_size", "seed"})


@functools.cache
def find_class(what: str, name: str, kind: str) -> type[Any]:
    """The class lightning:package.module:Class, of Lightning's kind.

    what: stands before the name in messages. kind: LightningModule or LightningDataModule. Raises
    ConfigError if it can't be imported or is of no such kind.
    """
    try:
        found = imported(what, name, name.removeprefix(MODULE))
    except ConfigError as error:
        missing = error.__cause__
        named = missing.name or "" if isinstance(missing, ModuleNotFoundError) else ""
        if named.partition(".")[0] not in DISTRIBUTIONS:
            raise
        raise ConfigError(
            f"{what} {name} needs lightning: pip install 'hpo-vision[lightning]'"
        ) from error
    if not isinstance(found, type) or _distribution(found, kind) is None:
        raise ConfigError(f"{what} {name} is no {kind}")
    for package in DISTRIBUTIONS.values():  # tips and what hardware there is: once a trial
        logging.getLogger(package).setLevel(logging.WARNING)
    return found


def trainer_package(model: nn.Module) -> str:
    """Where the Trainer of this LightningModule is: lightning.pytorch or pytorch_lightning."""
    found = _distribution(type(model), "LightningModule")
    assert found is not None
    return found


def _distribution(found: type, kind: str) -> str | None:
    for base in found.__mro__:
        package = base.__module__.partition(".")[0]
        if base.__name__ == kind and package in DISTRIBUTIONS:
            return DISTRIBUTIONS[package]
    return None


def module_backbone(name: str) -> Backbone:
    """For what asks about any network. Raises ConfigError if there is no such LightningModule."""
    _find(name)

    def make(input_size: Shape, num_classes: int, dropout: float) -> nn.Module:
        config = TrainConfig(backbone=name, dropout=dropout)
        return build_module(config, input_size=input_size, num_classes=num_classes)

    return Backbone(make=make, stages=ONE_STAGE, min_side=1)


def build_module(config: TrainConfig, *, input_size: Shape, num_classes: int) -> nn.Module:
    """The config's LightningModule with random weights: (N,C,H,W) float -> (N,num_classes).

    Raises ConfigError if it doesn't take its arguments, or gives no such logits.
    """
    name = config.backbone
    given = _given(config, input_size, num_classes)
    with own_randomness("weights", config.seed):
        try:
            model = _find(name)(**given)
            model.configure_model()
        except Exception as error:  # whatever the user's class leads to
            raise ConfigError(f"backbone {name}: {one_line(error)}") from error
    _check_logits(name, model, input_size, num_classes)
    found: nn.Module = model
    return found


def check_module_fields(config: TrainConfig) -> None:
    """Raise ConfigError for what can't be had with somebody else's training_step."""
    name = config.backbone
    for field, allowed in _NEVER.items():
        if getattr(config, field) not in allowed:
            raise ConfigError(_no_use(field, getattr(config, field), name, f"{ARGUMENT}{field}"))
    for field, off in _UNLESS_TAKEN.items():
        if getattr(config, field) != off and not _takes(name, field):
            raise ConfigError(_no_use(field, getattr(config, field), name, field))


def _no_use(field: str, value: Any, name: str, argument: str) -> str:
    return (
        f"{field} = {value} can't be had with {name}, whose training_step is its own: leave it "
        f"out, or have the class do it, given {argument}"
    )


def idle_names(fields: Sequence[str], backbones: Sequence[str]) -> list[str]:
    """Those of the fields that none of the backbones is given; none beside one of ours."""
    if not all(map(is_module, backbones)):
        return []
    return [
        field
        for field in fields
        if field not in OURS | set(_NEVER)
        and not field.startswith(ARGUMENT)
        and not any(_takes(name, field) for name in backbones)
    ]


def own_defaults(name: str) -> dict[str, Any]:
    """Fields that the class takes with a default of its own, which the study is to keep.

    Where the field can't have that value, it stands as the argument module.NAME.
    """
    found: dict[str, Any] = {}
    for parameter in _parameters(name).values():
        if parameter.name not in _OFFERED - _CHOSEN_BY_DATA:
            continue
        default = parameter.default
        if default is parameter.empty or type(default) not in (bool, int, float, str):
            continue
        try:
            TrainConfig.from_dict({parameter.name: default})
        except ConfigError:
            found[f"{ARGUMENT}{parameter.name}"] = default
        else:
            found[parameter.name] = default
    return found


def _find(name: str) -> type[Any]:
    return find_class("backbone", name, "LightningModule")


def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    return inspect.signature(_find(name)).parameters


def _named(name: str) -> dict[str, inspect.Parameter]:
    """Those that can be given by name."""
    by_name = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    return {key: each for key, each in _parameters(name).items() if each.kind in by_name}


def _takes(name: str, field: str) -> bool:
    return field in _named(name)


def _given(config: TrainConfig, input_size: Shape, num_classes: int) -> dict[str, Any]:
    """What the class is called with. Raises ConfigError if it doesn't take all that it is to."""
    name, own = config.backbone, config.module
    named = _named(name)
    kinds = [each.kind for each in _parameters(name).values()]
    unknown = [argument for argument in own if argument not in named]
    if unknown and inspect.Parameter.VAR_KEYWORD not in kinds:
        known = unknown_name("argument", unknown[0], named)
        raise ConfigError(f"backbone {name}: {known}")
    offered: dict[str, Any] = {"num_classes": num_classes, "input_size": input_size}
    offered |= {field: getattr(config, field) for field in _OFFERED}
    given: dict[str, Argument | Any] = {key: offered[key] for key in named if key in offered}
    given |= own
    for key, parameter in named.items():
        if parameter.default is parameter.empty and key not in given:
            raise ConfigError(f"backbone {name} needs {key}: --set {ARGUMENT}{key}=VALUE")
    return given


def _check_logits(name: str, model: Any, input_size: Shape, num_classes: int) -> None:
    try:
        with kept_modes(model), torch.no_grad():
            logits = model.eval()(torch.zeros(2, *input_size))
    except Exception as error:  # whatever a network that we don't know leads to
        raise ConfigError(
            f"backbone {name} can't take {size_in_words(input_size)}: {one_line(error)}"
        ) from error
    shape = tuple(logits.shape) if isinstance(logits, torch.Tensor) else type(logits).__name__
    if shape != (2, num_classes):
        raise ConfigError(
            f"backbone {name}: forward gave {shape} for 2 images of {num_classes} classes, not "
            f"logits (2, {num_classes})"
        )


@contextlib.contextmanager
def kept_modes(model: nn.Module) -> Iterator[nn.Module]:
    """Each part is afterwards in the mode (training or not) that it was in: a user's may differ."""
    modes = [(each, each.training) for each in model.modules()]
    try:
        yield model
    finally:
        for each, training in modes:
            each.training = training


@contextlib.contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """For torch.jit.trace, which asks a LightningModule for a Trainer that it doesn't have."""
    asked = [each for each in model.modules() if hasattr(type(each), _SAYS_NOTHING)]
    for each in asked:
        setattr(each, _SAYS_NOTHING, True)
    try:
        yield
    finally:
        for each in asked:
            delattr(each, _SAYS_NOTHING)


def lightning_of(model: nn.Module) -> Any:
    """The package that the model's Trainer is in, imported."""
    return importlib.import_module(trainer_package(model))
