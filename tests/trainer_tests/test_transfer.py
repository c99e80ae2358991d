"""Trainings that start from weights, and train a part of the network."""

import logging
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from trainer import features
from trainer.backbones import BACKBONES, as_fed, build
from trainer.config import ConfigError, TrainConfig
from trainer.data.dataset import ImageDataset
from trainer.data.registry import load
from trainer.device import DevicePlan
from trainer.evaluate import classify, evaluate
from trainer.export.model import ExportModel
from trainer.heads import TwoLayerHead, head_name, num_trained_stages, stage_of
from trainer.loop import train
from trainer.optim import make_optimizer, set_lr
from trainer.reports import ProgressReport
from trainer.weights import backbone_of, digest, read_weights

SIZE = (1, 8, 8)
PLAN = DevicePlan(device="cpu", num_threads=1)


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    whole = load("digits", seed=0)
    few = {"train": whole.train.take(range(256)), "val": whole.val.take(range(128))}
    return ImageDataset(**{**vars(whole), **few})


def network(**fields: Any) -> nn.Module:
    config = TrainConfig.from_dict({"backbone": "resnet8", **fields})
    return build(config, input_size=SIZE, num_classes=10)


def saved(path: Path, model: nn.Module) -> Path:
    """The model as our export has it."""
    exported = ExportModel(model, mean=[0.25], std=[0.5])
    path.write_bytes(
        safetensors.torch.save({k: v.clone() for k, v in exported.state_dict().items()})
    )
    return path


def run(data: ImageDataset, **fields: Any) -> list[ProgressReport]:
    config = TrainConfig.from_dict(
        {"backbone": "smallcnn", "epochs": 2, "batch_size": 32, **fields}
    )
    return list(train(config, data, PLAN))


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("weights") / "model.safetensors", network(seed=7))


def test_all_but_the_head_comes_from_the_file(weights: Path) -> None:
    own, given = network(weights=str(weights)).state_dict(), network(seed=7).state_dict()
    fresh = network().state_dict()
    for name in own:
        assert torch.equal(own[name], (fresh if name.startswith("9.") else given)[name]), name


def test_the_number_of_classes_may_be_another_one(weights: Path) -> None:
    config = TrainConfig(backbone="resnet8", weights=str(weights))
    logits = build(config, input_size=SIZE, num_classes=3).eval()(torch.zeros(2, *SIZE))
    assert logits.shape == (2, 3)


def test_data_is_normalised_as_the_weights_are_used_to(weights: Path, digits: ImageDataset) -> None:
    fed = as_fed(TrainConfig(backbone="resnet8", weights=str(weights)), digits)
    assert (fed.mean, fed.std) == ((0.25,), (0.5,))
    assert as_fed(TrainConfig(backbone="resnet8"), digits) is digits
    published = as_fed(TrainConfig(backbone="resnet18"), digits)
    assert published is digits


@pytest.mark.parametrize("nesting", [None, "state_dict", "model"])
def test_a_pth_file_of_tensors_by_name_is_read(nesting: str | None, tmp_path: Path) -> None:
    content: Mapping[str, Any] = network(seed=7).state_dict()
    torch.save({nesting: content} if nesting else content, tmp_path / "some.pth")
    own = network(weights=str(tmp_path / "some.pth")).state_dict()
    assert torch.equal(own["3.conv1.weight"], network(seed=7).state_dict()["3.conv1.weight"])


def test_a_first_layer_of_other_channels_is_adapted(weights: Path) -> None:
    config = TrainConfig(backbone="resnet8", weights=str(weights))
    grey = build(config, input_size=SIZE, num_classes=10).eval()
    colour = build(config, input_size=(3, 8, 8), num_classes=10).eval()
    picture = torch.randn(4, 1, 8, 8)
    body = [model[:9](x) for model, x in ((grey, picture), (colour, picture.expand(4, 3, 8, 8)))]  # type: ignore[index]
    torch.testing.assert_close(body[0], body[1])


