import pytest

from trainer.config import ConfigError, TrainConfig
from trainer.data.registry import load
from trainer.speed import measure_speed


def test_a_smaller_network_is_faster_and_evaluation_faster_than_training() -> None:
    data = load("digits", seed=0)
    small, large = (
        measure_speed(TrainConfig(backbone=name), data, device="cpu", seconds=0.2)
        for name in ("smallcnn", "resnet20")
    )
    assert small.train > large.train > 0
    assert large.evaluate > large.train


def test_a_batch_of_more_images_than_there_are_is_measured_with_those_there_are() -> None:
    data = load("digits", seed=0)
    config = TrainConfig(backbone="smallcnn", batch_size=100_000)
    assert measure_speed(config, data, device="cpu", seconds=0.1).train > 0


def test_of_a_head_alone_the_features_are_measured_and_what_an_epoch_on_them_takes() -> None:
    data = load("digits", seed=0)
    whole = measure_speed(TrainConfig(backbone="resnet20"), data, device="cpu", seconds=0.2)
    head = TrainConfig(backbone="resnet20", trainable="head", head_hidden=4)
    alone = measure_speed(head, data, device="cpu", seconds=0.2)
    assert whole.features is None
    assert alone.features is not None
    assert alone.train > 5 * whole.train
    flipped = TrainConfig(backbone="resnet20", trainable="head", flip=True)
    assert measure_speed(flipped, data, device="cpu", seconds=0.1).features is None


def test_a_device_that_is_not_there_is_said() -> None:
    with pytest.raises(ConfigError, match="cuda:9"):
        measure_speed(TrainConfig(), load("digits", seed=0), device="cuda:9", seconds=0.1)
