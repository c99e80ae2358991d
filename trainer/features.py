"""Head-only training: what the frozen network makes of each image is computed once and kept."""

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor, nn

from trainer.config import ConfigError
from trainer.data.dataset import ImageDataset, Split
from trainer.device import DevicePlan
from trainer.evaluate import classify
from trainer.heads import head_name

_MOST_KEPT = 8
"""Data sets of features that a process keeps: a backbone each, or a fold."""


class FeatureSplit(Split):
    """images: float32 (N,features,1,1), what the frozen network hands to its head."""

    def __post_init__(self) -> None:
        """They are no pictures, and made here."""


def as_features(
    model: nn.Module, data: ImageDataset, plan: DevicePlan, pulse: Callable[[], None]
) -> ImageDataset:
    """The data as features; its mean and std leave them as they are.

    The next trial of this process with the same frozen weights and data has them at once.
    """
    frozen = tuple(
        float(tensor.double().sum())
        for name, tensor in model.state_dict().items()
        if not name.startswith(head_name(model))
    )
    images = (data.fingerprint, data.train.images.data_ptr(), len(data.train), len(data.val))
    source = _Source(key=(plan, *images, *frozen), model=model, data=data, plan=plan, pulse=pulse)
    train, val = _features(source)
    num_features = train.shape[1]
    return dataclasses.replace(
        data,
        train=FeatureSplit(train, data.train.labels),
        val=FeatureSplit(val, data.val.labels),
        mean=(0.0,) * num_features,
        std=(1 / 255,) * num_features,
    )


def on_features(model: nn.Module) -> nn.Module:
    """The model's own head, and the dropout before it: (N,features,1,1) -> logits (N,classes)."""
    parent, _, _ = head_name(model).rpartition(".")
    siblings = model.get_submodule(parent).children()
    dropouts = [module for module in siblings if isinstance(module, nn.Dropout)]
    return nn.Sequential(nn.Flatten(), *dropouts, model.get_submodule(head_name(model)))


@dataclass(frozen=True, kw_only=True)
class _Source:
    """What features are made of; equal where they would be."""

    key: tuple[object, ...]
    model: nn.Module = field(compare=False)
    data: ImageDataset = field(compare=False)
    plan: DevicePlan = field(compare=False)
    pulse: Callable[[], None] = field(compare=False)


@functools.lru_cache(maxsize=_MOST_KEPT)
def _features(source: _Source) -> tuple[Tensor, Tensor]:
    """float32 (N,features,1,1) of the train and of the val images."""
    model, data = source.model, source.data
    name = head_name(model)
    head = model.get_submodule(name)
    model.set_submodule(name, nn.Identity())
    try:
        train, val = (
            classify(
                model, split.images, source.plan, mean=data.mean, std=data.std, pulse=source.pulse
            )
            if len(split)
            else None
            for split in (data.train, data.val)
        )
    finally:
        model.set_submodule(name, head)
    assert train is not None
    if train.ndim != 2:
        raise ConfigError(f"a head that takes {tuple(train.shape[1:])} can't be trained alone")
    val = train[:0] if val is None else val
    return train[:, :, None, None], val[:, :, None, None]
