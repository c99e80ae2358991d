"""Each field of regularisation and balance does something, or is refused."""

from typing import Any

import pytest
import torch

from trainer.config import ConfigError, TrainConfig
from trainer.data.dataset import ImageDataset, Split
from trainer.device import DevicePlan
from trainer.loop import train

CPU = DevicePlan(device="cpu")
CONFIG = TrainConfig(backbone="smallcnn", batch_size=8, epochs=1)


def one_batch() -> ImageDataset:
    """Eight images, five of one class."""
    images = torch.randint(256, (8, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    split = Split(images.to(torch.uint8), torch.tensor([0, 0, 0, 0, 0, 1, 1, 2]))
    return ImageDataset(
        name="few",
        train=split,
        val=split.take([]),
        class_names=("a", "b", "c"),
        mean=(0.5, 0.5, 0.5),
        std=(0.3, 0.3, 0.3),
        fingerprint="0" * 64,
        flips=True,
        open_test=lambda: split.take([]),
    )


def trained(**fields: Any) -> list[list[float]]:
    """The weights after as many steps as epochs."""
    config = TrainConfig.from_dict({**CONFIG.to_dict(), **fields})
    *_, report = train(config, one_batch(), CPU)
    return [each.detach().flatten().tolist() for each in report.state.model.parameters()]


CHANGES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {"mixup": 0.4}),
    ({}, {"cutmix": 1.0}),
    ({"mixup": 1.0}, {"mixup": 5.0}),
    ({}, {"erasing": 1.0}),
    ({}, {"policy": "trivialaugment"}),
    ({}, {"policy": "randaugment"}),
    ({"policy": "randaugment"}, {"policy": "randaugment", "policy_magnitude": 25}),
    ({}, {"balance": "loss"}),
    ({}, {"balance": "sampling"}),
    ({"trainable": "head"}, {"trainable": "head", "balance": "smote"}),
]


@pytest.mark.parametrize(("before", "after"), CHANGES)
def test_the_field_changes_one_step_of_training(
    before: dict[str, Any], after: dict[str, Any]
) -> None:
    assert trained(**after) == trained(**after)
    assert trained(**after) != trained(**before)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"mixup": -0.1}, r"mixup must be in \[0, 1000\], got -0.1"),
        ({"mixup": float("nan")}, "mixup must be in"),
        ({"cutmix": 1e9}, r"cutmix must be in \[0, 1000\]"),
        ({"erasing": 1.5}, r"erasing must be in \[0, 1\], got 1.5"),
        ({"policy": "autoaugment"}, "unknown policy 'autoaugment', did you mean randaugment"),
        ({"policy_magnitude": 31}, r"policy_magnitude must be in \[0, 30\], got 31"),
        ({"policy_magnitude": 2.5}, "policy_magnitude must be a whole number"),
        ({"balance": "adasyn"}, r"unknown balance 'adasyn' \(known: loss, none, sampling, smote\)"),
    ],
)
def test_what_is_out_of_range_is_refused_in_one_line(fields: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError, match=says) as refused:
        TrainConfig.from_dict(fields)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_momentum_is_ignored_by_no_optimizer(optimizer: Any) -> None:
    low, high = (trained(optimizer=optimizer, epochs=3, momentum=m) for m in (0.5, 0.8))
    assert low != high
