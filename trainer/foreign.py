"""What a backbone is, and those that are not ours: timm's, and a user's own function."""

import difflib
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from trainer.config import ConfigError
from trainer.heads import head_name

Shape = tuple[int, int, int]
Maker = Callable[[Shape, int, float], nn.Module]
"""(C,H,W), number of classes, dropout -> network with random weights."""


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """How a network is made, the least side of an image in pixels, its published weights."""

    make: Maker
    stages: tuple[tuple[str, ...], ...]
    """Names of the modules of each stage, from the image to the head: a stage ends where the
    picture gets smaller."""
    min_side: int = 8
    weights: Callable[[], Any] | None = None
    """Gives what torchvision's WeightsEnum has: url, get_state_dict, transforms."""


ONE_STAGE: tuple[tuple[str, ...], ...] = ((),)
"""All but the head: a part of a network that we don't know can't be trained."""


@functools.cache
def own_backbone(name: str) -> Backbone:
    """A user's own: `package.module:function`, called with input_size, num_classes and dropout.

    It returns a network, (N,C,H,W) float -> logits (N,num_classes), that ends in a linear layer.
    Raises ConfigError if there is no such function.
    """
    found = imported("backbone", name, name)
    if not callable(found):
        raise ConfigError(f"backbone {name} is no function")

    def make(input_size: Shape, num_classes: int, dropout: float) -> nn.Module:
        try:
            model = found(input_size=input_size, num_classes=num_classes, dropout=dropout)
        except Exception as error:  # whatever the user's function leads to
            raise ConfigError(f"backbone {name}: {one_line(error)}") from error
        return _checked(name, model, input_size, num_classes)

    return Backbone(make=make, stages=ONE_STAGE, min_side=1)


@functools.cache
def timm_backbone(name: str) -> Backbone:
    """One of timm's networks, with timm's weights if pretrained. Raises ConfigError."""
    try:
        import timm
    except ImportError as error:
        raise ConfigError(
            f"backbone timm:{name} needs timm: pip install 'hpo-vision[timm]'"
        ) from error
    if not timm.is_model(name):
        nearest = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=3))
        raise ConfigError(f"timm has no {name!r}, did you mean {nearest or 'another name'}?")

    def make(input_size: Shape, num_classes: int, dropout: float) -> nn.Module:
        given: dict[str, Any] = {"num_classes": num_classes, "in_chans": input_size[0]}
        given["drop_rate"] = dropout
        try:
            model = timm.create_model(name, pretrained=False, **given)
        except Exception as error:  # each of timm's networks has rules of its own
            raise ConfigError(f"backbone timm:{name}: {one_line(error)}") from error
        return _checked(f"timm:{name}", model, input_size, num_classes)

    return Backbone(make=make, stages=ONE_STAGE, min_side=1, weights=lambda: TimmWeights(name))


class TimmWeights:
    """timm's published weights of a network, as torchvision describes its own."""

    def __init__(self, name: str) -> None:
        self._name = name

    @property
    def url(self) -> str:
        """For messages."""
        return f"timm/{self._name}"

    def get_state_dict(self, **_: Any) -> dict[str, torch.Tensor]:
        """Downloaded unless it is there. Raises OSError if it can't be."""
        import timm

        tensors: dict[str, torch.Tensor] = timm.create_model(
            self._name, pretrained=True
        ).state_dict()
        return tensors

    def transforms(self) -> "_Fed":
        """The mean and std of its images."""
        import timm

        found = timm.get_pretrained_cfg(self._name)
        assert found is not None
        return _Fed(mean=tuple(found.mean), std=tuple(found.std))


@dataclass(frozen=True, kw_only=True)
class _Fed:
    mean: tuple[float, ...]
    std: tuple[float, ...]


def _checked(name: str, model: Any, input_size: Shape, num_classes: int) -> nn.Module:
    """The model, if it takes such images and gives such logits. Raises ConfigError."""
    if not isinstance(model, nn.Module):
        raise ConfigError(f"backbone {name} gave {type(model).__name__}, not a torch.nn.Module")
    was_training = model.training
    try:
        head_name(model)
        with torch.no_grad():
            shape = tuple(model.eval()(torch.zeros(2, *input_size)).shape)
    except Exception as error:  # whatever a network that we don't know leads to
        raise ConfigError(
            f"backbone {name} can't take {size_in_words(input_size)}: {one_line(error)}"
        ) from error
    if shape != (2, num_classes):
        raise ConfigError(f"backbone {name} gave {shape} for 2 images of {num_classes} classes")
    return model.train(was_training)


def imported(what: str, name: str, place: str) -> Any:
    """What stands at package.module:name. what, name: for messages. Raises ConfigError."""
    module_name, _, own_name = place.partition(":")
    try:
        return getattr(importlib.import_module(module_name), own_name)
    except Exception as error:  # whatever the user's module leads to
        raise ConfigError(
            f"{what} {name}: {one_line(error)}; launch in its folder, or put that into PYTHONPATH"
        ) from error


def one_line(error: BaseException) -> str:
    """What other people's code raised, short."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


def size_in_words(input_size: Shape) -> str:
    """(C,H,W) for messages."""
    return "images of " + "x".join(map(str, input_size))
