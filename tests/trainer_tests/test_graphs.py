"""Recorded steps, by a recorder that does on the CPU what a CUDA graph does on its device."""

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import trainer.graphs
from trainer.config import TrainConfig
from trainer.data.dataset import ImageDataset
from trainer.data.registry import load
from trainer.device import DevicePlan, choose_plan
from trainer.graphs import WARM_UP_STEPS, GraphedStep, Recording, rates_from
from trainer.loop import train
from trainer.mixing import Partners
from trainer.optim import make_optimizer, set_lr
from trainer.reports import ProgressReport

needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
# an lr that float32 holds, for a recorded step reads it from there
CONFIG = TrainConfig(
    backbone="smallcnn", epochs=2, batch_size=256, lr=0.125, schedule="step", optimizer="sgd"
)


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    return load("digits", seed=0)


class Recorder:
    """Does nothing when it records, and always works on the same memory when it replays."""

    def __init__(self) -> None:
        self.num_recorded = self.num_replayed = 0

    def __call__(self, work: Callable[[], Tensor]) -> Recording:
        self.num_recorded += 1
        loss = torch.zeros(())

        def replay() -> None:
            self.num_replayed += 1
            loss.copy_(work())

        return Recording(replay=replay, loss=loss)


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Recorder:
    made = Recorder()
    monkeypatch.setattr(trainer.graphs, "record_on_cuda", made)
    return made


def trained(config: TrainConfig, data: ImageDataset, *, graphs: bool) -> list[ProgressReport]:
    return list(train(config, data, DevicePlan(device="cpu", graphs=graphs)))


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"optimizer": "adamw", "clip_norm": 1.0},
        {"mixup": 0.5, "dropout": 0.5},
        {"average": "ema", "momentum": 0.0},
    ],
    ids=str,
)
def test_a_training_with_recorded_steps_is_the_same(
    more: dict[str, Any], digits: ImageDataset, recorder: Recorder
) -> None:
    config = dataclasses.replace(CONFIG, **more)
    with_graphs, usual = (trained(config, digits, graphs=graphs) for graphs in (True, False))
    batches = len(digits.train) // CONFIG.batch_size  # and a smaller one, which is never recorded
    assert len(digits.train) % CONFIG.batch_size > 1
    assert recorder.num_recorded == 1
    assert recorder.num_replayed == CONFIG.epochs * batches - WARM_UP_STEPS
    for ours, theirs in zip(with_graphs, usual, strict=True):
        exact = "mixup" not in more and more.get("optimizer") is None
        tolerance = 0.0 if exact else 1e-4  # their floats are Python's, of 64 bits
        assert ours.train_loss == pytest.approx(theirs.train_loss, rel=tolerance, abs=0.0)
        assert ours.val_accuracy == pytest.approx(theirs.val_accuracy, abs=0.0 if exact else 0.01)


def test_thawed_parameters_are_recorded_anew(recorder: Recorder) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.Linear(3, 2))
    optimizer = make_optimizer(CONFIG, model)

    def step(images: Tensor, _labels: Tensor, _partners: Partners | None) -> Tensor:
        return images.sum()

    graphed = GraphedStep(step, model, optimizer)
    images, labels = torch.ones(2, 4), torch.zeros(2, dtype=torch.int64)
    for trainable in (False, True):
        model[0].requires_grad_(trainable)
        for factor in range(WARM_UP_STEPS + 2):
            assert float(graphed(factor * images, labels)) == 8 * factor
    assert (recorder.num_recorded, recorder.num_replayed) == (2, 4)


def test_a_recorded_step_reads_the_learning_rate_that_is_set_after_it(recorder: Recorder) -> None:
    weight = torch.nn.Parameter(torch.ones(1, 1))
    model = torch.nn.ParameterList([weight])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, fused=True)

    def step(images: Tensor, _labels: Tensor, _partners: Partners | None) -> Tensor:
        optimizer.zero_grad()
        loss = (weight * images).sum()
        torch.autograd.backward(loss)
        optimizer.step()
        return loss.detach()

    graphed = GraphedStep(step, model, optimizer)
    for lr in (0.0,) * WARM_UP_STEPS + (0.25, 0.5):
        set_lr(optimizer, lr)
        graphed(torch.ones(1, 1), torch.zeros(1))
    assert recorder.num_replayed == 2
    assert weight.item() == 1 - 0.25 - 0.5
    assert optimizer.param_groups[0]["lr"] == 0.5  # a plain number again, as checkpoints have it


def test_what_can_not_be_recorded_goes_on_as_usual_and_says_so_once(
    digits: ImageDataset, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_work: Callable[[], Tensor]) -> Recording:
        raise RuntimeError("operation not permitted when stream is capturing\nsecond line")

    monkeypatch.setattr(trainer.graphs, "record_on_cuda", fails)
    with caplog.at_level(logging.WARNING):
        found = trained(CONFIG, digits, graphs=True)
    assert found[-1].train_loss == trained(CONFIG, digits, graphs=False)[-1].train_loss
    (message,) = caplog.messages
    assert message.startswith("this training goes on without CUDA graphs: operation not permitted")
    assert "\n" not in message


def test_an_optimizer_is_as_it_was_after_it_was_recorded_even_if_that_failed() -> None:
    model = torch.nn.Linear(2, 2)
    optimizer = make_optimizer(dataclasses.replace(CONFIG, optimizer="adam"), model)
    before = [dict(group) for group in optimizer.param_groups]
    rates = [torch.zeros(()) for _ in before]

    def fail() -> None:
        with rates_from(rates, optimizer):
            assert optimizer.param_groups[0]["lr"] is rates[0]
            raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        fail()
    assert [dict(group) for group in optimizer.param_groups] == before


def test_a_cpu_has_no_graphs() -> None:
    plan = choose_plan(CONFIG, input_size=(1, 8, 8), num_classes=10, device="cpu", graphs=True)
    assert not plan.graphs
    on_gpu = dataclasses.replace(plan, device="cuda:0", graphs=True)
    assert on_gpu.on("cuda:1").graphs
    assert on_gpu.on("cpu") == plan


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("more", [{}, {"optimizer": "adamw", "clip_norm": 1.0}, {"mixup": 0.5}])
def test_on_a_gpu_a_training_with_graphs_comes_to_the_same(
    more: dict[str, Any], digits: ImageDataset, caplog: pytest.LogCaptureFixture
) -> None:
    config = dataclasses.replace(CONFIG, **more)
    plan = choose_plan(
        config, input_size=digits.input_size, num_classes=10, device="cuda:0", graphs=True
    )
    assert plan.graphs
    with caplog.at_level(logging.WARNING):
        *_, graphed = train(config, digits, plan)
    assert not caplog.messages
    *_, usual = train(config, digits, dataclasses.replace(plan, graphs=False))
    assert graphed.train_loss == pytest.approx(usual.train_loss, rel=0.05)
