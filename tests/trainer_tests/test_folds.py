"""K trainings in lockstep: each as if it were alone, all reported, stopped and resumed as one."""

import dataclasses
import io
import statistics
from collections.abc import Callable
from typing import Any

import pytest
import torch

from trainer.config import TrainConfig, TrainingDiverged
from trainer.data.dataset import ImageDataset, Split
from trainer.data.folds import cut_folds
from trainer.data.registry import load
from trainer.device import DevicePlan
from trainer.folds import FoldsReport, fold_config, train_folds
from trainer.loop import train
from trainer.state import CheckpointError, read_history

CPU = DevicePlan(device="cpu", channels_last=True)
CONFIG = TrainConfig(
    backbone="smallcnn", epochs=2, batch_size=10, lr=3e-3, dropout=0.3, translate=1, rotation=10,
    cutout=2, label_smoothing=0.1, seed=5,
)  # fmt: skip


@pytest.fixture(scope="module")
def few() -> ImageDataset:
    """150 digits, of which 30 are the single split's validation."""
    data = load("digits", seed=0)
    return dataclasses.replace(
        data, train=data.train.take(range(120)), val=data.val.take(range(30))
    )


@pytest.fixture(scope="module")
def folds(few: ImageDataset) -> tuple[ImageDataset, ...]:
    return cut_folds(few, 3, seed=0)


def config(**fields: Any) -> TrainConfig:
    return dataclasses.replace(CONFIG, **fields)


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    return {name: report[name] for name in report if "second" not in name}


