"""BACKBONES: networks by name, for any number of channels, small images included."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torchvision import models

from trainer.config import ConfigError, TrainConfig, unknown_name
from trainer.seeds import own_randomness

logger = logging.getLogger(__name__)

SMALL_SIDE = 64
"""Up to this many pixels, torchvision's networks get the small-image stem."""

Shape = tuple[int, int, int]


def build(config: TrainConfig, *, input_size: Shape, num_classes: int) -> nn.Module:
    """The config's backbone: (N,C,H,W) float -> logits (N,num_classes) float.

    input_size: (C,H,W). Dropout stands before the last layer and nowhere else (stochastic
    depth of efficientnet and convnext stays). Weights come from config.seed, or, if pretrained,
    from torchvision where they fit. Raises ConfigError if the name is unknown, the image too
    small, or the published weights aren't there.
    """
    if config.backbone not in BACKBONES:
        raise ConfigError(unknown_name("backbone", config.backbone, BACKBONES))
    backbone = BACKBONES[config.backbone]
    if min(input_size[1:]) < backbone.min_side:
        size = "x".join(map(str, input_size))
        raise ConfigError(
            f"{config.backbone} needs images of {backbone.min_side} pixels or more, got {size}"
        )
    with own_randomness("weights", config.seed):
        model = backbone.make(input_size, num_classes, config.dropout)
    if config.pretrained:
        _load_published(model, config.backbone, backbone.weights)
    return model


def _smallcnn(input_size: Shape, num_classes: int, dropout: float) -> nn.Module:
    """Three 3x3 convolutions of 32, 32, 64 channels, batch norm, ReLU; two poolings between."""
    layers: list[nn.Module] = []
    channels = input_size[0]
    for index, width in enumerate((32, 32, 64)):
        layers += [nn.Conv2d(channels, width, 3, padding=1, bias=False)]
        layers += [nn.MaxPool2d(2)] if index < 2 else []
        layers += [_batch_norm(width), nn.ReLU(inplace=True)]
        channels = width
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout)]
    model = nn.Sequential(*layers, nn.Linear(channels, num_classes))
    _init_convolutions(model)
    return model


def _batch_norm(channels: int) -> nn.BatchNorm2d:
    """With running statistics that follow the weights closely (as in cifar10-airbench).

    An evaluation in the first epochs, by which a rung decides, is up to five points better than
    with torch's own momentum of 0.1; training is the same.
    """
    return nn.BatchNorm2d(channels, momentum=0.4)