def test_weights_that_never_begin_or_have_no_end_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.pth")
    (tmp_path / "endless.pth").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "manifest.json")
    for name in ("pipe.pth", "endless.pth"):
        assert backbone_of(tmp_path / name) is None
        for read in (digest, read_weights):
            with pytest.raises(ConfigError, match=rf"{name}.*no regular file"):
                read(tmp_path / name)


def test_weights_of_another_network_are_refused_with_the_layers_that_differ(weights: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        network(backbone="resnet20", weights=str(weights))
    assert re.fullmatch(
        r"weights \S+ is of another network: these layers differ: 10\.bn1, .* and \d+ more",
        str(caught.value),
    )


def broken(folder: Path) -> Path:
    (folder / "broken.safetensors").write_bytes(b"no weights")
    return folder / "broken.safetensors"


def of_no_tensors(folder: Path) -> Path:
    torch.save({"epoch": 3}, folder / "epoch.pth")
    return folder / "epoch.pth"


def pickled(folder: Path) -> Path:
    torch.save(network(), folder / "model.pth")
    return folder / "model.pth"


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda folder: folder / "nothing.pth", "No such file"),
        (lambda folder: folder, "No such file"),
        (broken, "can't be read"),
        (of_no_tensors, "it holds no state_dict"),
        (pickled, "can't be read"),
    ],
)
def test_a_file_that_holds_no_weights_is_one_line(make: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said) as caught:
        network(weights=str(make(tmp_path)))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", sorted(BACKBONES))
def test_every_parameter_is_in_a_stage_and_each_stage_has_some(name: str) -> None:
    model = network(backbone=name) if name != "convnext_tiny" else build(
        TrainConfig(backbone=name), input_size=(1, 16, 16), num_classes=10
    )  # fmt: skip
    stages = BACKBONES[name].stages
    found = [stage_of(each, stages, head_name(model)) for each, _ in model.named_parameters()]
    assert found == sorted(found)
    assert set(found) == set(range(len(stages) + 1))
    mentioned = {prefix for stage in stages for prefix in stage}
    assert all(model.get_submodule(prefix) for prefix in mentioned)


def test_gradual_unfreezing_goes_from_the_head_to_the_image_in_the_first_half() -> None:
    found = [num_trained_stages("gradual", 4, progress / 8) for progress in range(9)]
    assert found == [0, 1, 2, 3, 4, 4, 4, 4, 4]
    assert num_trained_stages("last2", 4, 0.0) == 2
    assert num_trained_stages("last3", 2, 0.0) == 2


def changed(reports: list[ProgressReport], **fields: Any) -> set[str]:
    """The first parts of the names of what training has changed, statistics included."""
    before = network(**{"backbone": "smallcnn", **fields}).state_dict()
    after: Mapping[str, Tensor] = reports[-1].state.model.state_dict()
    return {name.split(".")[0] for name in after if not torch.equal(before[name], after[name])}


@pytest.mark.parametrize(
    ("trainable", "trained"),
    [
        ("head", {"14"}),
        ("last1", {"8", "9", "14"}),
        ("last2", {"4", "6", "8", "9", "14"}),
        ("gradual", {"0", "2", "4", "6", "8", "9", "14"}),
        ("all", {"0", "2", "4", "6", "8", "9", "14"}),
    ],
)
def test_what_is_frozen_stays_as_it_is_with_its_statistics(
    trainable: str, trained: set[str], digits: ImageDataset
) -> None:
    for flip in (False, True):
        reports = run(digits, trainable=trainable, flip=flip)
        assert changed(reports) == trained


