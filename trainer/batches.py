"""Which images are trained on when: legs between reports, batches, their order."""

import dataclasses
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.balance import balanced_order
from trainer.config import DataError, TrainConfig
from trainer.data.dataset import Split
from trainer.device import DevicePlan
from trainer.seeds import seeded_generator
from trainer.state import STEPS_AN_EPOCH


@dataclass(frozen=True, kw_only=True)
class Leg:
    """The batches from one report to the next; epoch counts from 0, step is the one reached."""

    epoch: int
    first_batch: int
    end_batch: int
    step: int


def legs(
    num_epochs: int, num_batches: int, steps_done: int, end_step: int | None = None
) -> list[Leg]:
    """The legs still to go, in order. num_batches: of an epoch.

    end_step: the last one is the first that reaches it (None: that of the last epoch).
    """
    whole = [
        Leg(
            epoch=epoch,
            first_batch=0,
            end_batch=num_batches,
            step=(epoch + 1) * STEPS_AN_EPOCH,
        )
        for epoch in range(num_epochs)
    ]
    if num_batches >= 2 * STEPS_AN_EPOCH:
        quarter = math.ceil(num_batches / STEPS_AN_EPOCH)
        first = Leg(epoch=0, first_batch=0, end_batch=quarter, step=1)
        whole[:1] = [first, dataclasses.replace(whole[0], first_batch=quarter)]
    last = next((leg.step for leg in whole if leg.step >= (end_step or math.inf)), math.inf)
    return [leg for leg in whole if steps_done < leg.step <= last]


def batch_bounds(num_images: int, batch_size: int) -> list[tuple[int, int]]:
    """(first, end) of each batch of an epoch; no image is left out.

    A last batch of one image, which batch norm can't take, joins the one before. Raises
    DataError if there is only one image.
    """
    if num_images < 2:
        raise DataError(f"at least two images are needed to train, got {num_images}")
    starts = [start for start in range(0, num_images, batch_size) if num_images - start > 1]
    return list(zip(starts, [*starts[1:], num_images], strict=True))


def num_micro_batches(num_images: int, micro_batch: int | None) -> int:
    """Into how many parts a batch is split: none of one image, so three may go at once for 2."""
    if micro_batch is None:
        return 1
    return max(1, min(math.ceil(num_images / micro_batch), num_images // 2))


def epoch_order(seed: int, epoch: int, num_images: int) -> Tensor:
    """The order of the images in this epoch: int64 (num_images,)."""
    return torch.randperm(num_images, generator=seeded_generator("order", seed, epoch))


def order_of(config: TrainConfig, epoch: int, labels: Tensor) -> Tensor:
    """Which images this epoch takes, and in which order: int64 (M,). labels: (N,), on the CPU.

    An epoch's batches take the first of them, which SMOTE makes fewer than all.
    """
    if config.balance == "sampling":
        return balanced_order(config.seed, epoch, labels)
    return epoch_order(config.seed, epoch, len(labels))


def to_device(split: Split, plan: DevicePlan) -> Split:
    """The split in the device's memory (the same one if it is there)."""
    return type(split)(split.images.to(plan.device), split.labels.to(plan.device))
