import dataclasses
import itertools

import pytest
import torch
from torch import nn

from trainer.averaging import Averages
from trainer.config import Average, ConfigError, TrainConfig
from trainer.data.dataset import ImageDataset
from trainer.data.registry import load
from trainer.device import DevicePlan
from trainer.loop import train
from trainer.state import CheckpointError

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


def test_a_training_that_is_ended_before_its_schedule_averages_its_own_last_quarter(
    digits: ImageDataset,
) -> None:
    long = TrainConfig.from_dict({**CONFIG.to_dict(), "epochs": 8, "average": "tail"})
    seen = {}
    for report in train(long, digits, CPU):
        if report.step <= 16:
            seen[report.step] = report.to_dict() | {
                "weights": [p.detach().double().clone() for p in report.state.model.parameters()]
            }
    reports = list(train(long, digits, CPU, end_step=16, try_averages=("ema",)))
    last = reports[-1]
    assert [report.step for report in reports] == [1, 4, 8, 12, 16]
    assert [report.finished for report in reports] == [False] * 4 + [True]
    assert last.reason is None
    # the training is the longer one's, its schedule included
    assert [r.train_loss for r in reports] == [seen[r.step]["train_loss"] for r in reports]
    assert last.state.averaging == "tail"
    for mean, one, other in zip(
        last.state.result.parameters(), seen[12]["weights"], seen[16]["weights"], strict=True
    ):
        torch.testing.assert_close(mean.double(), (one + other) / 2, rtol=1e-5, atol=1e-6)
    assert last.val_loss != seen[16]["val_loss"]
    assert set(last.averages) == {"ema", "tail"}
    assert last.averages["tail"] == last.val_accuracy


def test_a_training_that_is_ended_goes_on_from_its_checkpoints_and_to_its_own_end_only(
    digits: ImageDataset,
) -> None:
    config = TrainConfig.from_dict({**CONFIG.to_dict(), "average": "ema"})
    saved: list[bytes] = []
    *_, last = train(
        config, digits, CPU, end_step=8, keep=lambda state: saved.append(state.to_bytes())
    )
    (resumed,) = train(config, digits, CPU, end_step=8, resume=saved[-3])
    pairs = zip(resumed.state.result.parameters(), last.state.result.parameters(), strict=True)
    assert all(torch.equal(again, before) for again, before in pairs)
    assert list(train(config, digits, CPU, end_step=8, resume=last.state.to_bytes())) == []
    with pytest.raises(CheckpointError, match="of a training until step 8, not None"):
        next(train(config, digits, CPU, resume=saved[-3]))


@pytest.mark.parametrize(("end_step", "steps"), [(1, [1]), (2, [1, 4]), (99, [1, 4, 8, 12, 16])])
def test_an_end_lies_at_the_first_report_that_reaches_it(
    digits: ImageDataset, end_step: int, steps: list[int]
) -> None:
    reports = list(train(CONFIG, digits, CPU, end_step=end_step))
    assert [report.step for report in reports] == steps
    assert reports[-1].finished
    assert reports[-1].state.finished


@pytest.mark.parametrize("average", ["ema", "tail"])
def test_where_patience_ends_a_training_its_result_is_what_was_judged(
    digits: ImageDataset, average: Average
) -> None:
    still = TrainConfig.from_dict(
        {**CONFIG.to_dict(), "lr": 1e-9, "optimizer": "sgd", "epochs": 5, "patience": 3}
    )
    *_, plain = train(still, digits, CPU)
    assert plain.step == 16  # beyond three quarters of twenty: there is something averaged
    config = dataclasses.replace(still, average=average)
    *_, last = train(config, digits, CPU)
    assert last.step == 16
    assert last.reason is not None
    assert last.state.averages.models().keys() == {average}
    assert last.state.averaging == "none"
    assert last.state.result is last.state.model
    assert last.val_loss == plain.val_loss
    assert dict(last.averages) == {}


@pytest.mark.parametrize("num_batches", [1, 2, 3, 4])
def test_the_shortest_training_has_the_average_that_it_is_asked_for(
    digits: ImageDataset, num_batches: int
) -> None:
    few = dataclasses.replace(digits, train=digits.train.take(range(8 * num_batches)))
    averages: tuple[Average, ...] = ("ema", "tail")
    for average in averages:
        config = TrainConfig(backbone="smallcnn", epochs=1, batch_size=8, average=average)
        (last,) = train(config, few, CPU)
        assert last.state.averaging == average
        assert set(last.averages) == {average}
