import pytest
from torchvision import models

from trainer.config import TrainConfig
from trainer.footprint import measure_footprint


def test_parameters_and_bytes_are_those_of_the_network() -> None:
    found = measure_footprint(
        TrainConfig(backbone="resnet18"),
        input_size=(3, 224, 224),
        num_classes=1000,
        device="cpu",
        times_latency=False,
    )
    reference = models.resnet18()
    assert found.num_params == sum(parameter.numel() for parameter in reference.parameters())
    assert found.megabytes == pytest.approx(4 * found.num_params / 1e6, rel=0.01)
    assert found.latency_ms is None


def test_a_larger_network_takes_longer() -> None:
    small, large = (
        measure_footprint(
            TrainConfig(backbone=backbone),
            input_size=(1, 28, 28),
            num_classes=10,
            device="cpu",
            times_latency=True,
        )
        for backbone in ("smallcnn", "resnet18")
    )
    assert small.latency_ms is not None
    assert large.latency_ms is not None
    assert 0 < small.latency_ms < large.latency_ms
