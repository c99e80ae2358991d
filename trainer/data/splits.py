"""Stratified splits, drawn by a number alone, and a data set made of them."""

from collections import Counter
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.config import DataError
from trainer.data.dataset import ImageDataset, Split, channel_statistics, check_split
from trainer.data.findings import NOTHING_FOUND, Findings

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
TEST_SHARE = 0.2
"""Of a source without an official test split."""


def validation_share(num_images: int) -> float:
    """What part of that many training images is kept for validation."""
    return 0.1 if num_images >= 20_000 else 0.2


def draw(
    labels: Tensor, share: float, seed: int, groups: NDArray[np.int64] | None = None
) -> tuple[Tensor, Tensor]:
    """Indices of the rest and of the drawn images, each in rising order. labels: int64 (N,).

    Every class gives its share (largest remainder), and has an image on each side if it has two.
    The order is that of PCG64's raw numbers, whose stream numpy never changes. groups: (N,),
    images of the same number stay together; a group is drawn where all of it still fits into
    what its classes give, so a class may give less than its share.
    """
    classes = labels.numpy()
    left = _quotas(np.bincount(classes), share)
    drawn = np.zeros(len(classes), dtype=bool)
    for members in _shuffled_groups(len(classes), seed, groups):
        wanted = Counter(classes[members].tolist())
        if all(left[label] >= number for label, number in wanted.items()):
            drawn[members] = True
            for label, number in wanted.items():
                left[label] -= number
    return torch.from_numpy(np.flatnonzero(~drawn)), torch.from_numpy(np.flatnonzero(drawn))


def draw_parts(
    labels: Tensor, num_parts: int, seed: int, groups: NDArray[np.int64] | None = None
) -> list[Tensor]:
    """Indices of each of num_parts parts that hold all images once, each in rising order.

    labels: int64 (N,). Each class, and all images together, are shared out evenly: numbers differ
    by one at most. groups: (N,), images of the same number stay together, the largest groups are
    dealt first. The order is that of PCG64's raw numbers, as for draw.
    """
    classes = labels.numpy()
    held = np.zeros((num_parts, int(classes.max(initial=0)) + 1), dtype=np.int64)
    part_of = np.empty(len(classes), dtype=np.int64)
    dealt = sorted(
        _shuffled_groups(len(classes), seed, groups), key=lambda m: (-len(m), classes[m[0]])
    )
    for members in dealt:
        alike = held[:, classes[members]].sum(axis=1)
        part = int(np.lexsort((held.sum(axis=1), alike))[0])
        part_of[members] = part
        np.add.at(held[part], classes[members], 1)
    return [torch.from_numpy(np.flatnonzero(part_of == part)) for part in range(num_parts)]


def draw_test(
    labels: Tensor, fingerprint: str, groups: NDArray[np.int64] | None = None
) -> tuple[Tensor, Tensor]:
    """Indices for training and for the test split, which the fingerprint alone decides."""
    return draw(labels, TEST_SHARE, int(fingerprint, 16), groups)


def make_dataset(
    *,
    name: str,
    training: Split,
    class_names: tuple[str, ...],
    fingerprint: str,
    flips: bool,
    open_test: Callable[[], Split],
    seed: int,
    val: Split | None = None,
    findings: Findings = NOTHING_FOUND,
    statistics: Statistics | None = None,
) -> ImageDataset:
    """The data set of a source; without a val of its own it is drawn from training by the seed.

    statistics: channel_statistics of the training images, if they are known. Raises DataError if
    there is nothing to draw, or the parts don't fit together.
    """
    train = training
    if val is None:
        share = validation_share(len(training))
        rest, drawn = draw(training.labels, share, seed)
        train, val = training.take(rest), training.take(drawn)
    if not len(train) or not len(val):
        raise DataError(f"{name}: too few images for training and validation ({len(training)})")
    mean, std = channel_statistics(train.images) if statistics is None else statistics

    def read_test() -> Split:
        test = check_split(open_test(), data.input_size, data.num_classes)
        if not len(test):
            raise DataError(f"{name}: the test split has no images")
        return test

    data = ImageDataset(
        name=name,
        train=train,
        val=val,
        class_names=class_names,
        mean=mean,
        std=std,
        fingerprint=fingerprint,
        flips=flips,
        open_test=read_test,
        findings=findings,
    )
    return data


def _shuffled_groups(
    num_images: int, seed: int, groups: NDArray[np.int64] | None
) -> list[list[int]]:
    """The indices of each group, in the order of drawing; without groups each is alone."""
    order = np.argsort(np.random.PCG64(seed).random_raw(num_images), kind="stable")
    together: dict[int, list[int]] = {}
    for index in order.tolist():
        together.setdefault(index if groups is None else int(groups[index]), []).append(index)
    return list(together.values())


def _quotas(counts: "np.ndarray[tuple[int], np.dtype[np.int64]]", share: float) -> list[int]:
    exact = counts * share
    quotas = np.floor(exact).astype(np.int64)
    missing = round(float(share * counts.sum())) - int(quotas.sum())
    largest_first = np.argsort(quotas - exact, kind="stable")
    quotas[largest_first[: max(missing, 0)]] += 1
    low = np.minimum(1, counts // 2)
    return [int(quota) for quota in np.clip(quotas, low, np.maximum(counts - 1, 0))]