class _Block(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A of He et al. 2016)."""

    def __init__(self, channels: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.bn1 = _batch_norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn2 = _batch_norm(width)
        self.stride = stride
        self.new_channels = width - channels

    def forward(self, x: Tensor) -> Tensor:
        inner = functional.relu(self.bn1(self.conv1(x)), inplace=True)
        inner = self.bn2(self.conv2(inner))
        if self.new_channels > 0:
            x = functional.pad(
                x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels)
            )
        return functional.relu(inner + x, inplace=True)


def _cifar_resnet(num_blocks: int) -> "Maker":
    """The ResNet of 6 num_blocks + 2 layers, 16, 32, 64 channels (He et al. 2016, 4.2)."""

    def make(input_size: Shape, num_classes: int, dropout: float) -> nn.Module:
        layers: list[nn.Module] = [
            nn.Conv2d(input_size[0], 16, 3, padding=1, bias=False),
            _batch_norm(16),
            nn.ReLU(inplace=True),
        ]
        channels = 16
        for width in (16, 32, 64):
            for index in range(num_blocks):
                stride = 2 if index == 0 and width > 16 else 1
                layers.append(_Block(channels, width, stride))
                channels = width
        layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(dropout)]
        model = nn.Sequential(*layers, nn.Linear(channels, num_classes))
        _init_convolutions(model)
        return model

    return make


def _init_convolutions(model: nn.Module) -> None:
    """He et al. 2015, as torchvision's ResNets do."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def _resnet(constructor: Callable[..., Any]) -> "Maker":
    def make(input_size: Shape, num_classes: int, dropout: float) -> nn.Module:
        model = constructor(num_classes=num_classes)
        small = _is_small(input_size)
        if small:
            model.maxpool = nn.Identity()
        kernel, stride = (3, 1) if small else (7, 2)
        model.conv1 = nn.Conv2d(input_size[0], 64, kernel, stride, kernel // 2, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.fc = nn.Sequential(nn.Dropout(dropout), model.fc)
        return _module(model)

    return make


def _mobile(constructor: Callable[..., Any]) -> "Maker":
    """MobileNetV3 and EfficientNet: the same stem, and a dropout of their own."""

    def make(input_size: Shape, num_classes: int, dropout: float) -> nn.Module:
        model = constructor(num_classes=num_classes, dropout=dropout)
        stem = model.features[0][0]
        stride = 1 if _is_small(input_size) else 2
        model.features[0][0] = nn.Conv2d(
            input_size[0], stem.out_channels, 3, stride, padding=1, bias=False
        )
        nn.init.kaiming_normal_(model.features[0][0].weight, mode="fan_out")
        return _module(model)

    return make


def _convnext(constructor: Callable[..., Any]) -> "Maker":
    """ConvNeXt; its patches are 2x2 instead of 4x4 on small images."""

    def make(input_size: Shape, num_classes: int, dropout: float) -> nn.Module:
        model = constructor(num_classes=num_classes)
        patch = 2 if _is_small(input_size) else 4
        model.features[0][0] = nn.Conv2d(input_size[0], 96, patch, patch)
        nn.init.trunc_normal_(model.features[0][0].weight, std=0.02)
        nn.init.zeros_(model.features[0][0].bias)
        model.classifier.insert(2, nn.Dropout(dropout))
        return _module(model)

    return make


def _is_small(input_size: Shape) -> bool:
    return max(input_size[1:]) <= SMALL_SIDE


def _module(model: Any) -> nn.Module:
    assert isinstance(model, nn.Module)
    return model


Maker = Callable[[Shape, int, float], nn.Module]
"""(C,H,W), number of classes, dropout -> network with random weights."""


@dataclass(frozen=True, kw_only=True)
class Backbone:
    """How a network is made, the least side of an image in pixels, its published weights."""

    make: Maker
    min_side: int = 8
    weights: Any = None


BACKBONES: dict[str, Backbone] = {
    "smallcnn": Backbone(make=_smallcnn),
    "resnet8": Backbone(make=_cifar_resnet(1)),
    "resnet20": Backbone(make=_cifar_resnet(3)),
    "resnet18": Backbone(make=_resnet(models.resnet18), weights=models.ResNet18_Weights.DEFAULT),
    "resnet50": Backbone(make=_resnet(models.resnet50), weights=models.ResNet50_Weights.DEFAULT),
    "mobilenet_v3_small": Backbone(
        make=_mobile(models.mobilenet_v3_small),
        weights=models.MobileNet_V3_Small_Weights.DEFAULT,
    ),
    "mobilenet_v3_large": Backbone(
        make=_mobile(models.mobilenet_v3_large),
        weights=models.MobileNet_V3_Large_Weights.DEFAULT,
    ),
    "efficientnet_b0": Backbone(
        make=_mobile(models.efficientnet_b0), weights=models.EfficientNet_B0_Weights.DEFAULT
    ),
    "convnext_tiny": Backbone(
        make=_convnext(models.convnext_tiny),
        min_side=16,
        weights=models.ConvNeXt_Tiny_Weights.DEFAULT,
    ),
}


def _load_published(model: nn.Module, name: str, weights: Any) -> None:
    """Copy torchvision's weights where names and shapes fit; log the layers left at random."""
    if weights is None:
        raise ConfigError(f"pretrained: there are no published weights of {name}")
    path = Path(torch.hub.get_dir(), "checkpoints", Path(weights.url).name)
    try:
        published = weights.get_state_dict(
            progress=False, check_hash=True, weights_only=True, map_location="cpu"
        )
    except OSError as error:
        raise ConfigError(
            f"pretrained {name}: {path} isn't there, and can't be downloaded ({error})"
        ) from error
    except Exception as error:  # torch.load raises whatever a broken file leads to
        raise ConfigError(
            f"pretrained {name}: {path} can't be read; delete it to have it downloaded again"
        ) from error
    own = model.state_dict()
    fitting = {
        key: tensor
        for key, tensor in published.items()
        if key in own and own[key].shape == tensor.shape
    }
    model.load_state_dict(fitting, strict=False)
    left = sorted({key.rpartition(".")[0] for key in own if key not in fitting})
    logger.info("pretrained %s: left at random: %s", name, ", ".join(left) or "nothing")
