"""Every backbone, optimizer and schedule: a training cut in two is the one that never stopped."""

import itertools
from typing import Any, get_args

import pytest
import torch

from trainer.backbones import BACKBONES
from trainer.config import Optimizer, Schedule, TrainConfig
from trainer.data.dataset import ImageDataset, Split
from trainer.device import DevicePlan
from trainer.loop import train
from trainer.state import TrainState

OPTIMIZERS: tuple[str, ...] = get_args(Optimizer)
SCHEDULES: tuple[str, ...] = get_args(Schedule)
CASES = [
    (backbone, OPTIMIZERS[(row + column) % len(OPTIMIZERS)], schedule)
    for row, backbone in enumerate(BACKBONES)
    for column, schedule in enumerate(SCHEDULES)
]
PLAN = DevicePlan(device="cpu", channels_last=True)
NUM_IMAGES = 32
LARGE = ("resnet18", "resnet50", "convnext_tiny")
"""Two epochs of two batches, cut after the first and within the second; the others have one of
eight, cut at its quarter and within the rest."""


def random_data(side: int) -> ImageDataset:
    """Grey noise in three classes, 32 images to train on, 8 to validate."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (NUM_IMAGES + 8, 1, side, side), generator=generator)
    everything = Split(images.to(torch.uint8), torch.arange(NUM_IMAGES + 8) % 3)
    return ImageDataset(
        name="noise",
        train=everything.take(range(NUM_IMAGES)),
        val=everything.take(range(NUM_IMAGES, NUM_IMAGES + 8)),
        class_names=("a", "b", "c"),
        mean=(0.5,),
        std=(0.25,),
        fingerprint="0" * 64,
        flips=True,
        open_test=lambda: everything.take([]),
    )


def curve_of(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The reports without their times."""
    return [{name: past[name] for name in past if "second" not in name} for past in history]


def test_each_two_of_backbone_optimizer_and_schedule_meet() -> None:
    kinds = (tuple(BACKBONES), OPTIMIZERS, SCHEDULES)
    for first, second in itertools.combinations(range(3), 2):
        met = {(case[first], case[second]) for case in CASES}
        assert met == set(itertools.product(kinds[first], kinds[second]))


@pytest.mark.parametrize(("backbone", "optimizer", "schedule"), CASES)
def test_a_resumed_curve_is_bit_for_bit_the_uninterrupted_one(
    backbone: str, optimizer: str, schedule: str
) -> None:
    config = TrainConfig.from_dict(
        {
            "backbone": backbone,
            "optimizer": optimizer,
            "schedule": schedule,
            "batch_size": 16 if backbone in LARGE else 4,
            "epochs": 2 if backbone in LARGE else 1,
            "dropout": 0.2,
            "clip_norm": 1.0,
            "flip": True,
            "translate": 1,
        }
    )
    data = random_data(BACKBONES[backbone].min_side)
    checkpoints: list[bytes] = []
    wanted = 3 if backbone in LARGE else CASES.index((backbone, optimizer, schedule)) % 5 + 3

    def keep(state: TrainState) -> None:
        """Before one batch of the last leg."""
        batch = state.underway and state.underway.next_batch
        if len(state.history) == 1 and batch == wanted % num_batches:
            checkpoints.append(state.to_bytes())

    num_batches = 2 if backbone in LARGE else 8
    uninterrupted = train(config, data, PLAN, keep=keep)
    checkpoints.append(next(uninterrupted).state.to_bytes())
    (whole,) = uninterrupted
    assert len(checkpoints) == 2
    for checkpoint in checkpoints:
        torch.rand(3)
        (resumed,) = train(config, data, PLAN, resume=checkpoint)
        assert resumed.step == (8 if backbone in LARGE else 4)
        assert curve_of(resumed.state.history) == curve_of(whole.state.history)
        assert_same_bits(resumed.state, whole.state)


REGULARISED: list[dict[str, Any]] = [
    {"mixup": 0.4},
    {"cutmix": 1.0, "label_smoothing": 0.1},
    {"mixup": 1.0, "cutmix": 1.0, "balance": "loss"},
    {"erasing": 0.5},
    {"policy": "trivialaugment"},
    {"policy": "randaugment", "policy_magnitude": 15},
    {"balance": "loss"},
    {"balance": "sampling"},
    {"balance": "smote", "trainable": "head", "flip": False},
]


@pytest.mark.parametrize("fields", REGULARISED)
def test_regularisation_and_balance_resume_bit_for_bit(fields: dict[str, Any]) -> None:
    config = TrainConfig.from_dict(
        {"backbone": "smallcnn", "batch_size": 4, "epochs": 2, "flip": True, **fields}
    )
    data = random_data(8)
    uninterrupted = train(config, data, PLAN)
    checkpoints = [next(uninterrupted).state.to_bytes() for _ in range(2)]
    (whole,) = uninterrupted
    for checkpoint in checkpoints:
        torch.rand(3)
        *_, resumed = train(config, data, PLAN, resume=checkpoint)
        assert curve_of(resumed.state.history) == curve_of(whole.state.history)
        assert_same_bits(resumed.state, whole.state)


def assert_same_bits(first: TrainState, second: TrainState) -> None:
    """Weights, statistics and what the optimizer keeps are equal."""
    for one, other in (
        (first.model.state_dict(), second.model.state_dict()),
        (first.optimizer.state_dict(), second.optimizer.state_dict()),
    ):
        assert one.keys() == other.keys()
        for key in one.keys() - {"param_groups"}:
            torch.testing.assert_close(one[key], other[key], rtol=0, atol=0)
        assert one.get("param_groups") == other.get("param_groups")
