"""Augmentation of whole batches, on the device that they are on."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from trainer.config import ConfigError, TrainConfig
from trainer.policies import POLICIES
from trainer.transfer import sent
from trainer.warp import turn

_ERASED_SHARE = (0.02, 0.33)
_ERASED_LOG_RATIO = (math.log(0.3), math.log(3.3))
"""Ranges of a rectangle's area and of the logarithm of its height over its width."""


def augment(images: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    """New pictures of the same things: mirrored, turned, shifted, partly hidden.

    images: (N,C,H,W), uint8 or float (for a policy and erasing uint8), where 0 is what uncovered
    places are filled with; the answer has the same shape, type and device. generator: of the CPU,
    the only source of randomness, so that decisions are the same on each device. What config turns
    off costs nothing and draws nothing. Raises ConfigError if nothing may be left of a picture.
    """
    side = min(images.shape[2:])
    for name, pixels in (("translate", config.translate), ("cutout", config.cutout)):
        if pixels >= side:
            raise ConfigError(f"{name} must be < {side}, the images' side, got {pixels}")
    if config.flip:
        images = flip(images, generator)
    if config.rotation > 0:
        images = rotate(images, config.rotation, generator)
    if config.translate > 0:
        images = translate(images, config.translate, generator)
    if config.policy != "none":
        images = POLICIES[config.policy](images, config.policy_magnitude, generator)
    if config.cutout > 0:
        images = cutout(images, config.cutout, generator)
    if config.erasing > 0:
        images = erase(images, config.erasing, generator)
    return images


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2. images: (N,C,H,W)."""
    chosen = sent(torch.rand(len(images), generator=generator) < 0.5, images.device)
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def translate(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `pixels` each way, zeros come in: a padded image's random crop.

    images: (N,C,H,W); the shifts are whole pixels, all equally likely.
    """
    num_images, _, height, width = images.shape
    offsets = torch.randint(2 * pixels + 1, (2, num_images), generator=generator)
    down, right = sent(offsets, images.device)
    padded = functional.pad(images, (pixels, pixels, pixels, pixels))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (N,C,2p+1,2p+1,H,W)
    return windows[torch.arange(num_images, device=images.device), :, down, right]


def rotate(images: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    """Turn each image about its centre by up to `degrees` each way; bilinear, zeros come in.

    images: (N,C,H,W); the pixels stay square if H and W differ.
    """
    angles = torch.rand(len(images), generator=generator).mul_(2).sub_(1)
    return turn(images, angles * math.radians(degrees))


def cutout(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Set a square to zero in each image (DeVries & Taylor 2017).

    images: (N,C,H,W); side: in pixels. Its centre may be any pixel, so that the square hangs
    over the border at times.
    """
    num_images, _, height, width = images.shape
    uniform = torch.rand(2, num_images, 1, generator=generator)
    top = sent((uniform[0] * height).long() - side // 2, images.device)
    left = sent((uniform[1] * width).long() - side // 2, images.device)
    return images.masked_fill(_inside(top, left, side, side, height, width), 0)


def erase(images: Tensor, probability: float, generator: torch.Generator) -> Tensor:
    """Overwrite a rectangle of each image with noise, with this probability (Zhong et al. 2020).

    images: uint8 (N,C,H,W). The rectangle takes 2 to 33 % of the area, its height is 0.3 to 3.3
    times its width, and it lies within the image; where the two don't fit together it is cut to
    one pixel less than the side. All of a batch have it from the same picture of noise. Raises
    ConfigError if the images have no room for one.
    """
    num_images, channels, height, width = images.shape
    if min(height, width) < 2:
        raise ConfigError("erasing needs images of at least 2 pixels each way")
    chance, area, shape, down, right = torch.rand(5, num_images, 1, generator=generator)
    noise = torch.randint(256, (channels, height, width), generator=generator, dtype=torch.uint8)
    low, high = _ERASED_SHARE
    pixels = height * width * (low + (high - low) * area)
    low, high = _ERASED_LOG_RATIO
    ratio = (low + (high - low) * shape).exp()
    tall = (pixels * ratio).sqrt().round().long().clamp(1, height - 1)
    wide = (pixels / ratio).sqrt().round().long().clamp(1, width - 1)
    tall *= chance < probability
    top = (down * (height - tall + 1)).long()
    left = (right * (width - wide + 1)).long()
    hidden = sent(_inside(top, left, tall, wide, height, width), images.device)
    return torch.where(hidden, sent(noise, images.device), images)


def _inside(
    top: Tensor, left: Tensor, tall: Tensor | int, wide: Tensor | int, height: int, width: int
) -> Tensor:
    """bool (N,1,height,width): whether a pixel is in its image's rectangle. top, ...: (N,1)."""
    row = torch.arange(height, device=top.device)
    column = torch.arange(width, device=top.device)
    in_rows = (row >= top) & (row < top + tall)
    in_columns = (column >= left) & (column < left + wide)
    return in_rows[:, None, :, None] & in_columns[:, None, None, :]
