"""Data in K parts: each validates once, nothing is copied K times, copies stay together."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import ConfigError, DataError
from trainer.data.dataset import ImageDataset, Split, channel_statistics
from trainer.data.folds import cut_folds, fold_parts
from trainer.data.splits import draw_parts

_LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=120).map(torch.tensor)


def numbered(
    labels: list[int], *, num_val: int = 3, groups: list[int] | None = None
) -> ImageDataset:
    """Images of one pixel, which is the image's number; the last ones are for validation."""
    pixels = torch.arange(len(labels), dtype=torch.uint8).view(-1, 1, 1, 1)
    whole = Split(pixels, torch.tensor(labels))

    def open_test() -> Split:
        raise AssertionError("folds have nothing to do with the test split")

    return ImageDataset(
        name="numbers",
        train=whole.take(range(len(labels) - num_val)),
        val=whole.take(range(len(labels) - num_val, len(labels))),
        class_names=tuple("abcdef"[: max(labels) + 1]),
        mean=(0.5,),
        std=(0.5,),
        fingerprint="0" * 64,
        flips=False,
        open_test=open_test,
        groups=None if groups is None else torch.tensor(groups),
    )


def numbers(split: Split) -> list[int]:
    return [int(pixel) for pixel in split.images.flatten()]


@given(labels=_LABELS, num_parts=st.integers(2, 20), seed=st.integers(0, 2**256 - 1))
def test_parts_hold_each_image_once_and_as_many_of_each_class(
    labels: torch.Tensor, num_parts: int, seed: int
) -> None:
    parts = draw_parts(labels, num_parts, seed)
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    sizes = [len(part) for part in parts]
    assert max(sizes) - min(sizes) <= 1
    for label in set(labels.tolist()):
        counts = [Counter(labels[part].tolist())[label] for part in parts]
        assert max(counts) - min(counts) <= 1


@given(
    images=st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), min_size=1, max_size=120),
    num_parts=st.integers(2, 6),
    seed=st.integers(0, 2**64),
)
def test_a_group_is_never_in_two_parts(
    images: list[tuple[int, int]], num_parts: int, seed: int
) -> None:
    labels, groups = (torch.tensor(each) for each in zip(*images, strict=True))
    parts = draw_parts(labels, num_parts, seed, groups.numpy())
    assert sorted(torch.cat(parts).tolist()) == list(range(len(labels)))
    found = [group for part in parts for group in set(groups[part].tolist())]
    assert len(found) == len(set(found))


def test_the_same_number_draws_the_same_parts_for_ever() -> None:
    labels = torch.arange(12) % 2
    first, second, third = draw_parts(labels, 3, 0)
    assert first.tolist() == [0, 2, 7, 11]
    assert second.tolist() == [3, 4, 5, 8]
    assert third.tolist() == [1, 6, 9, 10]


def test_each_image_validates_once_and_is_trained_on_else() -> None:
    labels = [0, 1, 2] * 10 + [1]
    data = numbered(labels)
    folds = cut_folds(data, 4, seed=3)
    everything = list(range(31))
    assert sorted(number for fold in folds for number in numbers(fold.val)) == everything
    for fold in folds:
        assert sorted(numbers(fold.train) + numbers(fold.val)) == everything
        for split in (fold.train, fold.val):
            assert split.labels.tolist() == [labels[number] for number in numbers(split)]
        assert (fold.mean, fold.std) == channel_statistics(fold.train.images)
        assert fold.fingerprint == data.fingerprint


def test_the_folds_share_one_tensor_of_less_than_twice_the_images() -> None:
    folds = cut_folds(numbered([0, 1] * 20), 5, seed=0)
    views = [split.images for fold in folds for split in (fold.train, fold.val)]
    assert len({view.untyped_storage().data_ptr() for view in views}) == 1
    assert views[0].untyped_storage().nbytes() == 40 + 32
    assert all(view.is_contiguous() for view in views)


def test_another_seed_cuts_elsewhere() -> None:
    data = numbered([0, 1] * 20)
    first, again, other = (cut_folds(data, 4, seed) for seed in (0, 0, 1))
    assert [numbers(fold.val) for fold in first] == [numbers(fold.val) for fold in again]
    assert [numbers(fold.val) for fold in first] != [numbers(fold.val) for fold in other]


def test_copies_of_a_picture_validate_together() -> None:
    groups = [0, 0, 0, 3, 4, 5, 6, 7, 8, 9, 10, 3]
    data = numbered([0, 0, 0, 1, 0, 1, 0, 1, 0, 1, 0, 1], groups=groups)
    for fold in cut_folds(data, 3, seed=1):
        trained, checked = ({groups[n] for n in numbers(each)} for each in (fold.train, fold.val))
        assert not trained & checked


@pytest.mark.parametrize(
    ("groups", "num_images"), [(None, 3), ([0, 0, *range(2, 7)], 2), ([7] * 7, 1)]
)
def test_a_class_of_too_few_different_images_is_refused_by_name(
    groups: list[int] | None, num_images: int
) -> None:
    data = numbered([0, 0, 0, 1, 1, 1, 1], groups=groups)
    with pytest.raises(ConfigError, match=f"--folds 4 needs 4 .* numbers has {num_images} of 'a'"):
        fold_parts(data, 4, seed=0)


def test_a_class_of_just_enough_images_is_in_each_part() -> None:
    data = numbered([0, 0, 0, 1, 1, 1, 1])
    for fold in cut_folds(data, 3, seed=0):
        assert np.bincount(fold.val.labels.numpy()).tolist()[0] == 1


def test_groups_of_another_number_of_images_are_refused() -> None:
    with pytest.raises(DataError, match="a group is needed for each of 7 images"):
        dataclasses.replace(numbered([0, 0, 0, 1, 1, 1, 1]), groups=torch.arange(6))
