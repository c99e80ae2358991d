import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from trainer.backbones import build
from trainer.config import TrainConfig
from trainer.data.registry import load
from trainer.device import DevicePlan, prepare
from trainer.flops import peak_flops, training_flops
from trainer.heads import head_name
from trainer.speed import measure_speed


def counted_by_hand(config: TrainConfig, size: tuple[int, int, int]) -> int:
    """Twice the multiplications of each convolution and linear layer in one forward pass."""
    total = 0
    model = build(config, input_size=size, num_classes=10).eval()

    def count(module: nn.Module, _: object, out: torch.Tensor) -> None:
        nonlocal total
        assert isinstance(module, nn.Conv2d | nn.Linear)
        total += 2 * out.numel() * module.weight[0].numel()

    for module in model.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        model(torch.zeros(1, *size))
    return total


@pytest.mark.parametrize("backbone", ["smallcnn", "resnet8", "resnet20", "mobilenet_v3_small"])
def test_a_training_image_is_three_forward_passes(backbone: str) -> None:
    config, size = TrainConfig(backbone=backbone), (3, 32, 32)
    found = training_flops(config, input_size=size, num_classes=10)
    assert found == 3 * counted_by_hand(config, size)


@pytest.mark.parametrize("backbone", ["resnet8", "efficientnet_b0", "convnext_tiny"])
def test_operations_are_counted_as_torch_counts_them(backbone: str) -> None:
    config, size = TrainConfig(backbone=backbone), (3, 32, 32)
    model = build(config, input_size=size, num_classes=10).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *size))
    found = training_flops(config, input_size=size, num_classes=10)
    assert found == 3 * counter.get_total_flops() > 0


def test_of_head_only_training_the_head_counts() -> None:
    config = TrainConfig(backbone="resnet8", trainable="head", head_hidden=32)
    model = build(config, input_size=(1, 8, 8), num_classes=5)
    num_features = model.get_submodule(head_name(model))[0].in_features  # type: ignore[index]
    found = training_flops(config, input_size=(1, 8, 8), num_classes=5)
    assert found == 3 * 2 * (num_features * 32 + 32 * 5)


def test_counting_leaves_the_random_state_alone() -> None:
    state = torch.get_rng_state()
    training_flops(TrainConfig(), input_size=(1, 9, 9), num_classes=3)
    assert torch.equal(torch.get_rng_state(), state)


def test_no_training_is_faster_than_the_peak() -> None:
    prepare("cpu", 1)
    data, config = load("digits", seed=0), TrainConfig(backbone="resnet8", batch_size=64)
    peak = peak_flops("cpu")
    speed = measure_speed(config, data, device="cpu", seconds=0.2).train
    flops = training_flops(config, input_size=data.input_size, num_classes=10)
    assert 0 < speed * flops < peak
    assert torch.get_num_threads() == DevicePlan(device="cpu").num_threads


def test_a_network_that_can_not_be_counted_is_said_and_trained_all_the_same(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuses(*_: object) -> None:
        raise RuntimeError("no dispatch mode\nhere")

    monkeypatch.setattr("trainer.flops._Counter", refuses)
    config = TrainConfig(backbone="smallcnn", head_hidden=17)  # counted by no test before
    assert training_flops(config, input_size=(1, 8, 8), num_classes=7) == 0
    assert "smallcnn can't be counted: RuntimeError: no dispatch mode here" in caplog.text
