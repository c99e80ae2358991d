"""Split and ImageDataset: labelled images, in memory or mapped, with a fixed train, val, test."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.config import DataError
from trainer.data.findings import NOTHING_FOUND, Findings
from trainer.data.mapped import join

_SHA256 = re.compile(r"[0-9a-f]{64}")
_COUNTED_BYTES = 2**22
"""Of images, at once."""


@dataclass(frozen=True, eq=False)
class Split:
    """Images and their labels. Raises DataError if shapes or types are others than said."""

    images: Tensor
    """uint8 (N,C,H,W); N may be 0."""
    labels: Tensor
    """int64 (N,)."""

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        _check(
            images.dtype == torch.uint8 and images.ndim == 4 and min(images.shape[1:]) > 0,
            f"images must be uint8 (N,C,H,W), got {images.dtype} {tuple(images.shape)}",
        )
        _check(
            labels.dtype == torch.int64 and labels.shape == images.shape[:1],
            f"labels must be int64 ({len(images)},), got {labels.dtype} {tuple(labels.shape)}",
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        return f"Split(images={tuple(self.images.shape)})"

    def take(self, indices: Sequence[int] | Tensor) -> "Split":
        """The images at these indices, in their order: a copy."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        return Split(self.images[chosen], self.labels[chosen])


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageDataset:
    """Labelled images of one size. Raises DataError if its parts don't fit together."""

    name: str
    train: Split
    val: Split
    """Drawn from the training images by the study's seed; empty when all are trained on."""
    class_names: tuple[str, ...]
    """Label i is class_names[i]."""
    mean: tuple[float, ...]
    """Of the train images / 255, a channel."""
    std: tuple[float, ...]
    """Of the train images / 255, a channel; at least 1/255."""
    fingerprint: str
    """sha256 of what the source holds (64 hex digits): the same for each seed and machine."""
    flips: bool
    """Whether a picture mirrored left to right keeps its label."""
    open_test: Callable[[], Split]
    """Reads the test split, which is read nowhere else."""
    findings: Findings = NOTHING_FOUND
    """What is odd in the source's pictures."""
    groups: Tensor | None = None
    """int64, of the train and then of the val images: those of one number are the same picture, or
    nearly. None where nobody has looked."""
    kept_in: str | None = None
    """The folder of the cache that holds the images of train and then of val, in one file."""

    def __post_init__(self) -> None:
        _check(len(self.train) > 0, f"{self.name}: no training images")
        _check(
            len(set(self.class_names)) == len(self.class_names) >= 2,
            f"{self.name}: at least two different classes are needed, got {self.class_names}",
        )
        for name in self.class_names:  # a folder's name in other bytes than UTF-8
            _check(
                not any("\ud800" <= character <= "\udfff" for character in name),
                f"{self.name}: the class name {name!a} is no text in UTF-8: give it another",
            )
        for split in (self.train, self.val):
            check_split(split, self.input_size, self.num_classes)
        num_images = len(self.train) + len(self.val)
        _check(
            self.groups is None or self.groups.shape == (num_images,),
            f"{self.name}: a group is needed for each of {num_images} images",
        )
        channels = self.input_size[0]
        _check(
            len(self.mean) == len(self.std) == channels and min(self.std) > 0,
            f"{self.name}: mean and std > 0 are needed for each of {channels} channels",
        )
        _check(
            _SHA256.fullmatch(self.fingerprint) is not None,
            f"{self.name}: the fingerprint must be 64 hex digits, got {self.fingerprint!r}",
        )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def input_size(self) -> tuple[int, int, int]:
        """(C,H,W)."""
        channels, height, width = self.train.images.shape[1:]
        return channels, height, width

    def with_validation_in_training(self) -> "ImageDataset":
        """The same data with train + val to train on and no images in val.

        Images that lie one after the other in a mapped file are not copied.
        """
        images = join(self.train.images, self.val.images)
        labels = torch.cat([self.train.labels, self.val.labels])
        mean, std = channel_statistics(images)
        train = Split(images, labels)
        return dataclasses.replace(
            self, train=train, val=train.take([]), mean=mean, std=std, kept_in=None
        )


def check_split(split: Split, input_size: tuple[int, int, int], num_classes: int) -> Split:
    """The split itself. Raises DataError if its images or labels are others than said."""
    size = tuple(split.images.shape[1:])
    _check(size == input_size, f"images of one data set must be {input_size}, got {size}")
    if len(split):
        lowest, highest = int(split.labels.min()), int(split.labels.max())
        _check(
            0 <= lowest and highest < num_classes,
            f"labels must be in 0..{num_classes - 1}, got {lowest}..{highest}",
        )
    return split


def channel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of images / 255, images: uint8 (N,C,H,W).

    Counted in whole numbers, so that every machine gets the same. A constant channel has the std
    1/255: it is divided by.
    """
    channels = images.shape[1]
    counts = torch.zeros(channels, 256, dtype=torch.int64)
    size = max(1, _COUNTED_BYTES // images[0].nbytes)
    for start in range(0, len(images), size):
        for channel, pixels in enumerate(images[start : start + size].unbind(1)):
            counts[channel] += torch.bincount(pixels.flatten(), minlength=256)
    mean, std = [], []
    for row in counts.tolist():
        number = sum(row)
        total = sum(n * v for v, n in enumerate(row))
        squares = sum(n * v * v for v, n in enumerate(row))
        variance = (number * squares - total * total) / number**2
        mean.append(total / number / 255)
        std.append(max(variance**0.5, 1.0) / 255)
    return tuple(mean), tuple(std)


def fingerprint(split: Split, class_names: Sequence[str]) -> str:
    """sha256 of shape, pixels, labels and class names: the same on every machine."""
    digest = hashlib.sha256()
    header = {"shape": list(split.images.shape), "class_names": list(class_names)}
    digest.update(json.dumps(header, sort_keys=True).encode())
    digest.update(split.images.contiguous().numpy().data)
    digest.update(split.labels.numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def _check(holds: bool, message: str) -> None:
    if not holds:
        raise DataError(message)
