"""Split and ImageDataset: what they accept, and what they compute."""

import dataclasses

import pytest
import torch

from trainer.config import DataError
from trainer.data.dataset import (
    ImageDataset,
    Split,
    channel_statistics,
    check_split,
    fingerprint,
)


def _split(num_images: int, *, channels: int = 3, seed: int = 0) -> Split:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(
        0, 256, (num_images, channels, 5, 4), dtype=torch.uint8, generator=generator
    )
    return Split(images, torch.arange(num_images) % 2)


def _dataset() -> ImageDataset:
    train = _split(10)
    mean, std = channel_statistics(train.images)
    return ImageDataset(
        name="made",
        train=train,
        val=_split(4, seed=1),
        class_names=("cat", "dog"),
        mean=mean,
        std=std,
        fingerprint="0" * 64,
        flips=True,
        open_test=lambda: _split(3, seed=2),
    )


@pytest.mark.parametrize(
    ("images", "labels"),
    [
        (torch.zeros(2, 1, 3, 3), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 3, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64)),
        (torch.zeros(2, 1, 3, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int32)),
        (torch.zeros(2, 0, 3, 3, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64)),
    ],
)
def test_a_split_of_other_shapes_or_types_is_refused(
    images: torch.Tensor, labels: torch.Tensor
) -> None:
    with pytest.raises(DataError, match="must be"):
        Split(images, labels)


def test_a_split_has_the_length_of_its_labels_and_may_be_empty() -> None:
    assert len(_split(7)) == 7
    assert len(_split(7).take([])) == 0


def test_taken_images_keep_their_labels() -> None:
    split = _split(6)
    taken = split.take([5, 2])
    assert torch.equal(taken.images, split.images[[5, 2]])
    assert taken.labels.tolist() == [1, 0]


def test_a_dataset_knows_its_size_and_its_classes() -> None:
    data = _dataset()
    assert data.input_size == (3, 5, 4)
    assert data.num_classes == 2


def test_a_dataset_whose_parts_do_not_fit_together_is_refused() -> None:
    data = _dataset()
    with pytest.raises(DataError, match="must be"):
        dataclasses.replace(data, val=_split(4, channels=1))
    with pytest.raises(DataError, match="no training images"):
        dataclasses.replace(data, train=data.train.take([]))
    with pytest.raises(DataError, match="different classes"):
        dataclasses.replace(data, class_names=("cat", "cat"))
    with pytest.raises(DataError, match=r"the class name 'caf\\udce9' is no text in UTF-8"):
        dataclasses.replace(data, class_names=("cat", "caf\udce9"))
    with pytest.raises(DataError, match=r"0\.\.1, got 0\.\.2"):
        dataclasses.replace(data, val=Split(data.val.images, torch.tensor([0, 1, 2, 1])))
    with pytest.raises(DataError, match="3 channels"):
        dataclasses.replace(data, mean=(0.5,))
    with pytest.raises(DataError, match="64 hex digits"):
        dataclasses.replace(data, fingerprint="none")


def test_validation_joins_training_for_the_last_run() -> None:
    data = _dataset()
    whole = data.with_validation_in_training()
    assert len(whole.train) == 14
    assert len(whole.val) == 0
    assert torch.equal(whole.train.images[:10], data.train.images)
    assert torch.equal(whole.train.labels[10:], data.val.labels)
    assert (whole.mean, whole.std) == channel_statistics(whole.train.images)
    assert whole.mean != data.mean
    assert whole.fingerprint == data.fingerprint


def test_mean_and_std_are_those_of_the_values_between_0_and_1() -> None:
    images = _split(300).images
    mean, std = channel_statistics(images)
    values = images.double() / 255
    assert mean == pytest.approx(values.mean(dim=(0, 2, 3)).tolist(), abs=1e-12)
    assert std == pytest.approx(values.std(dim=(0, 2, 3), correction=0).tolist(), abs=1e-12)


def test_a_constant_channel_can_be_divided_by_its_std() -> None:
    assert channel_statistics(torch.full((3, 1, 2, 2), 51, dtype=torch.uint8)) == (
        (0.2,),
        (1 / 255,),
    )


def test_the_fingerprint_is_that_of_shape_pixels_labels_and_class_names() -> None:
    split = Split(torch.arange(8, dtype=torch.uint8).reshape(2, 1, 2, 2), torch.tensor([0, 1]))
    names = ("a", "b")
    assert fingerprint(split, names).startswith("ac1e13a73014e53a")
    others = [
        fingerprint(Split(split.images.reshape(2, 1, 1, 4), split.labels), names),
        fingerprint(Split(split.images + 1, split.labels), names),
        fingerprint(Split(split.images, split.labels.flip(0)), names),
        fingerprint(split, ("a", "c")),
    ]
    assert len({fingerprint(split, names), *others}) == 5


def test_the_fingerprint_sees_values_and_not_how_they_lie_in_memory() -> None:
    split = _split(6)
    strided = Split(split.images.to(memory_format=torch.channels_last), split.labels)
    assert fingerprint(strided, ("a", "b")) == fingerprint(split, ("a", "b"))


def test_a_checked_split_is_handed_through() -> None:
    split = _split(3)
    assert check_split(split, (3, 5, 4), 2) is split
    with pytest.raises(DataError, match=r"\(3, 5, 4\)"):
        check_split(split, (1, 8, 8), 2)
