"""Pictures moved, turned and sheared: each of a batch by a matrix of its own."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from trainer.transfer import sent


def warp(images: Tensor, rows: Sequence[Tensor]) -> Tensor:
    """Where each pixel comes from, bilinear; zeros come in.

    images: (N,C,H,W), uint8 or float; rows: the six entries of affine_grid's matrices, each (N,),
    in coordinates of [-1, 1] across the image.
    """
    theta = sent(torch.stack(tuple(rows), dim=1).view(len(images), 2, 3), images.device)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    warped = functional.grid_sample(images.float(), grid, align_corners=False)
    return warped if images.is_floating_point() else warped.round_().to(images.dtype)


def turn(images: Tensor, angles: Tensor) -> Tensor:
    """Each image turned about its centre; pixels stay square if H and W differ.

    angles: (N,), in radians.
    """
    height, width = images.shape[2:]
    cos, sin, zero = angles.cos(), angles.sin(), torch.zeros(len(images))
    rows = (cos, -sin * (height / width), zero, sin * (width / height), cos, zero)
    return warp(images, rows)


def shift(images: Tensor, *, right: Tensor, down: Tensor) -> Tensor:
    """Each image moved by so many pixels. right, down: (N,)."""
    height, width = images.shape[2:]
    one, zero = torch.ones(len(images)), torch.zeros(len(images))
    return warp(images, (one, zero, right * (-2 / width), zero, one, down * (-2 / height)))


def shear(images: Tensor, *, right: Tensor, down: Tensor) -> Tensor:
    """Rows pushed to the right by `right` pixels for each pixel from the top, columns down alike.

    right, down: (N,); one of them is to be zero.
    """
    height, width = images.shape[2:]
    across, along = right * (-height / width), down * (-width / height)
    one = torch.ones(len(images))
    return warp(images, (one, across, across, along, one, along))
