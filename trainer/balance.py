"""Classes of unequal size: images that weigh more, or are drawn more often.

Oversampling in feature space (SMOTE) belongs to the training of a head alone, and not here.
"""

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.data.dataset import ImageDataset
from trainer.seeds import seeded_generator


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
