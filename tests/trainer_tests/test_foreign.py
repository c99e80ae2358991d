"""Networks that are not ours: timm's and a user's own."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from trainer import foreign
from trainer.backbones import build, find_backbone
from trainer.config import ConfigError, TrainConfig
from trainer.data.dataset import ImageDataset
from trainer.data.registry import load
from trainer.device import DevicePlan
from trainer.loop import train

MODULE = """
import torch
from torch import nn

def tiny(input_size, num_classes, dropout):
    channels, height, width = input_size
    return nn.Sequential(
        nn.Conv2d(channels, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Dropout(dropout), nn.Linear(32, num_classes),
    )

def fails(input_size, num_classes, dropout):
    raise RuntimeError("no\\nsuch luck")

def of_ten(input_size, num_classes, dropout):
    return tiny(input_size, 10, dropout)

def without_a_linear_layer(input_size, num_classes, dropout):
    return nn.Sequential(nn.Conv2d(1, num_classes, 8), nn.Flatten())

def nothing(input_size, num_classes, dropout):
    return None

number = 3
"""


@pytest.fixture(autouse=True)
def networks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_networks.py").write_text(MODULE)
    (tmp_path / "my_broken.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_networks", "my_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    foreign.own_backbone.cache_clear()


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    whole = load("digits", seed=0)
    return ImageDataset(**{**vars(whole), "train": whole.train.take(range(256))})


def network(name: str, size: tuple[int, int, int] = (1, 8, 8), **fields: Any) -> nn.Module:
    config = TrainConfig.from_dict({"backbone": name, **fields})
    return build(config, input_size=size, num_classes=5)


@pytest.mark.parametrize("name", ["my_networks:tiny", "timm:resnet10t"])
@pytest.mark.parametrize("fields", [{}, {"trainable": "head"}, {"head_hidden": 8}])
def test_it_is_trained_as_one_of_ours(
    name: str, fields: dict[str, Any], digits: ImageDataset
) -> None:
    config = TrainConfig.from_dict({"backbone": name, "epochs": 1, "lr": 1e-2, **fields})
    (*_, last) = train(config, digits, DevicePlan(device="cpu", num_threads=1))
    assert 0 < last.val_accuracy <= 1
    again = list(train(config, digits, DevicePlan(device="cpu", num_threads=1)))
    assert again[-1].val_loss == last.val_loss


def test_timm_s_networks_take_any_channels_and_dropout() -> None:
    model = network("timm:mobilenetv3_small_050", (2, 40, 40), dropout=0.3).eval()
    assert model(torch.zeros(3, 2, 40, 40)).shape == (3, 5)
    assert model.drop_rate == 0.3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("my_networks:none", "AttributeError"),
        ("my_nowhere:tiny", "ModuleNotFoundError"),
        ("my_broken:tiny", "No module named 'no_such_package'"),
        ("my_networks:number", "is no function"),
        ("my_networks:fails", "RuntimeError: no such luck"),
        ("my_networks:of_ten", "gave \\(2, 10\\) for 2 images of 5 classes"),
        ("my_networks:without_a_linear_layer", "ends in a linear layer"),
        ("my_networks:nothing", "gave NoneType, not a torch.nn.Module"),
        ("timm:resnet10q", "timm has no 'resnet10q', did you mean resnet"),
        (":tiny", "ValueError"),
        ("my_networks:", "AttributeError"),
    ],
)
def test_what_is_no_network_is_one_line(name: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        network(name)
    assert "\n" not in str(caught.value)


def test_without_timm_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    foreign.timm_backbone.cache_clear()
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ConfigError) as caught:
        find_backbone("timm:resnet10t")
    assert str(caught.value) == (
        "backbone timm:resnet10t needs timm: pip install 'hpo-vision[timm]'"
    )
