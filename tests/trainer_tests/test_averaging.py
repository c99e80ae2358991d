import itertools

import pytest
import torch
from torch import nn

from trainer.averaging import Averages
from trainer.config import ConfigError, TrainConfig
from trainer.data.dataset import ImageDataset
from trainer.data.registry import load
from trainer.device import DevicePlan
from trainer.loop import train

CPU = DevicePlan(device="cpu")
CONFIG = TrainConfig(backbone="smallcnn", epochs=4, batch_size=64, lr=3e-3)


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load("digits", seed=0)


def weights(value: float) -> nn.Module:
    model = nn.Linear(1, 1, bias=False)
    nn.init.constant_(model.weight, value)
    return model


def averaged(averages: Averages, name: str) -> float:
    (parameter,) = averages.models()[name].parameters()
    return float(parameter.detach())


def test_the_tail_is_the_mean_of_the_last_quarters_epochs() -> None:
    averages = Averages(weights(0), ["tail"], steps_per_epoch=10)
    for progress, value in ((0.5, 100.0), (0.75, 1.0), (0.875, 2.0), (1.0, 6.0)):
        averages.after_step(weights(50), progress)
        averages.after_epoch(weights(value), progress)
    assert averaged(averages, "tail") == pytest.approx(3.0)


def test_ema_forgets_over_about_an_epoch_of_steps() -> None:
    averages = Averages(weights(0), ["ema"], steps_per_epoch=4)
    for progress, value in ((0.7, 100.0), (0.8, 1.0), (0.9, 2.0)):
        averages.after_step(weights(value), progress)
        averages.after_epoch(weights(50), progress)
    assert averaged(averages, "ema") == pytest.approx(0.75 * 1.0 + 0.25 * 2.0)


def test_before_the_last_quarter_there_is_no_average() -> None:
    averages = Averages(weights(0), ["ema", "tail"], steps_per_epoch=4)
    averages.after_step(weights(1), 0.5)
    averages.after_epoch(weights(1), 0.5)
    assert averages.models() == {}


def test_an_unknown_average_is_refused_with_those_known() -> None:
    with pytest.raises(ConfigError, match=r"unknown average 'emma', did you mean ema"):
        Averages(weights(0), ["emma"], steps_per_epoch=4)


def test_trying_averages_leaves_the_training_as_it_is_and_reports_them_last(
    digits: ImageDataset,
) -> None:
    plain = list(train(CONFIG, digits, CPU))
    tried = list(train(CONFIG, digits, CPU, try_averages=("ema", "tail")))
    assert [report.val_loss for report in tried] == [report.val_loss for report in plain]
    assert [dict(report.averages) for report in tried[:-1]] == [{}] * (len(tried) - 1)
    assert set(tried[-1].averages) == {"ema", "tail"}
    assert all(value > 0.5 for value in tried[-1].averages.values())


@pytest.mark.parametrize("average", ["ema", "tail"])
def test_a_config_with_an_average_reports_and_returns_the_averaged_model(
    digits: ImageDataset, average: str
) -> None:
    *_, tried = train(CONFIG, digits, CPU, try_averages=(average,))
    config = TrainConfig.from_dict({**CONFIG.to_dict(), "average": average})
    *_, last = train(config, digits, CPU)
    assert last.val_accuracy == tried.averages[average]
    assert last.state.result is not last.state.model
    pairs = zip(last.state.result.parameters(), last.state.model.parameters(), strict=True)
    assert any(not torch.equal(mean, newest) for mean, newest in pairs)


def test_averages_survive_a_resume_bit_for_bit(digits: ImageDataset) -> None:
    config = TrainConfig.from_dict({**CONFIG.to_dict(), "average": "ema"})
    whole = list(train(config, digits, CPU, try_averages=("tail",)))
    cut = train(config, digits, CPU, try_averages=("tail",))
    reached = next(itertools.islice(cut, len(whole) - 2, None))
    checkpoint = reached.state.to_bytes()
    cut.close()
    (last,) = train(config, digits, CPU, resume=checkpoint, try_averages=("tail",))
    assert dict(last.averages) == dict(whole[-1].averages)
    pairs = zip(last.state.result.parameters(), whole[-1].state.result.parameters(), strict=True)
    assert all(torch.equal(again, before) for again, before in pairs)
