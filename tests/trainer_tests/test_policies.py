import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as reference

from trainer.policies import NARROW, OPERATIONS, POLICIES, WIDE, randaugment, trivialaugment
from trainer.warp import shear, shift

NUM_IMAGES = 12


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_images(num_images: int = NUM_IMAGES, channels: int = 3) -> Tensor:
    """Blurred noise: not all operations move pixels that have nothing in common."""
    shape = (num_images, channels, 12, 16)
    noise = torch.randint(256, shape, generator=generator(99)).float()
    return torch.nn.functional.avg_pool2d(noise, 3, 1, 1).round().to(torch.uint8)


AMOUNTS = torch.linspace(-1, 1, NUM_IMAGES)


def expected(name: str, image: Tensor, amount: float) -> Tensor:
    """torchvision's operation on one image (C,H,W) of three channels."""
    factor, strength = 1 + 0.99 * amount, abs(amount)
    if name == "rotate":
        turned: Tensor = reference.rotate(
            image, 135 * amount, interpolation=InterpolationMode.BILINEAR
        )
        return turned
    calls: dict[str, Callable[[], Tensor]] = {
        "identity": lambda: image,
        "brightness": lambda: reference.adjust_brightness(image, factor),
        "color": lambda: reference.adjust_saturation(image, factor),
        "contrast": lambda: reference.adjust_contrast(image, factor),
        "sharpness": lambda: reference.adjust_sharpness(image, factor),
        "posterize": lambda: reference.posterize(image, 8 - round(6 * strength)),
        "solarize": lambda: reference.solarize(image, 255 * (1 - strength)),
        "autocontrast": lambda: reference.autocontrast(image),
        "equalize": lambda: reference.equalize(image),
    }
    return calls[name]()


@pytest.mark.parametrize(
    "name", [name for name in OPERATIONS if not name.startswith(("shear", "translate"))]
)
def test_an_operation_is_torchvision_s_on_each_image(name: str) -> None:
    images = random_images()
    results = OPERATIONS[name](images, AMOUNTS, WIDE)
    # torchvision cuts what it blends down to whole numbers, and blends with a cut mean
    allowed = 1 if name in ("brightness", "color", "contrast", "sharpness") else 0
    for image, result, amount in zip(images, results, AMOUNTS.tolist(), strict=True):
        difference = (result.int() - expected(name, image, amount).int()).abs()
        if name == "rotate":  # sums in another order, rounded
            assert difference.float().mean() < 0.5
        else:
            assert int(difference.max()) <= allowed, amount


def test_translate_moves_by_whole_pixels_and_at_most_by_45_percent_of_the_side() -> None:
    images = random_images(3)
    right = OPERATIONS["translate_x"](images, torch.tensor([1.0, -1.0, 0.1]), WIDE)
    assert torch.equal(right[0, :, :, 7:], images[0, :, :, :-7])
    assert int(right[0, :, :, :7].sum()) == 0
    assert torch.equal(right[1, :, :, :-7], images[1, :, :, 7:])
    assert torch.equal(right[2], images[2])
    down = OPERATIONS["translate_y"](images, torch.ones(3), dataclasses.replace(WIDE, pixels=2))
    assert torch.equal(down[:, :, 2:], images[:, :, :-2])


def test_shear_leaves_the_border_row_nearly_where_it_is_and_pushes_the_others() -> None:
    point = torch.zeros(2, 1, 12, 16)
    point[0, 0, 0, 3], point[1, 0, 10, 3] = 255.0, 255.0
    columns = torch.arange(16.0)
    pushed = shear(point, right=torch.full((2,), 0.5), down=torch.zeros(2))[:, 0]
    weights = pushed.sum(dim=1)
    places = (weights * columns).sum(dim=1) / weights.sum(dim=1)
    assert places.tolist() == pytest.approx([3.25, 8.25], abs=1e-3)
    turned = shear(point.mT.contiguous(), right=torch.zeros(2), down=torch.full((2,), 0.5))
    torch.testing.assert_close(turned.mT, shear(point, right=torch.full((2,), 0.5),
                                                down=torch.zeros(2)))  # fmt: skip


def test_shift_takes_parts_of_pixels() -> None:
    point = torch.zeros(1, 1, 5, 5)
    point[0, 0, 2, 2] = 1.0
    moved = shift(point, right=torch.tensor([0.25]), down=torch.tensor([-1.0]))[0, 0]
    assert moved[1].tolist() == pytest.approx([0, 0, 0.75, 0.25, 0])


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("channels", [1, 2, 3, 5])
def test_images_of_any_number_of_channels_keep_shape_and_type(policy: str, channels: int) -> None:
    images = random_images(60, channels)
    before = images.clone()
    result = POLICIES[policy](images, 20, generator())
    assert (result.shape, result.dtype) == (images.shape, torch.uint8)
    assert torch.equal(images, before)
    changed = (result != images).flatten(1).any(dim=1)
    assert 30 < int(changed.sum())


@pytest.mark.parametrize("policy", POLICIES)
def test_the_generator_alone_decides(policy: str) -> None:
    images, state = random_images(40), torch.get_rng_state()
    first = POLICIES[policy](images, 9, generator(5))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first, POLICIES[policy](images, 9, generator(5)))
    assert not torch.equal(first, POLICIES[policy](images, 9, generator(6)))


def test_each_image_gets_one_operation_of_its_own() -> None:
    image = random_images(1)
    copies = image.expand(600, -1, -1, -1)
    results = trivialaugment(copies, 0, generator())
    strengths = [step / 30 for step in range(-30, 31)]
    possible = {
        tuple(result.flatten().tolist())
        for operation in OPERATIONS.values()
        for result in operation(image.expand(61, -1, -1, -1), torch.tensor(strengths), WIDE)
    }
    found = {tuple(result.flatten().tolist()) for result in results}
    assert found <= possible
    assert len(found) > 150


def test_a_higher_magnitude_changes_more() -> None:
    images = random_images(200)
    weak, strong = (randaugment(images, magnitude, generator()) for magnitude in (1, 30))
    changes = [float((result.float() - images).abs().mean()) for result in (weak, strong)]
    assert changes[1] > 2 * changes[0]


def test_ranges_are_those_of_torchvision() -> None:
    assert (WIDE.shear, WIDE.degrees, WIDE.blend, WIDE.bits) == (0.99, 135, 0.99, 6)
    assert (NARROW.shear, NARROW.degrees, NARROW.blend, NARROW.bits) == (0.3, 30, 0.9, 4)


def test_images_that_are_not_uint8_are_refused() -> None:
    with pytest.raises(TypeError, match="a policy takes images of uint8"):
        trivialaugment(random_images().float(), 0, generator())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_the_decisions_are_those_of_the_cpu() -> None:
    images = random_images(200)
    on_gpu = trivialaugment(images.cuda(), 0, generator()).cpu().int()
    off = (on_gpu - trivialaugment(images, 0, generator()).int()).abs()
    assert float((off > 1).float().mean()) < 0.01
