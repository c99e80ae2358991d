"""Learning from images without labels."""

import copy
import dataclasses
from typing import Any

import pytest
import safetensors.torch
import torch
from torch.nn import functional

from trainer.backbones import build
from trainer.config import ConfigError, TrainConfig
from trainer.data.dataset import ImageDataset
from trainer.data.registry import load
from trainer.device import DevicePlan
from trainer.export.safetensors import weights_to_bytes
from trainer.pretraining import METHODS, PretrainConfig, Pretraining, pretrain, view
from trainer.state import CheckpointError
from trainer.weights import read_weights

PLAN = DevicePlan(device="cpu", num_threads=1)


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    whole = load("digits", seed=0)
    return ImageDataset(**{**vars(whole), "train": whole.train.take(range(256))})


def config(**fields: Any) -> PretrainConfig:
    given = {"backbone": "smallcnn", "epochs": 3, "batch_size": 64, "queue": 128, **fields}
    return PretrainConfig(**given)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_the_loss_falls_and_labels_are_not_looked_at(method: str, digits: ImageDataset) -> None:
    reports = list(pretrain(config(method=method, epochs=6), digits, PLAN))
    assert [report.epoch for report in reports] == [1, 2, 3, 4, 5, 6]
    # in the first epoch moco's queue holds random vectors, which are easily told from views
    assert reports[-1].loss < reports[1].loss - 0.02
    none = torch.zeros_like(digits.train.labels)
    unlabelled = dataclasses.replace(
        digits, train=type(digits.train)(digits.train.images, none), class_names=("a", "b"),
        val=digits.val.take([]),
    )  # fmt: skip
    (first, *_) = pretrain(config(method=method), unlabelled, PLAN)
    (same, *_) = pretrain(config(method=method), digits, PLAN)
    assert first.loss == same.loss


@pytest.mark.parametrize("method", sorted(METHODS))
def test_a_pretraining_that_was_cut_goes_on_bit_for_bit(method: str, digits: ImageDataset) -> None:
    whole = [report.loss for report in pretrain(config(method=method), digits, PLAN)]
    for cut in (1, 2):
        reports = pretrain(config(method=method), digits, PLAN)
        for _ in range(cut):
            content = next(reports).state.to_bytes()
        rest = [r.loss for r in pretrain(config(method=method), digits, PLAN, resume=content)]
        assert rest == whole[cut:]


def test_a_checkpoint_of_another_pretraining_is_refused(digits: ImageDataset) -> None:
    (report, *_) = pretrain(config(epochs=1), digits, PLAN)
    content = report.state.to_bytes()
    for other, data in ((config(epochs=2), digits), (config(epochs=1), load("digits", seed=0))):
        with pytest.raises(CheckpointError, match="of another pretraining"):
            next(pretrain(other, data, PLAN, resume=content))
    with pytest.raises(CheckpointError, match="broken"):
        next(pretrain(config(epochs=1), digits, PLAN, resume=b"no checkpoint"))


def test_simclr_is_the_cross_entropy_of_the_other_view_among_all_others(
    digits: ImageDataset,
) -> None:
    state = Pretraining(config(), digits, PLAN)
    first, second = torch.randn(2, 8, 1, 8, 8)
    with torch.no_grad():
        z = functional.normalize(copy.deepcopy(state.model)(torch.cat([first, second])))
    losses = []
    for i in range(16):
        others = [j for j in range(16) if j != i]
        likeness = torch.stack([z[i] @ z[j] for j in others]) / state.config.temperature
        losses.append(-torch.log_softmax(likeness, 0)[others.index((i + 8) % 16)])
    found = METHODS["simclr"](state, first, second)
    torch.testing.assert_close(found, torch.stack(losses).mean())


def test_moco_keeps_the_newest_keys_and_a_slow_average(digits: ImageDataset) -> None:
    state = Pretraining(config(method="moco", queue=12, momentum=0.9), digits, PLAN)
    before = state.queue.clone()
    old, average = state.model[0].weight.detach().clone(), state.keys[0].weight.clone()  # type: ignore[index]
    METHODS["moco"](state, *torch.randn(2, 8, 1, 8, 8))
    assert torch.equal(state.queue[8:], before[:4])
    torch.testing.assert_close(state.queue.norm(dim=1), torch.ones(12))
    torch.testing.assert_close(state.keys[0].weight, average.lerp(old, 0.1))  # type: ignore[index]
    assert not torch.equal(state.model[0].weight, old)  # type: ignore[index]


def test_a_view_is_a_part_of_the_picture_of_another_brightness() -> None:
    images = torch.randn(16, 3, 12, 10)
    one = view(images, 0.3, True, torch.Generator().manual_seed(1))
    again = view(images, 0.3, True, torch.Generator().manual_seed(1))
    other = view(images, 0.3, True, torch.Generator().manual_seed(2))
    assert one.shape == images.shape
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    flat = view(torch.ones(64, 1, 8, 8), 0.2, False, torch.Generator().manual_seed(3))
    spread = flat.flatten(1).std(dim=1)
    assert float(spread.max()) < 1e-5  # nothing from outside the picture
    assert float(flat.mean(dim=(1, 2, 3)).std()) > 0.1


def test_what_was_learnt_is_a_start_for_a_training(digits: ImageDataset, tmp_path: Any) -> None:
    (*_, last) = pretrain(config(), digits, PLAN)
    content = weights_to_bytes(last.state.backbone, mean=digits.mean, std=digits.std)
    (tmp_path / "model.safetensors").write_bytes(content)
    start = TrainConfig(backbone="smallcnn", weights=str(tmp_path))
    model = build(start, input_size=digits.input_size, num_classes=10)
    learnt = last.state.model.state_dict()
    for name, tensor in model.state_dict().items():
        assert name.startswith("14") or torch.equal(tensor, learnt[name])
    found = read_weights(tmp_path).statistics
    assert found is not None
    assert [*found[0], *found[1]] == pytest.approx([*digits.mean, *digits.std])
    assert not any(name.startswith("14") for name in safetensors.torch.load(content))


@pytest.mark.parametrize(
    "fields",
    [
        {"method": "byol"}, {"epochs": 0}, {"batch_size": 1}, {"lr": 0.0}, {"temperature": 0.0},
        {"momentum": 1.0}, {"least_area": 0.0}, {"queue": 0}, {"features": 1},
    ],
)  # fmt: skip
def test_what_can_t_be_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        config(**fields)