def test_the_backbone_has_a_learning_rate_of_its_own() -> None:
    config = TrainConfig(backbone="resnet8", backbone_lr=0.1)
    model = network()
    optimizer = make_optimizer(config, model)
    set_lr(optimizer, 2.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        assert rates[id(parameter)] == pytest.approx(2.0 if name.startswith("9.") else 0.2)
    weight, bias = model[9].weight, model[9].bias  # type: ignore[index]
    decays = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert (decays[id(weight)], decays[id(bias)]) == (config.weight_decay, 0.0)


@pytest.mark.parametrize("backbone", ["smallcnn", "resnet18", "mobilenet_v3_small"])
def test_a_head_of_two_layers_stands_where_the_last_one_stood(backbone: str) -> None:
    model = network(backbone=backbone, head_hidden=20, dropout=0.25)
    head = model.get_submodule(head_name(model))
    assert isinstance(head, TwoLayerHead)
    assert [type(layer).__name__ for layer in head] == ["Linear", "ReLU", "Dropout", "Linear"]
    hidden, _, dropout, last = head
    assert isinstance(dropout, nn.Dropout)
    assert isinstance(hidden, nn.Linear)
    assert isinstance(last, nn.Linear)
    assert (hidden.out_features, dropout.p, last.out_features) == (20, 0.25, 10)
    assert model.eval()(torch.zeros(2, *SIZE)).shape == (2, 10)


def test_features_are_what_the_whole_network_hands_to_its_head(digits: ImageDataset) -> None:
    (*_, last) = run(digits, trainable="head", lr=0.1)
    model = last.state.model
    whole = evaluate(model, digits.val, PLAN, mean=digits.mean, std=digits.std)
    assert last.val_accuracy == pytest.approx(whole.accuracy, abs=1e-6)
    assert last.val_loss == pytest.approx(whole.loss, rel=1e-4)


def test_head_only_training_computes_features_once_in_a_process(
    digits: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    original = classify

    def counted(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(1)
        return original(*args, **kwargs)

    features._features.cache_clear()
    monkeypatch.setattr(features, "classify", counted)
    for lr in (0.01, 0.1, 0.3):
        run(digits, trainable="head", lr=lr)
    assert len(calls) == 2  # train and val
    run(digits, trainable="head", seed=1)  # other random weights, other features
    assert len(calls) == 4


@pytest.mark.parametrize("fields", [
    {"trainable": "head"}, {"trainable": "head", "flip": True, "dropout": 0.2},
    {"trainable": "gradual", "epochs": 4}, {"trainable": "last1", "backbone_lr": 0.3},
    {"head_hidden": 16, "dropout": 0.3}, {"trainable": "head", "average": "ema"},
])  # fmt: skip
def test_a_training_that_was_cut_goes_on_bit_for_bit(
    fields: dict[str, Any], digits: ImageDataset
) -> None:
    whole = [report.to_dict() for report in run(digits, **fields)]
    config = TrainConfig.from_dict(
        {"backbone": "smallcnn", "epochs": 2, "batch_size": 32, **fields}
    )
    for cut in range(1, len(whole)):
        reports = train(config, digits, PLAN)
        for _ in range(cut):
            content = next(reports).state.to_bytes()
        reports.close()
        rest = [report.to_dict() for report in train(config, digits, PLAN, resume=content)]
        for one, other in zip(whole[cut:], rest, strict=True):
            for name in ("step", "train_loss", "val_loss", "val_accuracy", "averages"):
                assert one[name] == other[name], name


def test_a_training_is_resumed_without_the_file_that_it_began_with(
    digits: ImageDataset, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = saved(tmp_path / "model.safetensors", network(backbone="smallcnn", seed=7))
    config = TrainConfig(backbone="smallcnn", epochs=2, batch_size=32, weights=str(path))
    with caplog.at_level(logging.INFO):
        (first, *rest) = train(config, digits, PLAN)
    assert f"weights {path}: left at random: 14" in caplog.text
    reports = train(config, digits, PLAN)
    content = next(reports).state.to_bytes()
    reports.close()
    again = list(train(config, digits, PLAN, resume=content))
    assert first.val_accuracy >= 0
    assert [each.val_loss for each in again] == [each.val_loss for each in rest]
    twice = again[0].state.to_bytes()
    assert isinstance(twice, bytes)


@pytest.mark.parametrize(
    "fields",
    [
        {"trainable": "some"},
        {"backbone_lr": 0.0},
        {"head_hidden": -1},
        {"pretrained": True, "weights": "a.pth"},
    ],
)
def test_what_can_t_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        TrainConfig.from_dict(fields)
