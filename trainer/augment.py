"""Augmentation of whole batches, on the device that they are on."""

import math

import torch
from torch import Tensor
from torch.nn import functional

from trainer.config import ConfigError, TrainConfig


def augment(images: Tensor, config: TrainConfig, generator: torch.Generator) -> Tensor:
    """New pictures of the same things: mirrored, turned, shifted, partly hidden.

    images: (N,C,H,W), uint8 or float, where 0 is what uncovered places are filled with; the
    answer has the same shape, type and device. generator: of the CPU, the only source of
    randomness, so that decisions are the same on each device. What config turns off costs
    nothing and draws nothing. Raises ConfigError if nothing may be left of a picture.
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
    if config.cutout > 0:
        images = cutout(images, config.cutout, generator)
    return images


def flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror each image left to right with probability 1/2. images: (N,C,H,W)."""
    chosen = (torch.rand(len(images), generator=generator) < 0.5).to(images.device)
    return torch.where(chosen[:, None, None, None], images.flip(3), images)


def translate(images: Tensor, pixels: int, generator: torch.Generator) -> Tensor:
    """Shift each image by up to `pixels` each way, zeros come in: a padded image's random crop.

    images: (N,C,H,W); the shifts are whole pixels, all equally likely.
    """
    num_images, _, height, width = images.shape
    offsets = torch.randint(2 * pixels + 1, (2, num_images), generator=generator)
    down, right = offsets.to(images.device)
    padded = functional.pad(images, (pixels, pixels, pixels, pixels))
    windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # a view: (N,C,2p+1,2p+1,H,W)
    return windows[torch.arange(num_images, device=images.device), :, down, right]


def rotate(images: Tensor, degrees: float, generator: torch.Generator) -> Tensor:
    """Turn each image about its centre by up to `degrees` each way; bilinear, zeros come in.

    images: (N,C,H,W); the pixels stay square if H and W differ.
    """
    num_images, _, height, width = images.shape
    angles = torch.rand(num_images, generator=generator).mul_(2).sub_(1) * math.radians(degrees)
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros(num_images)
    rows = (cos, -sin * (height / width), zero, sin * (width / height), cos, zero)
    theta = torch.stack(rows, dim=1).view(num_images, 2, 3).to(images.device)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    turned = functional.grid_sample(images.float(), grid, align_corners=False)
    return turned if images.is_floating_point() else turned.round_().to(images.dtype)


def cutout(images: Tensor, side: int, generator: torch.Generator) -> Tensor:
    """Set a square to zero in each image (DeVries & Taylor 2017).

    images: (N,C,H,W); side: in pixels. Its centre may be any pixel, so that the square hangs
    over the border at times.
    """
    num_images, _, height, width = images.shape
    uniform = torch.rand(2, num_images, 1, generator=generator)
    top = ((uniform[0] * height).long() - side // 2).to(images.device)
    left = ((uniform[1] * width).long() - side // 2).to(images.device)
    row = torch.arange(height, device=images.device)
    column = torch.arange(width, device=images.device)
    in_rows = (row >= top) & (row < top + side)
    in_columns = (column >= left) & (column < left + side)
    hidden = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return images.masked_fill(hidden, 0)
