import dataclasses
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from trainer.augment import augment, cutout, erase, flip, rotate, translate
from trainer.config import ConfigError, TrainConfig


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(num_images: int = 64) -> Tensor:
    shape = (num_images, 3, 8, 10)
    return torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator(99))


def shifted(image: Tensor, down: int, right: int) -> Tensor:
    """image: (C,H,W); zeros come in."""
    result = torch.zeros_like(image)
    height, width = image.shape[1:]
    for row in range(height):
        for column in range(width):
            if 0 <= row + down < height and 0 <= column + right < width:
                result[:, row, column] = image[:, row + down, column + right]
    return result


def test_about_half_of_the_images_are_mirrored_and_the_others_are_left_alone() -> None:
    images = random_images(400)
    flipped = flip(images, generator())
    mirrored = (flipped == images.flip(3)).flatten(1).all(dim=1)
    untouched = (flipped == images).flatten(1).all(dim=1)
    assert bool((mirrored | untouched).all())
    assert 150 < int(mirrored.sum()) < 250


def test_translate_shifts_each_image_by_whole_pixels_and_lets_zeros_in() -> None:
    images = random_images(30)
    moved = translate(images, 2, generator())
    shifts = set()
    for image, result in zip(images, moved, strict=True):
        found = [
            (down, right)
            for down in range(-2, 3)
            for right in range(-2, 3)
            if torch.equal(shifted(image, down, right), result)
        ]
        assert len(found) == 1
        shifts.update(found)
    assert len(shifts) > 10


def test_all_shifts_are_equally_likely() -> None:
    point = torch.zeros(9000, 1, 5, 5)
    point[:, :, 2, 2] = 1
    counts = translate(point, 1, generator()).sum(dim=(0, 1))
    assert counts.sum() == 9000
    inner = counts[1:4, 1:4]
    assert inner.sum() == 9000
    assert inner.min() > 850
    assert inner.max() < 1150


def test_rotate_turns_by_no_more_than_the_given_degrees() -> None:
    images = torch.zeros(200, 1, 33, 33)
    images[:, 0, 16, 28] = 255.0  # 12 pixels right of the centre
    turned = rotate(images, 20, generator())[:, 0]
    rows = torch.arange(33.0) - 16
    weights = turned / turned.sum(dim=(1, 2), keepdim=True)
    y = (weights.sum(dim=2) * rows).sum(dim=1)
    x = (weights.sum(dim=1) * rows).sum(dim=1)
    angles = torch.atan2(y, x) * 180 / math.pi
    assert torch.hypot(x, y).sub(12).abs().max() < 0.5
    assert angles.abs().max() < 21
    assert angles.max() > 15
    assert angles.min() < -15


def test_rotate_keeps_pixels_square_when_height_and_width_differ(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch, "rand", lambda n, **_: torch.ones(n))  # the largest angle
    images = torch.zeros(1, 1, 9, 17)
    images[0, 0, 4, 11] = 1.0  # 3 pixels right of the centre
    turned = rotate(images, 90, generator())
    row, column = divmod(int(turned.argmax()), 17)
    assert (abs(row - 4), column) == (3, 8)


def test_rotated_uint8_images_stay_uint8_and_hardly_change_at_tiny_angles() -> None:
    images = random_images()
    turned = rotate(images, 1e-6, generator())
    assert turned.dtype == torch.uint8
    assert (turned.int() - images.int()).abs().max() <= 1


def test_cutout_hides_one_square_at_most_cut_by_the_border() -> None:
    images = random_images(500)
    result = cutout(images, 4, generator())
    hidden = (result == 0).all(dim=1)
    assert torch.equal(hidden, (result == 0).any(dim=1))
    assert torch.equal(result[result != 0], images[result != 0])
    areas = hidden.sum(dim=(1, 2))
    assert areas.max() == 16
    assert areas.min() >= 4
    height, width = hidden.any(dim=2).sum(dim=1), hidden.any(dim=1).sum(dim=1)
    assert torch.equal(height * width, areas)


def test_erasing_overwrites_a_rectangle_of_some_images_with_noise() -> None:
    images = torch.zeros(2000, 3, 20, 30, dtype=torch.uint8)
    result = erase(images, 0.3, generator())
    hidden = (result != 0).any(dim=1)
    chosen = hidden.flatten(1).any(dim=1)
    assert 500 < int(chosen.sum()) < 700
    rows, columns = hidden.any(dim=2), hidden.any(dim=1)
    tall, wide = rows.sum(dim=1)[chosen], columns.sum(dim=1)[chosen]
    share = tall * wide / 600
    assert 0.015 < float(share.min()) < 0.05
    assert 0.3 < float(share.max()) < 0.36
    ratio = tall / wide
    assert 0.2 < float(ratio.min()) < 0.4
    assert 2.5 < float(ratio.max()) < 4
    noise = result[chosen].flatten()
    assert 115 < float(noise[noise > 0].float().mean()) < 140
    everywhere = hidden.float().mean(dim=0)
    assert float(everywhere.min()) > 0
    assert torch.equal(erase(images, 0.0, generator()), images)
    assert bool((erase(images, 1.0, generator()) != 0).flatten(1).any(dim=1).all())


def test_an_erased_rectangle_leaves_something_of_the_smallest_images() -> None:
    for height, width in ((2, 2), (3, 40)):
        images = torch.ones(500, 1, height, width, dtype=torch.uint8)
        erased = erase(images, 1.0, generator()) != 1
        assert int(erased.flatten(1).sum(dim=1).max()) <= (height - 1) * (width - 1)
    with pytest.raises(ConfigError, match="erasing needs images of at least 2 pixels each way"):
        augment(images[:, :, :1], TrainConfig(erasing=0.5), generator())


ALL = TrainConfig(flip=True, translate=2, rotation=15, cutout=3)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_shape_and_type_stay_and_the_given_images_are_not_changed(dtype: torch.dtype) -> None:
    images = random_images().to(dtype)
    before = images.clone()
    result = augment(images, ALL, generator())
    assert (result.shape, result.dtype) == (images.shape, dtype)
    assert torch.equal(images, before)
    assert not torch.equal(result, images)


@pytest.mark.parametrize(
    "config", [ALL, dataclasses.replace(ALL, policy="trivialaugment", erasing=0.5)]
)
def test_the_generator_alone_decides(config: TrainConfig) -> None:
    images = random_images()
    global_state = torch.get_rng_state()
    first = augment(images, config, generator(5))
    assert torch.equal(torch.get_rng_state(), global_state)
    assert torch.equal(first, augment(images, config, generator(5)))
    assert not torch.equal(first, augment(images, config, generator(6)))


def test_strength_zero_returns_the_same_tensor_and_draws_nothing() -> None:
    images, source = random_images(), generator()
    before = source.get_state()
    assert augment(images, TrainConfig(), source) is images
    assert torch.equal(source.get_state(), before)


@pytest.mark.parametrize("name", ["translate", "cutout"])
def test_a_strength_that_may_leave_nothing_of_a_picture_is_refused(name: str) -> None:
    config = TrainConfig.from_dict({name: 8})
    with pytest.raises(ConfigError, match=f"{name} must be < 8, the images' side, got 8"):
        augment(random_images(), config, generator())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_decisions_are_those_of_the_cpu() -> None:
    config = TrainConfig(flip=True, translate=2, cutout=3)
    images = random_images()
    on_gpu = augment(images.cuda(), config, generator())
    assert torch.equal(on_gpu.cpu(), augment(images, config, generator()))
