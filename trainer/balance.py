"""Classes of unequal size: images that weigh more, are drawn more often, or are made up."""

import dataclasses
from typing import Any

import torch
from torch import Tensor

from trainer.config import ConfigError, TrainConfig
from trainer.data.dataset import ImageDataset
from trainer.seeds import seeded_generator

_NUM_SEEDS = 2**32
"""That imbalanced-learn takes; those of folds are beyond."""


def loss_weights(config: TrainConfig, data: ImageDataset, device: str) -> Tensor | None:
    """What an image of each class weighs in the loss, on the device; None if all weigh the same."""
    if config.balance != "loss":
        return None
    return class_weights(data.train.labels, data.num_classes).to(device)


def class_weights(labels: Tensor, num_classes: int) -> Tensor:
    """float32 (num_classes,): the inverse of each class's size, so that images weigh 1 on average.

    labels: int64 (N,), of the images that are trained on. A class without images weighs 0.
    """
    counts = labels.bincount(minlength=num_classes)
    num_present = int((counts > 0).sum())
    weights = len(labels) / (num_present * counts.clamp(min=1).double())
    return weights.where(counts > 0, 0.0).float()


def balanced_order(seed: int, epoch: int, labels: Tensor) -> Tensor:
    """As many images as there are, int64 (N,): each of a class drawn evenly, then of that class.

    With replacement, anew in each epoch; classes without images are not drawn. labels: int64 (N,)
    on the CPU, of the images that are trained on.
    """
    generator = seeded_generator("order", seed, epoch)
    by_class, counts = labels.argsort(stable=True), labels.bincount()
    starts = counts.cumsum(0) - counts
    present = counts.nonzero()[:, 0]
    drawn = present[torch.randint(len(present), (len(labels),), generator=generator)]
    chance = torch.rand(len(labels), generator=generator, dtype=torch.float64)
    within = (chance * counts[drawn]).long()
    return by_class[starts[drawn] + within]


def imported_smote() -> Any:
    """imbalanced-learn's SMOTE. Raises ConfigError where it is missing."""
    try:
        from imblearn.over_sampling import SMOTE
    except ImportError as error:
        raise ConfigError(
            "balance smote needs imbalanced-learn: pip install 'hpo-vision[smote]'"
        ) from error
    return SMOTE


def with_smote(features: ImageDataset, *, seed: int) -> ImageDataset:
    """The features with all classes of the training images as large as the largest of them.

    SMOTE (Chawla et al. 2002), five neighbours or as many as the smallest class has; an image that
    is alone in its class is copied. The data's own come first, in their order. Raises ConfigError
    where imbalanced-learn is missing.
    """
    images, labels = features.train.images, features.train.labels
    counts = labels.bincount()
    alone = (counts[labels] == 1).nonzero()[:, 0]
    order = torch.cat([torch.arange(len(labels)), alone])
    images, labels = images[order], labels[order]
    smallest = int(counts[counts > 0].clamp(min=2).min())
    neighbours = min(5, smallest - 1)
    smote = imported_smote()(k_neighbors=neighbours, random_state=seed % _NUM_SEEDS)
    made, of_class = smote.fit_resample(images.flatten(1).numpy(), labels.numpy())
    train = type(features.train)(
        torch.from_numpy(made).view(len(made), *images.shape[1:]), torch.from_numpy(of_class)
    )
    return dataclasses.replace(features, train=train)