def curve(history: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [without_times(report) for report in history]


def assert_same(first: FoldsReport, second: FoldsReport) -> None:
    """The reports of all together and of each, all weights and optimizer states: bit for bit."""
    assert curve(first.state.history) == curve(second.state.history)
    for one, other in zip(first.state.states, second.state.states, strict=True):
        assert curve(one.history) == curve(other.history)
        for kept in ("model", "optimizer", "averages"):
            pairs = zip(
                leaves(getattr(one, kept).state_dict()),
                leaves(getattr(other, kept).state_dict()),
                strict=True,
            )
            assert all(torch.equal(*map(torch.as_tensor, pair)) for pair in pairs)


def leaves(found: Any) -> list[Any]:
    if isinstance(found, dict):
        return [leaf for key in found for leaf in leaves(found[key])]
    if isinstance(found, list | tuple):
        return [leaf for each in found for leaf in leaves(each)]
    return [] if found is None else [found]


class Stop(Exception):
    """What a pulse raises."""


def stop_at(count: int) -> Callable[[], None]:
    calls = iter(range(1, 10**6))

    def pulse() -> None:
        if next(calls) == count:
            raise Stop

    return pulse


def test_each_fold_is_trained_as_if_it_were_alone(folds: tuple[ImageDataset, ...]) -> None:
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    *_, last = train_folds(CONFIG, folds, CPU, try_averages=("ema",))
    assert torch.equal(torch.rand(3), expected)  # the random state is the caller's
    alone = [
        list(train(fold_config(CONFIG, index), data, CPU, try_averages=("ema",)))
        for index, data in enumerate(folds)
    ]
    for together, own in zip(last.state.states, alone, strict=True):
        assert curve(together.history) == curve(own[-1].state.history)
    # so the seeds are different ones
    assert len({reports[-1].train_loss for reports in alone}) == 3


def test_a_report_is_the_mean_of_all_folds(folds: tuple[ImageDataset, ...]) -> None:
    reports = []
    for report in train_folds(CONFIG, folds, CPU, try_averages=("ema", "tail")):
        each = [state.history[-1] for state in report.state.states]
        for name in ("val_accuracy", "val_loss"):
            assert getattr(report, name) == statistics.fmean(one[name] for one in each)
        assert report.train_loss == pytest.approx(
            statistics.fmean(one["train_loss"] for one in each)
        )
        assert report.averages == {
            name: statistics.fmean(one["averages"][name] for one in each)
            for name in each[0]["averages"]
        }
        assert report.images_seen == sum(one["images_seen"] for one in each)
        assert report.seconds == pytest.approx(sum(one["seconds"] for one in each))
        rates = [one["images_per_second"] for one in each]
        assert min(rates) <= report.images_per_second <= max(rates)
        assert {state.step for state in report.state.states} == {report.step}
        reports.append(report)
    assert [report.step for report in reports] == [1, 4, 8]
    assert [report.images_seen for report in reports] == [3 * 30, 300, 600]
    assert [report.finished for report in reports] == [False, False, True]
    assert set(reports[-1].averages) == {"ema", "tail"}
    assert reports[-1].state.history == [report.to_dict() for report in reports]


@pytest.mark.parametrize("stop", [11, 32, 50])
def test_folds_cut_anywhere_and_resumed_are_bit_for_bit_those_that_never_stopped(
    folds: tuple[ImageDataset, ...], stop: int
) -> None:
    *_, whole = train_folds(CONFIG, folds, CPU, try_averages=("ema", "tail"))
    made: list[bytes] = []
    pulse = stop_at(stop)
    reports = train_folds(CONFIG, folds, CPU, pulse=pulse, try_averages=("ema", "tail"))
    with pytest.raises(Stop):
        made.extend(report.state.to_bytes() for report in reports)
    checkpoint = made[-1] if made else None
    assert (checkpoint is None) == (stop < 12)
    torch.rand(3)
    *_, resumed = train_folds(CONFIG, folds, CPU, resume=checkpoint, try_averages=("ema", "tail"))
    assert_same(resumed, whole)


def every_checkpoint(
    settings: TrainConfig, folds: tuple[ImageDataset, ...], resume: bytes | None = None
) -> tuple[FoldsReport, list[bytes]]:
    """The last report, and what was saved before each batch."""
    saved: list[bytes] = []
    *_, last = train_folds(
        settings,
        folds,
        CPU,
        resume=resume,
        keep=lambda state: saved.append(state.to_bytes()),
        try_averages=("ema", "tail"),
    )
    return last, saved


def test_folds_cut_before_any_batch_are_bit_for_bit_those_that_never_stopped(
    folds: tuple[ImageDataset, ...],
) -> None:
    *_, whole = train_folds(CONFIG, folds, CPU, try_averages=("ema", "tail"))
    last, saved = every_checkpoint(CONFIG, folds)
    assert_same(last, whole)
    num_batches = 3 * 2 * 10  # ten an epoch; the folds' legs take 3, 7 and 10, in turn
    assert len(saved) == num_batches
    for batch in (2, 4, 9, 22, 30, 59):
        torch.rand(3)
        *_, resumed = train_folds(
            CONFIG, folds, CPU, resume=saved[batch], try_averages=("ema", "tail")
        )
        assert_same(resumed, whole)
        steps = [past["step"] for past in read_history(saved[batch])]
        assert steps == [1, 4][: (batch >= 9) + (batch >= 30)]
    _, rest = every_checkpoint(CONFIG, folds, saved[4])
    assert len(rest) == num_batches - 4
    *_, cut_again = train_folds(CONFIG, folds, CPU, resume=rest[3], try_averages=("ema", "tail"))
    assert_same(cut_again, whole)


def test_folds_that_report_at_different_steps_go_on_from_any_batch(few: ImageDataset) -> None:
    images = few.train.images[:31]
    whole_split = Split(images, torch.arange(31) % 10)
    odd = dataclasses.replace(
        few, train=whole_split.take(range(28)), val=whole_split.take(range(28, 31))
    )
    cut = cut_folds(odd, 2, seed=0)
    settings = config(batch_size=2)
    for folds in (cut, cut[::-1]):
        whole, saved = every_checkpoint(settings, folds)
        assert len(saved) == 2 * (7 + 8)
        for checkpoint in saved[::2]:
            *_, resumed = train_folds(
                settings, folds, CPU, resume=checkpoint, try_averages=("ema", "tail")
            )
            assert_same(resumed, whole)


def test_folds_between_two_reports_are_tensors_and_plain_values(
    folds: tuple[ImageDataset, ...],
) -> None:
    _, saved = every_checkpoint(CONFIG, folds)
    content = torch.load(io.BytesIO(saved[4]), weights_only=True)
    first, second, third = content["folds"]
    assert [past["step"] for past in read_history(first.numpy().tobytes())] == [1]
    assert read_history(second.numpy().tobytes()) == content["history"] == []
    assert len(third) == 0  # not begun


def test_a_checkpoint_is_read_without_running_code_and_holds_the_reports(
    folds: tuple[ImageDataset, ...],
) -> None:
    *_, report = train_folds(config(epochs=1), folds, CPU)
    content = report.state.to_bytes()
    saved = torch.load(io.BytesIO(content), weights_only=True)
    assert [fold.dtype for fold in saved["folds"]] == [torch.uint8] * 3
    assert read_history(content) == report.state.history
    assert list(train_folds(config(epochs=1), folds, CPU, resume=content)) == []


def test_a_checkpoint_of_something_else_is_refused(folds: tuple[ImageDataset, ...]) -> None:
    one = config(epochs=1)
    *_, report = train_folds(one, folds, CPU)
    *_, single = train(one, folds[0], CPU)
    content, of_one_model = report.state.to_bytes(), single.state.to_bytes()
    forged = io.BytesIO()
    torch.save({**torch.load(io.BytesIO(content), weights_only=True), "folds": [1, 2, 3]}, forged)
    for resume, settings, data, says in (
        (forged.getvalue(), one, folds, "its folds are no checkpoints"),
        (of_one_model, one, folds, "another format"),
        (b"nothing", one, folds, "it is broken"),
        (content, config(epochs=1, patience=2), folds, "another config: patience"),
        (content, one, folds[:2], "3 folds, not 2"),
    ):
        with pytest.raises(CheckpointError, match=says):
            next(train_folds(settings, data, CPU, resume=resume))
    with pytest.raises(CheckpointError, match="another format"):
        next(train(one, folds[0], CPU, resume=content))
    first = next(train_folds(CONFIG, folds, CPU)).state.to_bytes()
    with pytest.raises(CheckpointError, match="of other data"):
        next(train_folds(CONFIG, folds[::-1], CPU, resume=first))


def test_early_stopping_is_decided_by_the_mean_for_all_at_once(few: ImageDataset) -> None:
    labels = few.train.labels.roll(1)  # nothing can be learned
    noise = dataclasses.replace(few, train=dataclasses.replace(few.train, labels=labels))
    folds = cut_folds(noise, 3, seed=0)
    long = config(epochs=12, batch_size=50)
    means = [report.val_accuracy for report in train_folds(long, folds, CPU)]
    expected = next(n for n in range(2, 12) if max(means[n - 1 : n + 1]) <= max(means[: n - 1]))
    reports = list(train_folds(dataclasses.replace(long, patience=2), folds, CPU))
    last = reports[-1]
    assert [report.val_accuracy for report in reports] == means[: expected + 1]
    assert last.finished
    assert last.reason is not None
    assert last.reason.startswith("early stopping")
    assert {state.step for state in last.state.states} == {last.step}
    # alone, some fold would have been stopped at another step
    alone = {
        len(list(train(dataclasses.replace(fold_config(long, i), patience=2), fold, CPU)))
        for i, fold in enumerate(folds)
    }
    assert alone != {len(reports)}
    assert list(train_folds(last.state.config, folds, CPU, resume=last.state.to_bytes())) == []


def test_folds_of_7_and_of_8_batches_report_together(few: ImageDataset) -> None:
    images = few.train.images[:31]
    whole = Split(images, torch.arange(31) % 10)
    odd = dataclasses.replace(few, train=whole.take(range(28)), val=whole.take(range(28, 31)))
    seven, eight = cut_folds(odd, 2, seed=0)
    assert {len(seven.train), len(eight.train)} == {15, 16}
    settings = config(batch_size=2)
    reports = list(train_folds(settings, (seven, eight), CPU))
    assert [report.step for report in reports] == [4, 8]
    assert [report.images_seen for report in reports] == [31, 62]
    parts = [state.history for state in reports[-1].state.states]
    assert sorted(len(history) for history in parts) == [2, 3]
    losses = []
    for history in parts:
        first = [past for past in history if past["step"] <= 4]
        seen = [0, *(past["images_seen"] for past in first)]
        summed = sum(past["train_loss"] * (seen[i + 1] - seen[i]) for i, past in enumerate(first))
        losses.append(summed / seen[-1])
    assert reports[0].train_loss == pytest.approx(statistics.fmean(losses))


def test_a_fold_that_diverges_ends_the_training(folds: tuple[ImageDataset, ...]) -> None:
    with pytest.raises(TrainingDiverged):
        list(train_folds(config(lr=1e30, optimizer="sgd"), folds, CPU))
