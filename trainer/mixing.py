"""Mixed images: each of a batch with a partner from the same batch, and so are their labels."""

import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from trainer.config import ConfigError, TrainConfig
from trainer.transfer import sent


@dataclass(frozen=True, kw_only=True, eq=False)
class Partners:
    """What a batch was mixed with. labels: int64 (N,); share: of an image that is its own."""

    labels: Tensor
    share: float | Tensor

    def split(self, num_parts: int) -> list["Partners"]:
        """As tensor_split splits the batch."""
        parts = self.labels.tensor_split(num_parts)
        return [Partners(labels=labels, share=self.share) for labels in parts]


def mix(
    images: Tensor, labels: Tensor, config: TrainConfig, generator: torch.Generator
) -> tuple[Tensor, Partners | None]:
    """The batch mixed as config says; as it is, and nothing drawn, where that is off.

    images: (N,C,H,W) float; labels: int64 (N,). generator: of the CPU, the only source of
    randomness. One share and one rectangle for a batch, as in the papers' own code. Raises
    ConfigError if the images are too small for cutmix.
    """
    if not config.mixup and not config.cutmix:
        return images, None
    if config.cutmix and min(images.shape[2:]) < 2:
        raise ConfigError("cutmix needs images of at least 2 pixels each way")
    cuts = config.cutmix > 0
    if config.mixup and config.cutmix:
        cuts = bool(torch.rand((), generator=generator) < 0.5)
    share = _beta(config.cutmix if cuts else config.mixup, generator)
    order = sent(torch.randperm(len(images), generator=generator), images.device)
    partners = images.index_select(0, order)
    if cuts:
        images, share = cutmix(images, partners, share, generator)
    else:
        images = torch.lerp(partners, images, share)
    return images, Partners(labels=labels.index_select(0, order), share=share)


def cutmix(
    images: Tensor, partners: Tensor, share: float, generator: torch.Generator
) -> tuple[Tensor, float]:
    """A rectangle of the partners in each image (Yun et al. 2019), and the share that is left.

    images, partners: (N,C,H,W). The rectangle has the image's shape and 1 - share of its area; its
    centre may be any pixel, so that what hangs over the border is cut off, and the share that is
    left is that of the pixels.
    """
    height, width = images.shape[2:]
    side = math.sqrt(1 - share)
    tall, wide = int(height * side), int(width * side)
    row = int(torch.randint(height, (), generator=generator))
    column = int(torch.randint(width, (), generator=generator))
    top, left = max(0, row - tall // 2), max(0, column - wide // 2)
    bottom, right = min(height, row - tall // 2 + tall), min(width, column - wide // 2 + wide)
    images = images.clone()
    images[:, :, top:bottom, left:right] = partners[:, :, top:bottom, left:right]
    return images, 1 - (bottom - top) * (right - left) / (height * width)


def _beta(alpha: float, generator: torch.Generator) -> float:
    """Drawn from Beta(alpha, alpha); torch's own can't be given a generator."""
    seed = int(torch.randint(2**62, (), generator=generator))
    return float(np.random.default_rng(seed).beta(alpha, alpha))
