"""BACKBONES: networks by name, for any number of channels, small images included."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from trainer.config import ConfigError, TrainConfig, is_module, unknown_name
from trainer.data.dataset import ImageDataset
from trainer.foreign import Backbone, Maker, Shape, own_backbone, timm_backbone
from trainer.heads import freeze, widen_head
from trainer.modules import build_module, module_backbone
from trainer.seeds import own_randomness
from trainer.weights import load_weights, starting_weights, with_statistics_of

SMALL_SIDE = 64
"""Up to this many pixels, torchvision's networks get the small-image stem."""


def build(config: TrainConfig, *, input_size: Shape, num_classes: int) -> nn.Module:
    """The config's backbone: (N,C,H,W) float -> logits (N,num_classes) float.

    input_size: (C,H,W). Dropout stands before the last layer and nowhere else (stochastic
    depth of efficientnet and convnext stays). Weights come from config.seed, or from a file or
    torchvision where they fit. Raises ConfigError if the name is unknown, the image too small, or
    the weights aren't there or are another network's.
    """
    if is_module(config.backbone):
        return build_module(config, input_size=input_size, num_classes=num_classes)
    backbone = find_backbone(config.backbone)
    if min(input_size[1:]) < backbone.min_side:
        size = "x".join(map(str, input_size))
        raise ConfigError(
            f"{config.backbone} needs images of {backbone.min_side} pixels or more, got {size}"
        )
    with own_randomness("weights", config.seed):
        model = backbone.make(input_size, num_classes, config.dropout)
        widen_head(model, config)
    weights = starting_weights(config, backbone.weights)
    if weights is not None:
        load_weights(model, weights, stem=backbone.stages[0])
    freeze(model, config.trainable, backbone.stages, progress=1.0)
    return model


def as_fed(config: TrainConfig, data: ImageDataset) -> ImageDataset:
    """The data, with the mean and std that the config's weights are used to be fed with.

    Raises ConfigError if the backbone is unknown or its weights can't be read.
    """
    published = find_backbone(config.backbone).weights
    return with_statistics_of(starting_weights(config, published), data)


def find_backbone(name: str) -> Backbone:
    """A name of BACKBONES, timm:NAME, or one of the user's own: package:function, or
    lightning:package:Class.

    Raises ConfigError if there is none.
    """
    if name.startswith("timm:"):
        return timm_backbone(name.removeprefix("timm:"))
    if is_module(name):
        return module_backbone(name)
    if ":" in name:
        return own_backbone(name)
    if name not in BACKBONES:
        raise ConfigError(unknown_name("backbone", name, BACKBONES))
    return BACKBONES[name]


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
            # every second pixel; of a slice the gradient would lose its memory format
            x = functional.avg_pool2d(x, 1, self.stride)
            x = functional.pad(x, (0, 0, 0, 0, 0, self.new_channels))
        return functional.relu(inner + x, inplace=True)


def _cifar_resnet(num_blocks: int) -> Maker:
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


def _torchvision(name: str, **options: Any) -> Any:
    """One of torchvision's networks; importing those takes as long as torch itself."""
    from torchvision import models

    return models.get_model(name, **options)


def _weights(name: str) -> Callable[[], Any]:
    def find() -> Any:
        from torchvision import models

        return models.get_model_weights(name)["DEFAULT"]

    return find


def _resnet(name: str) -> Maker:
    def make(input_size: Shape, num_classes: int, dropout: float) -> nn.Module:
        model = _torchvision(name, num_classes=num_classes)
        small = _is_small(input_size)
        if small:
            model.maxpool = nn.Identity()
        kernel, stride = (3, 1) if small else (7, 2)
        model.conv1 = nn.Conv2d(input_size[0], 64, kernel, stride, kernel // 2, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.fc = nn.Sequential(nn.Dropout(dropout), model.fc)
        return _module(model)

    return make


def _mobile(name: str) -> Maker:
    """MobileNetV3 and EfficientNet: the same stem, and a dropout of their own."""

    def make(input_size: Shape, num_classes: int, dropout: float) -> nn.Module:
        model = _torchvision(name, num_classes=num_classes, dropout=dropout)
        stem = model.features[0][0]
        stride = 1 if _is_small(input_size) else 2
        model.features[0][0] = nn.Conv2d(
            input_size[0], stem.out_channels, 3, stride, padding=1, bias=False
        )
        nn.init.kaiming_normal_(model.features[0][0].weight, mode="fan_out")
        return _module(model)

    return make


def _convnext(name: str) -> Maker:
    """ConvNeXt; its patches are 2x2 instead of 4x4 on small images."""

    def make(input_size: Shape, num_classes: int, dropout: float) -> nn.Module:
        model = _torchvision(name, num_classes=num_classes)
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


_RESNET_STAGES = (("conv1", "bn1"), ("layer1",), ("layer2",), ("layer3",), ("layer4",))


def _features(*stages: Sequence[int]) -> tuple[tuple[str, ...], ...]:
    """Stages of a network whose layers are numbered in `features`."""
    return tuple(tuple(f"features.{index}" for index in stage) for stage in stages)


BACKBONES: dict[str, Backbone] = {
    "smallcnn": Backbone(make=_smallcnn, stages=(("0", "2"), ("4", "6"), ("8", "9"))),
    "resnet8": Backbone(make=_cifar_resnet(1), stages=(("0", "1"), ("3",), ("4",), ("5",))),
    "resnet20": Backbone(
        make=_cifar_resnet(3),
        stages=(("0", "1"), ("3", "4", "5"), ("6", "7", "8"), ("9", "10", "11")),
    ),
    "resnet18": Backbone(
        make=_resnet("resnet18"),
        stages=_RESNET_STAGES,
        weights=_weights("resnet18"),
    ),
    "resnet50": Backbone(
        make=_resnet("resnet50"),
        stages=_RESNET_STAGES,
        weights=_weights("resnet50"),
    ),
    "mobilenet_v3_small": Backbone(
        make=_mobile("mobilenet_v3_small"),
        stages=_features([0], [1], [2, 3], range(4, 9), range(9, 13)),
        weights=_weights("mobilenet_v3_small"),
    ),
    "mobilenet_v3_large": Backbone(
        make=_mobile("mobilenet_v3_large"),
        stages=_features([0, 1], [2, 3], range(4, 7), range(7, 13), range(13, 17)),
        weights=_weights("mobilenet_v3_large"),
    ),
    "efficientnet_b0": Backbone(
        make=_mobile("efficientnet_b0"),
        stages=_features([0, 1], [2], [3], [4, 5], [6, 7, 8]),
        weights=_weights("efficientnet_b0"),
    ),
    "convnext_tiny": Backbone(
        make=_convnext("convnext_tiny"),
        stages=_features([0, 1], [2, 3], [4, 5], [6, 7]),
        min_side=16,
        weights=_weights("convnext_tiny"),
    ),
}
