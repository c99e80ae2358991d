"""LightningModules as networks: found, given what they take, refused in one line."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.parts import documented_module
from trainer import modules
from trainer.backbones import build, find_backbone
from trainer.config import ConfigError, TrainConfig
from trainer.flops import training_flops
from trainer.footprint import measure_footprint

SIZE = (1, 8, 8)
MODULES = '''
import pytorch_lightning
from lightning.pytorch import LightningModule
from torch import nn
from my_package import Net

class Other(pytorch_lightning.LightningModule):
    """Of the other package, with whatever is given."""
    def __init__(self, num_classes, **others):
        super().__init__()
        self.others = others
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, num_classes))
    def forward(self, images):
        return self.layers(images)

class Needy(Net):
    def __init__(self, num_classes, input_size, width):
        super().__init__(num_classes, input_size, hidden=width)

class Picky(Net):
    def __init__(self, num_classes, input_size, dropout=0.25, optimizer="lion", mixup=0.5, epochs=3,
                 label_smoothing=None):
        super().__init__(num_classes, input_size)

class Late(LightningModule):
    def __init__(self, num_classes):
        super().__init__()
        self.num_classes, self.layers = num_classes, None
    def configure_model(self):
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(64, self.num_classes))
    def forward(self, images):
        return self.layers(images)

class Mixed(Net):
    def __init__(self, num_classes, input_size):
        super().__init__(num_classes, input_size)
        self.layers[2].eval()

class WithoutForward(LightningModule):
    pass

class Mapped(Net):
    def forward(self, images):
        return {"logits": super().forward(images)}

class Wide(Net):
    def forward(self, images):
        return super().forward(images)[:, :, None]

class Fails(LightningModule):
    def __init__(self):
        raise ValueError("no\\nsuch luck")

class Plain(nn.Module):
    pass

number = 3
'''


@pytest.fixture(autouse=True)
def packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_package.py").write_text(documented_module())
    (tmp_path / "my_modules.py").write_text(MODULES)
    (tmp_path / "my_broken.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("my_package", "my_modules", "my_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    modules.find_class.cache_clear()


def network(name: str, **fields: Any) -> Any:
    config = TrainConfig.from_dict({"backbone": f"lightning:{name}", **fields})
    return build(config, input_size=SIZE, num_classes=5)


def test_it_is_given_what_it_takes_by_name() -> None:
    model = network("my_package:Net", lr=0.25, dropout=0.5, **{"module.hidden": 12})
    assert (model.lr, model.weight_decay) == (0.25, 0.01)
    assert model.layers[1].out_features == 12
    assert model.layers[4].p == 0.5
    assert model.training
    assert model(torch.zeros(3, *SIZE)).shape == (3, 5)


def test_one_of_the_other_package_takes_any_argument_but_no_field_that_it_does_not_name() -> None:
    model = network("my_modules:Other", lr=0.25, **{"module.width": 3, "module.lr": 2})
    assert model.others == {"width": 3, "lr": 2}
    assert modules.trainer_package(model) == "pytorch_lightning"


def test_layers_may_be_made_late_and_modes_are_left_as_they_are() -> None:
    assert network("my_modules:Late")(torch.zeros(1, *SIZE)).shape == (1, 5)
    model = network("my_modules:Mixed")
    assert model.training
    assert not model.layers[2].training


def test_weights_come_from_the_seed_alone() -> None:
    before = torch.get_rng_state()
    first, again, other = (network("my_package:Net", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(first.layers[1].weight, again.layers[1].weight)
    assert not torch.equal(first.layers[1].weight, other.layers[1].weight)
    assert torch.equal(torch.get_rng_state(), before)


def test_size_and_operations_are_those_of_its_arguments() -> None:
    found = []
    for hidden in (8, 16):
        config = TrainConfig(backbone="lightning:my_package:Net", module={"hidden": hidden})
        footprint = measure_footprint(
            config, input_size=SIZE, num_classes=5, device="cpu", times_latency=False
        )
        flops = training_flops(config, input_size=SIZE, num_classes=5)
        found.append((footprint.num_params, flops))
    assert found == [(64 * n + n + 2 * n + 5 * n + 5, 3 * 2 * (64 * n + 5 * n)) for n in (8, 16)]


@pytest.mark.parametrize(
    ("name", "fields", "said"),
    [
        (
            "my_nowhere:Net",
            {},
            "ModuleNotFoundError: No module named 'my_nowhere'; launch in its folder",
        ),
        ("my_broken:Net", {}, "No module named 'no_such_package'"),
        ("my_package:None", {}, "AttributeError"),
        ("my_package", {}, "AttributeError"),
        (":Net", {}, "ValueError"),
        ("my_modules:Plain", {}, "my_modules:Plain is no LightningModule"),
        ("my_modules:number", {}, "my_modules:number is no LightningModule"),
        ("my_modules:Fails", {}, "my_modules:Fails: ValueError: no such luck"),
        ("my_modules:WithoutForward", {}, "can't take images of 1x8x8: NotImplementedError"),
        ("my_modules:Mapped", {}, "forward gave dict for 2 images of 5 classes, not logits (2, 5)"),
        ("my_modules:Wide", {}, "forward gave (2, 5, 1) for 2 images of 5 classes"),
        ("my_modules:Needy", {}, "Needy needs width: --set module.width=VALUE"),
        ("my_package:Net", {"module.hiden": 3}, "unknown argument 'hiden', did you mean hidden?"),
        ("my_package:Net", {"module.hidden": "x"}, "Net: TypeError"),
    ],
)
def test_what_is_no_network_is_one_line(name: str, fields: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        network(name, **fields)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_lightning_it_is_said_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("lightning", "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as caught:
        find_backbone("lightning:my_package:Net")
    assert str(caught.value) == (
        "backbone lightning:my_package:Net needs lightning: pip install 'hpo-vision[lightning]'"
    )


@pytest.mark.parametrize(
    "fields",
    [
        {"mixup": 0.1}, {"cutmix": 1.0}, {"balance": "loss"}, {"balance": "smote"},
        {"trainable": "head"}, {"pretrained": True}, {"weights": "w.pth"}, {"average": "ema"},
        {"head_hidden": 8}, {"backbone_lr": 0.5},
    ],
    ids=str,
)  # fmt: skip
def test_what_its_own_training_step_can_not_have_is_refused(fields: dict[str, Any]) -> None:
    name = "lightning:my_package:Net"
    (field,) = fields
    with pytest.raises(ConfigError, match=f"^{field} = .* can't be had with {name}"):
        modules.check_module_fields(TrainConfig.from_dict({"backbone": name, **fields}))


def test_what_the_class_takes_is_its_own_affair() -> None:
    fields = {"backbone": "lightning:my_modules:Picky", "mixup": 0.1, "balance": "sampling"}
    modules.check_module_fields(TrainConfig.from_dict(fields))
    assert modules.own_defaults("lightning:my_modules:Picky") == {
        "dropout": 0.25, "module.optimizer": "lion", "mixup": 0.5,
    }  # fmt: skip


def test_fields_that_reach_no_network_are_known() -> None:
    fields = ("lr", "clip_norm", "flip", "batch_size", "module.hidden", "dropout", "trainable")
    mine, other = "lightning:my_package:Net", "lightning:my_modules:Other"
    assert modules.idle_names(fields, [mine]) == ["clip_norm"]
    assert modules.idle_names(fields, [other]) == ["lr", "clip_norm", "dropout"]
    assert modules.idle_names(fields, [other, mine]) == ["clip_norm"]
    assert modules.idle_names(fields, [mine, "resnet8"]) == []
