"""Augmentation policies on whole batches: each image has operations of its own, drawn at random.

TrivialAugment (Müller & Hutter 2021, the wide ranges) and RandAugment (Cubuk et al. 2020), with
torchvision's operations and strengths. Images that drew the same operation are worked on together,
on the device that they are on.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from trainer.transfer import sent
from trainer.warp import shear, shift, turn

MOST_MAGNITUDE = 30
NUM_OPERATIONS = 2
"""Of randaugment, one after the other (its paper's N, and torchvision's default)."""
_MOST_SHIFT = 150 / 331
"""Share of the side."""


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """What operations do at full strength."""

    shear: float
    """Pixels for each pixel from the border."""
    degrees: float
    pixels: float
    """Of a shift; more than _MOST_SHIFT of the side is never taken."""
    blend: float
    """By how much a factor differs from 1."""
    bits: float
    """Of each pixel's eight that are lost."""


WIDE = Ranges(shear=0.99, degrees=135.0, pixels=32.0, blend=0.99, bits=6.0)
NARROW = Ranges(shear=0.3, degrees=30.0, pixels=float("inf"), blend=0.9, bits=4.0)


def trivialaugment(images: Tensor, _magnitude: int, generator: torch.Generator) -> Tensor:
    """One operation of any strength on each image. images: uint8 (N,C,H,W); so is the answer.

    Shifts of 32 pixels, which leave nothing of a small picture, end at 45 % of its side.
    """
    magnitudes = torch.randint(MOST_MAGNITUDE + 1, (len(images),), generator=generator)
    return _operate(images, magnitudes / MOST_MAGNITUDE, WIDE, generator)


def randaugment(images: Tensor, magnitude: int, generator: torch.Generator) -> Tensor:
    """Two operations of this strength, in [0, 30], on each image. images: uint8 (N,C,H,W)."""
    strengths = torch.full((len(images),), magnitude / MOST_MAGNITUDE)
    for _ in range(NUM_OPERATIONS):
        images = _operate(images, strengths, NARROW, generator)
    return images


def _operate(
    images: Tensor, strengths: Tensor, ranges: Ranges, generator: torch.Generator
) -> Tensor:
    """An operation for each image, drawn here. strengths: (N,) in [0, 1], on the CPU."""
    if images.dtype != torch.uint8:
        raise TypeError(f"a policy takes images of uint8, got {images.dtype}")
    drawn = torch.randint(len(OPERATIONS), (len(images),), generator=generator)
    signs = 1.0 - 2.0 * torch.randint(2, (len(images),), generator=generator)
    order = drawn.argsort(stable=True)
    counts = drawn.bincount(minlength=len(OPERATIONS)).tolist()
    places = sent(order, images.device)
    groups = torch.split(images.index_select(0, places), counts)
    amounts = torch.split((signs * strengths)[order], counts)
    done = [
        operation(group, amount, ranges) if len(group) else group
        for operation, group, amount in zip(OPERATIONS.values(), groups, amounts, strict=True)
    ]
    return torch.empty_like(images).index_copy_(0, places, torch.cat(done))


def _identity(images: Tensor, _amounts: Tensor, _ranges: Ranges) -> Tensor:
    return images


def _shear_x(images: Tensor, amounts: Tensor, ranges: Ranges) -> Tensor:
    return shear(images, right=amounts * ranges.shear, down=torch.zeros(len(images)))


def _shear_y(images: Tensor, amounts: Tensor, ranges: Ranges) -> Tensor:
    return shear(images, right=torch.zeros(len(images)), down=amounts * ranges.shear)


def _translate_x(images: Tensor, amounts: Tensor, ranges: Ranges) -> Tensor:
    most = min(ranges.pixels, _MOST_SHIFT * images.shape[3])
    return shift(images, right=(amounts * most).trunc(), down=torch.zeros(len(images)))


