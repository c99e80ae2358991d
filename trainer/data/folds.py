"""Folds: data cut into K parts, each of which validates what is trained on the others."""

import dataclasses
import itertools

import torch

from trainer.config import ConfigError
from trainer.data.dataset import ImageDataset, Split, channel_statistics
from trainer.data.mapped import join
from trainer.data.splits import draw_parts


def fold_parts(data: ImageDataset, num_folds: int, seed: int) -> list[torch.Tensor]:
    """Indices of each part into the train and then the val images; the seed draws them.

    Stratified; images of one group (the same picture, or nearly) are in one part. Raises
    ConfigError if a class has fewer images, of different groups, than there are to be parts.
    """
    labels = torch.cat([data.train.labels, data.val.labels])
    groups = torch.arange(len(labels)) if data.groups is None else data.groups
    for label, name in enumerate(data.class_names):
        num_images = len(set(groups[labels == label].tolist()))
        if num_images < num_folds:
            raise ConfigError(
                f"--folds {num_folds} needs {num_folds} different images of each class outside the "
                f"test split, and {data.name} has {num_images} of {name!r}: take fewer folds, or "
                "leave --folds out"
            )
    return draw_parts(labels, num_folds, seed, None if data.groups is None else groups.numpy())


def cut_folds(
    data: ImageDataset, num_folds: int, seed: int, *, device: str = "cpu"
) -> tuple[ImageDataset, ...]:
    """A data set a fold: part i is val, the others are train; mean and std are those of train.

    Their images are views of one tensor on the device, about twice as large as all images: the
    parts in their order, and again all but the last, so that what is left of a part's end is what
    is left out of it. The test split is not touched. Raises ConfigError as fold_parts does.
    """
    parts = fold_parts(data, num_folds, seed)
    order = torch.cat([*parts, *parts[:-1]])
    images = join(data.train.images, data.val.images).index_select(0, order)
    labels = torch.cat([data.train.labels, data.val.labels])[order]
    placed = Split(images.to(device), labels.to(device))
    num_images = sum(map(len, parts))
    ends = itertools.accumulate(map(len, parts))
    folds = []
    for part, end in zip(parts, ends, strict=True):
        val, train = slice(end - len(part), end), slice(end, end + num_images - len(part))
        mean, std = channel_statistics(images[train])
        fold = dataclasses.replace(
            data,
            train=Split(placed.images[train], placed.labels[train]),
            val=Split(placed.images[val], placed.labels[val]),
            mean=mean,
            std=std,
            groups=None,
        )
        folds.append(fold)
    return tuple(folds)
