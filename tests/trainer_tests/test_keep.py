"""Saved between any two optimizer steps, a training goes on as if it had never stopped."""

import dataclasses
import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch

from tests.trainer_tests.test_resume_matrix import assert_same_bits, curve_of, random_data
from trainer.config import TrainConfig
from trainer.data.dataset import ImageDataset
from trainer.device import DevicePlan
from trainer.loop import train
from trainer.reports import ProgressReport
from trainer.state import CheckpointError, TrainState, read_progress

PLAN = DevicePlan(device="cpu", channels_last=True)
pytestmark = pytest.mark.usefixtures("bf16_everywhere")
BASE = {"backbone": "smallcnn", "batch_size": 4, "epochs": 2}
"""Two epochs of eight batches: legs of 2, 6 and 8."""
NUM_BATCHES = 16
EVERYTHING: dict[str, Any] = {
    "dropout": 0.3, "head_hidden": 8, "flip": True, "rotation": 20.0, "translate": 1, "cutout": 2,
    "policy": "randaugment", "erasing": 0.5, "mixup": 0.4, "cutmix": 1.0, "label_smoothing": 0.1,
    "clip_norm": 1.0,
}  # fmt: skip
CASES: list[tuple[dict[str, Any], dict[str, Any]]] = [
    ({}, {}),
    ({**EVERYTHING, "average": "ema"}, {}),
    ({**EVERYTHING, "optimizer": "adam", "average": "tail", "patience": 1}, {"precision": "bf16"}),
    ({"policy": "trivialaugment", "balance": "loss", "optimizer": "sgd"}, {"micro_batch": 3}),
    ({"dropout": 0.5, "balance": "sampling", "schedule": "step"}, {"channels_last": False}),
    ({"trainable": "gradual", "dropout": 0.5, "backbone_lr": 0.1}, {}),
    ({"trainable": "gradual", "optimizer": "sgd", "average": "tail"}, {}),
    ({"trainable": "last1", "flip": True, "schedule": "cosine"}, {}),
    ({"trainable": "head", "dropout": 0.5, "head_hidden": 8}, {}),
    ({"trainable": "head", "dropout": 0.5, "balance": "smote"}, {}),
]


def config_of(**fields: Any) -> TrainConfig:
    return TrainConfig.from_dict({**BASE, **fields})


def run(
    config: TrainConfig, data: ImageDataset, plan: DevicePlan = PLAN, resume: bytes | None = None
) -> tuple[list[ProgressReport], list[bytes]]:
    """All reports, and what was saved before each batch."""
    saved: list[bytes] = []
    reports = list(
        train(
            config,
            data,
            plan,
            resume=resume,
            keep=lambda state: saved.append(state.to_bytes()),
            try_averages=("ema", "tail"),
        )
    )
    return reports, saved


def assert_same_end(reports: Sequence[ProgressReport], whole: Sequence[ProgressReport]) -> None:
    last, expected = reports[-1], whole[-1]
    assert curve_of(last.state.history) == curve_of(expected.state.history)
    assert_same_bits(last.state, expected.state)
    for one, other in zip(
        last.state.result.parameters(), expected.state.result.parameters(), strict=True
    ):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("fields", "plan_fields"), CASES)
def test_a_training_cut_before_any_batch_is_bit_for_bit_the_one_that_never_stopped(
    fields: dict[str, Any], plan_fields: dict[str, Any]
) -> None:
    config, data = config_of(**fields), random_data(8)
    plan = dataclasses.replace(PLAN, **plan_fields)
    untouched = list(train(config, data, plan, try_averages=("ema", "tail")))
    whole, saved = run(config, data, plan)
    assert len(saved) == NUM_BATCHES
    assert_same_end(whole, untouched)  # saving changes nothing
    for batch, checkpoint in enumerate(saved):
        torch.rand(3)
        reports, saved_again = run(config, data, plan, checkpoint)
        assert len(saved_again) == NUM_BATCHES - batch
        assert_same_end(reports, whole)
        steps = [1, 4, 8]
        assert [report.step for report in reports] == steps[(batch >= 2) + (batch >= 8) :]


class Stop(Exception):
    """What a pulse raises."""


def test_a_training_that_is_stopped_at_every_single_batch_gets_to_its_end() -> None:
    config, data = config_of(**EVERYTHING, average="ema"), random_data(8)
    (*_, whole), _ = run(config, data)
    checkpoint: bytes | None = None
    kept = 0

    def keep(state: TrainState) -> None:
        nonlocal checkpoint, kept
        checkpoint, kept = state.to_bytes(), kept + 1

    def leave() -> None:
        if kept == 2:
            raise Stop

    last: ProgressReport | None = None
    for attempt in range(2 * NUM_BATCHES):
        torch.manual_seed(attempt)
        kept = 0
        try:
            for last in train(
                config,
                data,
                PLAN,
                resume=checkpoint,
                keep=keep,
                pulse=leave,
                try_averages=("ema", "tail"),
            ):
                checkpoint = last.state.to_bytes()
        except Stop:
            continue
        break
    assert attempt == NUM_BATCHES - 1
    assert last is not None
    assert_same_end([last], [whole])