def _translate_y(images: Tensor, amounts: Tensor, ranges: Ranges) -> Tensor:
    most = min(ranges.pixels, _MOST_SHIFT * images.shape[2])
    return shift(images, right=torch.zeros(len(images)), down=(amounts * most).trunc())


def _rotate(images: Tensor, amounts: Tensor, ranges: Ranges) -> Tensor:
    return turn(images, amounts * math.radians(ranges.degrees))


def _brightness(images: Tensor, amounts: Tensor, ranges: Ranges) -> Tensor:
    return _blend(images, torch.zeros(()), amounts, ranges)


def _color(images: Tensor, amounts: Tensor, ranges: Ranges) -> Tensor:
    """Images that aren't of three channels have no colour, and stay."""
    if images.shape[1] != 3:
        return images
    return _blend(images, _gray(images), amounts, ranges)


def _contrast(images: Tensor, amounts: Tensor, ranges: Ranges) -> Tensor:
    return _blend(images, _gray(images).mean((1, 2, 3), keepdim=True), amounts, ranges)


def _sharpness(images: Tensor, amounts: Tensor, ranges: Ranges) -> Tensor:
    blurred = _by_channel(lambda planes: _library().adjust_sharpness(planes, 0.0), images)
    return _blend(images, blurred.float(), amounts, ranges)


def _posterize(images: Tensor, amounts: Tensor, ranges: Ranges) -> Tensor:
    lost = (amounts.abs() * ranges.bits).round().to(torch.uint8)
    return images & _beside(255 - (2**lost - 1), images)


def _solarize(images: Tensor, amounts: Tensor, _ranges: Ranges) -> Tensor:
    bounds = ((1 - amounts.abs()) * 255).ceil().to(torch.uint8)
    return torch.where(images >= _beside(bounds, images), 255 - images, images)


def _autocontrast(images: Tensor, _amounts: Tensor, _ranges: Ranges) -> Tensor:
    return _by_channel(_library().autocontrast, images)


def _equalize(images: Tensor, _amounts: Tensor, _ranges: Ranges) -> Tensor:
    return _by_channel(_library().equalize, images)


OPERATIONS: dict[str, Callable[[Tensor, Tensor, Ranges], Tensor]] = {
    "identity": _identity,
    "shear_x": _shear_x,
    "shear_y": _shear_y,
    "translate_x": _translate_x,
    "translate_y": _translate_y,
    "rotate": _rotate,
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
"""Take uint8 (n,C,H,W) and amounts (n,) in [-1, 1] on the CPU, whose sign matters to some."""


POLICIES: dict[str, Callable[[Tensor, int, torch.Generator], Tensor]] = {
    "trivialaugment": trivialaugment,
    "randaugment": randaugment,
}
"""Take uint8 (N,C,H,W), a magnitude in [0, 30] and a generator of the CPU."""


def _library() -> ModuleType:
    """torchvision's operations, which take a third of a second to import."""
    from torchvision.transforms.v2 import functional

    found: ModuleType = functional
    return found


def _by_channel(operation: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """Of an operation on gray images that treats the channels of others one by one."""
    return operation(images.flatten(0, 1)[:, None]).view_as(images)


def _gray(images: Tensor) -> Tensor:
    """(n,1,H,W), float."""
    if images.shape[1] == 3:
        gray: Tensor = _library().rgb_to_grayscale(images)
        return gray.float()
    return images.float().mean(1, keepdim=True)


def _blend(images: Tensor, plain: Tensor, amounts: Tensor, ranges: Ranges) -> Tensor:
    """Away from what is plain, or towards it: plain + factor * (images - plain)."""
    factors = _beside(1 + amounts * ranges.blend, images)
    blended = torch.lerp(sent(plain, images.device), images.float(), factors)
    return blended.round_().clamp_(0, 255).to(torch.uint8)


def _beside(values: Tensor, images: Tensor) -> Tensor:
    """values: (n,), in a shape and at a place where images (n,C,H,W) meet them."""
    return sent(values.view(-1, 1, 1, 1), images.device)
