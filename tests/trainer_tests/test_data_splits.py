"""Stratified splits: every class keeps its share, and a number alone decides who is drawn."""

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.config import DataError
from trainer.data.dataset import Split
from trainer.data.splits import draw, draw_test, make_dataset, validation_share

_LABELS = st.lists(st.integers(0, 5), min_size=1, max_size=200).map(torch.tensor)


@given(labels=_LABELS, share=st.floats(0.01, 0.99), seed=st.integers(0, 2**256 - 1))
def test_each_image_is_on_one_side_and_each_class_keeps_its_share(
    labels: torch.Tensor, share: float, seed: int
) -> None:
    rest, drawn = draw(labels, share, seed)
    assert sorted(rest.tolist() + drawn.tolist()) == list(range(len(labels)))
    taken = Counter(labels[drawn].tolist())
    for label, count in Counter(labels.tolist()).items():
        assert abs(taken[label] - share * count) < 1 or taken[label] in (0, 1, count - 1)
        assert taken[label] < count
        assert taken[label] >= 1 or count == 1


def test_the_drawn_number_is_exact_where_no_class_is_tiny() -> None:
    labels = torch.arange(1000) % 7
    assert len(draw(labels, 0.2, 0)[1]) == 200


def test_the_same_number_draws_the_same_images_for_ever() -> None:
    labels = torch.arange(20) % 2
    assert draw(labels, 0.2, 0)[1].tolist() == [2, 3, 11, 18]


def test_another_number_draws_others() -> None:
    labels = torch.arange(1000) % 7
    assert draw(labels, 0.2, 0)[1].tolist() != draw(labels, 0.2, 1)[1].tolist()


def test_the_order_of_drawing_does_not_depend_on_torch_or_numpy_seeds() -> None:
    labels = torch.arange(1000) % 7
    torch.manual_seed(1)
    first = draw_test(labels, "ab" * 32)[1].tolist()
    torch.manual_seed(2)
    assert draw_test(labels, "ab" * 32)[1].tolist() == first


def test_large_data_keeps_a_tenth_for_validation_and_small_data_a_fifth() -> None:
    assert validation_share(20_000) == 0.1
    assert validation_share(19_999) == 0.2


def _training(labels: list[int]) -> Split:
    return Split(
        torch.zeros(len(labels), 1, 4, 4, dtype=torch.uint8),
        torch.tensor(labels, dtype=torch.int64),
    )


def test_too_few_images_for_validation_are_refused() -> None:
    with pytest.raises(DataError, match="too few"):
        make_dataset(
            name="tiny",
            training=_training([0, 1]),
            class_names=("a", "b"),
            fingerprint="0" * 64,
            flips=True,
            open_test=lambda: _training([0]),
            seed=0,
        )


@pytest.mark.parametrize("test", [_training([]), _training([2])])
def test_a_test_split_that_does_not_fit_is_refused_when_it_is_opened(test: Split) -> None:
    data = make_dataset(
        name="made",
        training=_training([0, 0, 1, 1]),
        class_names=("a", "b"),
        fingerprint="0" * 64,
        flips=True,
        open_test=lambda: test,
        seed=0,
    )
    with pytest.raises(DataError):
        data.open_test()