def test_what_a_leg_took_before_it_was_cut_counts_and_what_keep_takes_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = 0.0

    def clock() -> float:
        nonlocal now
        now += 1.0
        return now

    monkeypatch.setattr("trainer.underway.time.perf_counter", clock)
    config, data = config_of(epochs=1, batch_size=8), random_data(8)  # one leg of four batches
    (whole,) = train(config, data, PLAN)
    saved: list[bytes] = []

    def keep(state: TrainState) -> None:
        nonlocal now
        now += 1000.0
        saved.append(state.to_bytes())

    (kept,) = train(config, data, PLAN, keep=keep)
    assert kept.seconds == whole.seconds < 100
    assert kept.images_per_second == whole.images_per_second
    (resumed,) = train(config, data, PLAN, resume=saved[3])
    assert 0 < resumed.seconds - whole.seconds <= 1  # the clock was started once more
    assert resumed.images_per_second == pytest.approx(whole.images_per_second, rel=0.2)


def test_keep_comes_before_each_batch_of_training_and_before_pulse() -> None:
    calls: list[str] = []
    config, data = config_of(epochs=1), random_data(8)
    reports = train(
        config,
        data,
        PLAN,
        keep=lambda state: calls.append(str(state.underway and state.underway.next_batch)),
        pulse=lambda: calls.append("pulse"),
    )
    list(reports)
    judged = ["pulse"]
    first = [call for batch in (0, 1) for call in (str(batch), "pulse")]
    rest = [call for batch in range(2, 8) for call in (str(batch), "pulse")]
    assert calls == first + judged + rest + judged


def test_within_a_step_or_an_evaluation_nothing_can_be_saved() -> None:
    states: list[TrainState] = []
    refused = 0

    def pulse() -> None:
        nonlocal refused
        with pytest.raises(RuntimeError, match="at a report and by keep"):
            states[-1].to_bytes()
        refused += 1

    for report in train(config_of(), random_data(8), PLAN, keep=states.append, pulse=pulse):
        report.state.to_bytes()
    assert refused == NUM_BATCHES + 3


def test_a_cut_leg_is_tensors_and_plain_values() -> None:
    _, saved = run(config_of(**EVERYTHING), random_data(8))
    content = torch.load(io.BytesIO(saved[5]), weights_only=True)
    assert content["step"] == 1
    assert content["underway"]["next_batch"] == 5
    assert content["underway"]["random"].keys() == {"cpu"}
    assert [past["step"] for past in content["history"]] == [1]


@pytest.mark.parametrize(
    "damage",
    [
        {"next_batch": 8},
        {"next_batch": -1},
        {"next_batch": "two"},
        {"generator": torch.zeros(3)},
        {"total_loss": None},
        {"random": 7},
        {"random": {"cpu": torch.zeros(3)}},
    ],
)
def test_a_forged_leg_is_refused(damage: dict[str, Any]) -> None:
    config, data = config_of(), random_data(8)
    _, saved = run(config, data)
    content = torch.load(io.BytesIO(saved[5]), weights_only=True)
    content["underway"] |= damage
    forged = io.BytesIO()
    torch.save(content, forged)
    with pytest.raises(CheckpointError, match="the checkpoint doesn't fit"):
        next(train(config, data, PLAN, resume=forged.getvalue()))


def test_reports_that_the_caller_lacks_come_again_first() -> None:
    config, data = config_of(epochs=3), random_data(8)
    whole, saved = run(config, data)
    cut = saved[20]  # of the third epoch: 1, 4 and 8 are reported
    for reported, steps in ((None, [12]), (0, [1, 4, 8, 12]), (4, [8, 12]), (8, [12])):
        reports = list(
            train(config, data, PLAN, resume=cut, reported=reported, try_averages=("ema", "tail"))
        )
        assert [report.step for report in reports] == steps
        again = [report for report in whole if report.step in steps]
        assert curve_of([report.to_dict() for report in reports]) == curve_of(
            [report.to_dict() for report in again]
        )
        assert_same_end(reports, whole)
    finished = whole[-1].state.to_bytes()
    (last,) = train(config, data, PLAN, resume=finished, reported=8)
    assert last.to_dict() == whole[-1].to_dict()


def test_a_checkpoint_says_how_far_its_training_is() -> None:
    reports, saved = run(config_of(), random_data(8))
    first, middle = read_progress(saved[0]), read_progress(saved[-1])
    assert (first.history, first.is_underway) == ([], True)
    assert first.seconds < middle.seconds < reports[-1].seconds
    whole = read_progress(reports[-1].state.to_bytes())
    assert (whole.history, whole.is_underway) == (reports[-1].state.history, False)
    assert whole.seconds == reports[-1].seconds
