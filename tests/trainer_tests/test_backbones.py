import logging
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision import models

from trainer.backbones import BACKBONES, build
from trainer.config import ConfigError, TrainConfig

SMALL_NETWORKS = ["smallcnn", "resnet8", "resnet20", "resnet18"]


def network(name: str, size: tuple[int, int, int], classes: int = 5, **fields: object) -> nn.Module:
    config = TrainConfig.from_dict({"backbone": name, **fields})
    return build(config, input_size=size, num_classes=classes)


def num_parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for published weights, and no network."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("https_proxy", "HTTPS_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    folder = tmp_path / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.mark.parametrize("name", sorted(BACKBONES))
@pytest.mark.parametrize("size", [(1, 28, 28), (3, 32, 32), (4, 65, 96)])
def test_every_backbone_gives_logits_for_any_channels_and_size(
    name: str, size: tuple[int, int, int]
) -> None:
    model = network(name, size).eval()
    with torch.no_grad():
        logits = model(torch.randn(2, *size))
    assert logits.shape == (2, 5)
    assert bool(logits.isfinite().all())


@pytest.mark.parametrize("name", sorted(set(BACKBONES) - {"convnext_tiny"}))
def test_digits_of_8_pixels_can_be_trained_on(name: str) -> None:
    model = network(name, (1, 8, 8))
    loss = nn.functional.cross_entropy(model(torch.randn(4, 1, 8, 8)), torch.tensor([0, 1, 2, 3]))
    torch.autograd.backward(loss)
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert bool(parameter.grad.isfinite().all())


@pytest.mark.parametrize(("name", "side"), [("resnet8", 7), ("convnext_tiny", 8)])
def test_images_that_are_too_small_are_refused_with_one_line(name: str, side: int) -> None:
    least = BACKBONES[name].min_side
    with pytest.raises(ConfigError) as caught:
        network(name, (1, side, side))
    assert str(caught.value) == (
        f"{name} needs images of {least} pixels or more, got 1x{side}x{side}"
    )


def test_the_smallest_images_that_are_let_in_work_everywhere() -> None:
    for name, backbone in BACKBONES.items():
        side = backbone.min_side
        assert network(name, (1, side, side))(torch.randn(2, 1, side, side)).shape == (2, 5)


def test_an_unknown_backbone_is_refused_with_the_nearest_name() -> None:
    with pytest.raises(ConfigError, match="unknown backbone 'resnet19', did you mean resnet18"):
        network("resnet19", (1, 28, 28))


@pytest.mark.parametrize(("name", "layers"), [("resnet8", 8), ("resnet20", 20)])
def test_the_cifar_resnets_have_the_papers_depth_and_size(name: str, layers: int) -> None:
    model = network(name, (3, 32, 32), classes=10)
    weights = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weights) == layers
    if name == "resnet20":
        assert num_parameters(model) == 269_722  # table 6 of the paper: 0.27M


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "efficientnet_b0"])
def test_the_first_layer_of_small_images_keeps_their_size(name: str) -> None:
    first = next(m for m in network(name, (1, 64, 64)).modules() if isinstance(m, nn.Conv2d))
    assert (first.kernel_size, first.stride) == ((3, 3), (1, 1))
    large = next(m for m in network(name, (1, 65, 65)).modules() if isinstance(m, nn.Conv2d))
    assert large.stride == (2, 2)


def test_small_images_are_not_pooled_by_resnet18() -> None:
    kinds = [type(m) for m in network("resnet18", (3, 32, 32)).modules()]
    assert nn.MaxPool2d not in kinds


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_dropout_stands_before_the_last_layer_and_nowhere_else(name: str) -> None:
    modules = list(network(name, (1, 32, 32), dropout=0.3).modules())
    assert [m.p for m in modules if isinstance(m, nn.Dropout)] == [0.3]
    assert isinstance(modules[-2], nn.Dropout)
    assert isinstance(modules[-1], nn.Linear)


@pytest.mark.parametrize("name", [*SMALL_NETWORKS, "mobilenet_v3_small"])
def test_weights_depend_on_the_seed_and_on_nothing_else(name: str) -> None:
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = network(name, (1, 8, 8), seed=3).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(2)
    again = network(name, (1, 8, 8), seed=3).state_dict()
    assert all(torch.equal(first[key], again[key]) for key in first)
    other = network(name, (1, 8, 8), seed=4).state_dict()
    assert any(not torch.equal(first[key], other[key]) for key in first)


@pytest.mark.parametrize("name", ["smallcnn", "resnet8", "resnet20"])
def test_networks_without_published_weights_refuse_pretrained(name: str) -> None:
    with pytest.raises(ConfigError, match=f"no published weights of {name}"):
        network(name, (3, 32, 32), pretrained=True)


def test_offline_one_line_names_the_file_of_the_published_weights(hub: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        network("resnet18", (3, 32, 32), pretrained=True)
    message = str(caught.value)
    assert str(hub / "resnet18-f37072fd.pth") in message
    assert "\n" not in message


def test_a_broken_file_of_published_weights_is_one_line_too(hub: Path) -> None:
    (hub / "resnet18-f37072fd.pth").write_bytes(b"no weights")
    with pytest.raises(ConfigError) as caught:
        network("resnet18", (3, 32, 32), pretrained=True)
    path = hub / "resnet18-f37072fd.pth"
    assert str(caught.value) == (
        f"pretrained resnet18: {path} can't be read; delete it to have it downloaded again"
    )


def test_published_weights_are_loaded_where_they_fit(
    hub: Path, caplog: pytest.LogCaptureFixture
) -> None:
    published = models.resnet18(num_classes=1000).state_dict()
    torch.save(published, hub / "resnet18-f37072fd.pth")
    with caplog.at_level(logging.INFO, "trainer.weights"):
        own = network("resnet18", (3, 32, 32), pretrained=True).state_dict()
    assert torch.equal(own["layer1.0.conv1.weight"], published["layer1.0.conv1.weight"])
    assert torch.equal(own["layer4.1.bn2.running_var"], published["layer4.1.bn2.running_var"])
    assert "pretrained resnet18: left at random: conv1, fc.1" in caplog.text


def test_large_colour_images_get_the_published_stem_too(
    hub: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.save(models.resnet18().state_dict(), hub / "resnet18-f37072fd.pth")
    with caplog.at_level(logging.INFO, "trainer.weights"):
        network("resnet18", (3, 224, 224), pretrained=True)
    assert "left at random: fc.1" in caplog.text
