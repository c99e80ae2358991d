import dataclasses
import io
import math
from collections.abc import Callable
from typing import Any, get_args

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from trainer.augment import augment
from trainer.averaging import Averages
from trainer.batches import batch_bounds, epoch_order, legs, num_micro_batches, to_device
from trainer.config import DataError, Objective, OutOfMemory, TrainConfig, TrainingDiverged
from trainer.data.dataset import ImageDataset
from trainer.data.registry import load
from trainer.device import DevicePlan
from trainer.evaluate import Normaliser
from trainer.loop import optimizer_step, train
from trainer.mixing import Partners, mix
from trainer.optim import lr_at, make_optimizer
from trainer.reports import ProgressReport
from trainer.seeds import seeded_generator
from trainer.state import FORMAT, CheckpointError, TrainState

CPU = DevicePlan(device="cpu", channels_last=True)
CONFIG = TrainConfig(backbone="smallcnn", epochs=3, batch_size=32, lr=3e-3)
AUGMENTED = dataclasses.replace(
    CONFIG, dropout=0.3, flip=True, translate=1, rotation=10, cutout=2, label_smoothing=0.1
)


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    """300 images to train on (10 batches of 32), 100 to validate."""
    data = load("digits", seed=0)
    val = data.val.take(range(100))
    return dataclasses.replace(data, train=data.train.take(range(300)), val=val)


def config(base: TrainConfig = CONFIG, **fields: Any) -> TrainConfig:
    return TrainConfig.from_dict({**base.to_dict(), **fields})


def without_times(report: dict[str, Any]) -> dict[str, Any]:
    return {name: report[name] for name in report if "second" not in name}


def assert_same_tensors(first: Any, second: Any) -> None:
    """Two state dicts are bit for bit equal."""
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same_tensors(first[key], second[key])
    elif isinstance(first, list):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same_tensors(one, other)
    else:
        assert first == second


class Stop(Exception):
    """What a pulse raises."""


def stop_at(count: int) -> Callable[[], None]:
    calls = iter(range(1, 10**6))

    def pulse() -> None:
        if next(calls) == count:
            raise Stop

    return pulse


def test_reports_come_after_a_quarter_epoch_and_after_each_epoch(digits: ImageDataset) -> None:
    reports = list(train(CONFIG, digits, CPU))
    assert [report.step for report in reports] == [1, 4, 8, 12]
    assert [report.epoch for report in reports] == [0.25, 1, 2, 3]
    assert [report.images_seen for report in reports] == [96, 300, 600, 900]
    assert [report.finished for report in reports] == [False, False, False, True]
    seconds = [report.seconds for report in reports]
    assert seconds == sorted(seconds)
    assert all(report.images_per_second > 0 for report in reports)
    assert reports[-1].train_loss < reports[0].train_loss
    assert reports[-1].state.history == [report.to_dict() for report in reports]


def test_the_quarter_is_judged_by_a_part_of_the_images_and_epochs_by_all(
    digits: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = list(train(config(epochs=1), digits, CPU))
    monkeypatch.setattr("trainer.evaluate.EARLY_IMAGES", 25)
    part = list(train(config(epochs=1), digits, CPU))
    assert whole[0].val_loss != part[0].val_loss
    assert (25 * part[0].val_accuracy).is_integer()
    assert whole[0].train_loss == part[0].train_loss
    assert whole[1].val_loss == part[1].val_loss


def test_an_epoch_of_few_batches_has_no_report_at_its_quarter(digits: ImageDataset) -> None:
    reports = list(train(config(batch_size=64, epochs=2), digits, CPU))
    assert [report.step for report in reports] == [4, 8]


@pytest.mark.parametrize("backbone", ["smallcnn", "resnet8"])
def test_digits_are_learned_in_a_few_epochs(backbone: str) -> None:
    data = load("digits", seed=0)
    *_, last = train(config(backbone=backbone, epochs=6, lr=1e-2), data, CPU)
    assert last.val_accuracy > 0.95


CASES = [
    ("smallcnn", {"optimizer": "sgd", "lr": 0.05, "schedule": "cosine"}, {}),
    ("smallcnn", {"optimizer": "adamw", "schedule": "onecycle", "clip_norm": 1.0}, {}),
    ("smallcnn", {"optimizer": "adamw", "epochs": 2}, {"precision": "bf16"}),
    ("resnet8", {"optimizer": "adam", "schedule": "step"}, {"micro_batch": 20}),
    ("resnet8", {"optimizer": "sgd", "epochs": 2}, {"channels_last": False}),
    ("efficientnet_b0", {"epochs": 2, "batch_size": 2}, {}),
]


@pytest.mark.usefixtures("bf16_everywhere")
@pytest.mark.parametrize(("backbone", "fields", "plan_fields"), CASES)
def test_a_resumed_training_is_bit_for_bit_the_one_that_never_stopped(
    digits: ImageDataset, backbone: str, fields: dict[str, Any], plan_fields: dict[str, Any]
) -> None:
    num_images = 16 if backbone == "efficientnet_b0" else 300  # slow; here for stochastic depth
    small = dataclasses.replace(digits, train=digits.train.take(range(num_images)))
    chosen = config(AUGMENTED, backbone=backbone, **fields)
    plan = DevicePlan.from_dict({**CPU.to_dict(), **plan_fields})
    torch.manual_seed(1)
    checkpoints, reports = [], []
    for report in train(chosen, small, plan):
        reports.append(without_times(report.to_dict()))
        checkpoints.append(report.state.to_bytes())
    final = report.state
    for index in (0, 1):
        torch.manual_seed(2)
        torch.rand(3)
        rest = []
        for report in train(chosen, small, plan, resume=checkpoints[index]):
            rest.append(without_times(report.to_dict()))
        assert rest == reports[index + 1 :]
        assert [without_times(past) for past in report.state.history] == reports
        assert_same_tensors(report.state.model.state_dict(), final.model.state_dict())
        assert_same_tensors(report.state.optimizer.state_dict(), final.optimizer.state_dict())


def test_a_chain_of_kills_changes_nothing(digits: ImageDataset) -> None:
    *_, undisturbed = train(AUGMENTED, digits, CPU)
    checkpoint, step = None, 0
    for num_batches in (6, 30, 3, 25, 10**6):
        try:
            pulse = stop_at(num_batches)
            for report in train(AUGMENTED, digits, CPU, resume=checkpoint, pulse=pulse):
                assert report.step > step
                checkpoint, step = report.state.to_bytes(), report.step
        except Stop:
            continue
    assert step == 12
    assert_same_tensors(report.state.model.state_dict(), undisturbed.state.model.state_dict())
    assert report.seconds > report.state.history[0]["seconds"]


def test_two_trainings_by_turns_do_not_disturb_each_other(digits: ImageDataset) -> None:
    alone = [without_times(report.to_dict()) for report in train(AUGMENTED, digits, CPU)]
    other = config(AUGMENTED, seed=7)
    both = zip(train(AUGMENTED, digits, CPU), train(other, digits, CPU), strict=True)
    by_turns = [without_times(first.to_dict()) for first, _ in both]
    assert by_turns == alone


def test_the_seed_decides_weights_and_order(digits: ImageDataset) -> None:
    losses = [next(train(config(seed=seed), digits, CPU)).train_loss for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]


def test_between_reports_modes_and_random_state_are_the_callers(digits: ImageDataset) -> None:
    torch.manual_seed(11)
    state = torch.get_rng_state()
    for _ in train(AUGMENTED, digits, dataclasses.replace(CPU, precision="bf16")):
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.is_grad_enabled()
        assert not torch.is_autocast_enabled("cpu")


def test_the_schedule_spans_all_optimizer_steps_of_all_epochs(digits: ImageDataset) -> None:
    for report in train(CONFIG, digits, CPU):
        last_step = (3 if report.step == 1 else 10 * report.epoch) - 1
        expected = lr_at(CONFIG, last_step / 30)
        assert [group["lr"] for group in report.state.optimizer.param_groups] == [expected] * 2


def test_a_caller_may_switch_the_model_to_eval_between_reports(digits: ImageDataset) -> None:
    *_, undisturbed = train(AUGMENTED, digits, CPU)
    for report in train(AUGMENTED, digits, CPU):
        report.state.model.eval()
    assert report.train_loss == undisturbed.train_loss


def test_pulse_comes_before_every_batch_of_training_and_evaluation(digits: ImageDataset) -> None:
    pulses: list[None] = []
    for _ in train(config(epochs=2), digits, CPU, pulse=lambda: pulses.append(None)):
        pass
    assert len(pulses) == 2 * 10 + 3  # validation is one batch, after each of three reports


def test_what_pulse_raises_ends_the_training_and_the_random_state_is_the_callers(
    digits: ImageDataset,
) -> None:
    state = torch.get_rng_state()
    training = train(CONFIG, digits, CPU, pulse=stop_at(9))
    assert next(training).step == 1
    with pytest.raises(Stop):
        next(training)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(StopIteration):
        next(training)


def test_a_loss_that_is_not_finite_is_a_result(digits: ImageDataset) -> None:
    wild = config(optimizer="sgd", lr=1e30, schedule="constant")
    with pytest.raises(TrainingDiverged, match=r"the training loss is (nan|inf) after 0.25 epochs"):
        list(train(wild, digits, CPU))


def allocate_too_much() -> None:
    torch.empty(2**55, dtype=torch.uint8)


def raise_memory_error() -> None:
    raise MemoryError


def raise_cuda_error() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")


@pytest.mark.parametrize("pulse", [allocate_too_much, raise_memory_error, raise_cuda_error])
def test_memory_that_is_used_up_is_a_result(
    digits: ImageDataset, pulse: Callable[[], None]
) -> None:
    with pytest.raises(OutOfMemory, match="smallcnn with batch_size 32 doesn't fit"):
        list(train(CONFIG, digits, CPU, pulse=pulse))


def test_other_errors_come_out_as_they_are(digits: ImageDataset) -> None:
    def pulse() -> None:
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        list(train(CONFIG, digits, CPU, pulse=pulse))


def test_training_ends_early_when_patience_does(digits: ImageDataset) -> None:
    still = config(lr=1e-12, schedule="constant", weight_decay=0, optimizer="sgd", epochs=30)
    reports = list(train(config(still, patience=2), digits, CPU))
    last = reports[-1]
    assert last.finished
    assert last.step < 120
    best = max(report.val_accuracy for report in reports)
    first_best = next(report for report in reports if report.val_accuracy == best)
    assert last.step - first_best.step in range(8, 12)
    assert last.reason == (
        f"early stopping: no better validation accuracy than {best:.4f} "
        f"of epoch {first_best.epoch:g} in 2 epochs"
    )
    assert [report.reason for report in reports[:-1]] == [None] * (len(reports) - 1)
    assert list(train(config(still, patience=2), digits, CPU, resume=last.state.to_bytes())) == []


@pytest.fixture(scope="module")
def crooked(digits: ImageDataset) -> ImageDataset:
    """Two thirds of its validation images are zeros."""
    zeros = (digits.val.labels == 0).nonzero()[:, 0].repeat(20)
    val = digits.val.take(torch.cat([torch.arange(100), zeros]))
    return dataclasses.replace(digits, val=val)


@pytest.mark.parametrize("objective", get_args(Objective))
def test_patience_looks_at_the_objective(crooked: ImageDataset, objective: Objective) -> None:
    chosen = config(lr=2e-3, epochs=12, patience=1)
    reports = list(train(chosen, crooked, CPU, objective=objective))
    first, last = reports[0], reports[-1]
    assert len({first.val_accuracy, first.val_balanced_accuracy, first.val_macro_f1}) == 3
    values = [report.to_dict()[f"val_{objective}"] for report in reports]
    assert values == [report.value(objective) for report in reports]
    assert last.step < 48
    best = reports[values.index(max(values))]
    assert last.step - best.step == 4
    words = objective.replace("_", " ")
    assert f"no better validation {words} than {max(values):.4f}" in str(last.reason)


def test_averages_are_tried_by_the_objective(crooked: ImageDataset) -> None:
    chosen = config(lr=2e-3, average="ema")
    *_, last = train(chosen, crooked, CPU, objective="macro_f1", try_averages=("tail",))
    assert last.averages["ema"] == last.val_macro_f1 != last.val_accuracy
    assert set(last.averages) == {"ema", "tail"}


def test_a_finished_training_has_nothing_to_resume(digits: ImageDataset) -> None:
    *_, last = train(CONFIG, digits, CPU)
    assert list(train(CONFIG, digits, CPU, resume=last.state.to_bytes())) == []


def test_without_validation_images_there_is_no_accuracy_and_no_patience(
    digits: ImageDataset,
) -> None:
    everything = digits.with_validation_in_training()
    reports = list(train(config(epochs=4, patience=1), everything, CPU))
    assert [report.step for report in reports] == [1, 4, 8, 12, 16]
    assert reports[-1].images_seen == 4 * 400
    assert all(math.isnan(report.val_accuracy) for report in reports)
    assert all(math.isnan(report.val_loss) for report in reports)
    assert reports[-1].reason is None


@pytest.fixture(scope="module")
def first_report(digits: ImageDataset) -> ProgressReport:
    return next(train(CONFIG, digits, CPU))


def test_a_checkpoint_holds_tensors_and_plain_values_only(first_report: ProgressReport) -> None:
    content = torch.load(io.BytesIO(first_report.state.to_bytes()), weights_only=True)
    assert content["step"] == 1
    assert content["history"] == [first_report.to_dict()]


@pytest.mark.parametrize(
    "damage", ["empty", "truncated", "flipped", "text", "another format", "hollow"]
)
def test_bytes_that_are_no_checkpoint_are_refused(
    digits: ImageDataset, first_report: ProgressReport, damage: str
) -> None:
    whole = first_report.state.to_bytes()
    another, hollow = io.BytesIO(), io.BytesIO()
    torch.save({"weights": torch.zeros(1)}, another)
    torch.save({"format": FORMAT}, hollow)
    broken = {
        "empty": b"",
        "truncated": whole[: len(whole) // 2],
        "flipped": bytes(255 - byte for byte in whole[:1000]) + whole[1000:],
        "text": b"no checkpoint",
        "another format": another.getvalue(),
        "hollow": hollow.getvalue(),
    }[damage]
    with pytest.raises(CheckpointError, match="the checkpoint can't be read"):
        next(train(CONFIG, digits, CPU, resume=broken))


def test_a_checkpoint_of_another_training_is_refused(
    digits: ImageDataset, first_report: ProgressReport
) -> None:
    checkpoint = first_report.state.to_bytes()
    with pytest.raises(CheckpointError, match="the checkpoint is of another config: lr, seed"):
        next(train(config(lr=1e-4, seed=1), digits, CPU, resume=checkpoint))
    everything = digits.with_validation_in_training()
    with pytest.raises(CheckpointError, match="the checkpoint is of other data than digits"):
        next(train(CONFIG, everything, CPU, resume=checkpoint))


def test_the_plan_stays_with_the_training(digits: ImageDataset) -> None:
    reports = list(train(CONFIG, digits, CPU))
    training = train(CONFIG, digits, CPU)
    checkpoint = next(training).state.to_bytes()
    other_plan = DevicePlan(device="cpu", precision="bf16", micro_batch=8)
    *_, last = train(CONFIG, digits, other_plan, resume=checkpoint)
    assert last.state.plan == CPU
    assert last.val_loss == reports[-1].val_loss


def linear_state(plan: DevicePlan) -> TrainState:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    chosen = config(optimizer="sgd", momentum=0, lr=0.1)
    optimizer = make_optimizer(chosen, model)
    return TrainState(
        config=chosen,
        plan=plan,
        data_identity=[],
        model=model,
        optimizer=optimizer,
        averages=Averages(model, (), steps_per_epoch=1),
    )


@pytest.mark.parametrize("partners", [None, Partners(labels=torch.arange(11) // 4, share=0.7)])
@pytest.mark.parametrize("weights", [None, torch.tensor([0.5, 1.0, 3.0])])
def test_micro_batches_add_up_to_the_whole_batch(
    partners: Partners | None, weights: Tensor | None
) -> None:
    images, labels = torch.randn(11, 1, 4, 4), torch.arange(11) % 3
    results = []
    for micro_batch in (None, 2, 4, 100):
        state = linear_state(dataclasses.replace(CPU, micro_batch=micro_batch))
        loss = optimizer_step(state, images, labels, partners, weights)
        results.append([loss, *state.model.parameters()])
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


@given(st.integers(2, 500), st.integers(2, 600))
def test_micro_batches_are_never_of_one_image_and_hardly_too_large(
    num_images: int, micro_batch: int
) -> None:
    parts = torch.arange(num_images).tensor_split(num_micro_batches(num_images, micro_batch))
    sizes = [len(part) for part in parts]
    assert min(sizes) >= 2
    assert max(sizes) <= max(3, micro_batch)


@given(st.integers(2, 500), st.integers(2, 600))
def test_batches_hold_each_image_once_and_none_is_of_one_image(
    num_images: int, batch_size: int
) -> None:
    bounds = batch_bounds(num_images, batch_size)
    covered = [index for first, end in bounds for index in range(first, end)]
    assert covered == list(range(num_images))
    sizes = [end - first for first, end in bounds]
    assert min(sizes) >= 2
    assert all(size == batch_size for size in sizes[:-1])
    assert sizes[-1] <= batch_size + 1


def test_one_image_is_too_few_to_train_on(digits: ImageDataset) -> None:
    one = dataclasses.replace(digits, train=digits.train.take([0]))
    with pytest.raises(DataError, match="at least two images are needed to train, got 1"):
        next(train(CONFIG, one, CPU))


@given(st.integers(1, 5), st.integers(1, 40), st.integers(0, 20))
def test_legs_go_through_every_batch_once_and_have_a_step_each(
    num_epochs: int, num_batches: int, steps_done: int
) -> None:
    every = legs(num_epochs, num_batches, 0)
    batches = [
        (leg.epoch, index) for leg in every for index in range(leg.first_batch, leg.end_batch)
    ]
    assert batches == [
        (epoch, index) for epoch in range(num_epochs) for index in range(num_batches)
    ]
    assert all(leg.end_batch > leg.first_batch for leg in every)
    expected = ([1] if num_batches >= 8 else []) + [4 * epoch + 4 for epoch in range(num_epochs)]
    assert [leg.step for leg in every] == expected
    assert legs(num_epochs, num_batches, steps_done) == [
        leg for leg in every if leg.step > steps_done
    ]


def test_each_epoch_has_an_order_of_its_own() -> None:
    first, second = epoch_order(0, 0, 100), epoch_order(0, 1, 100)
    assert sorted(first.tolist()) == sorted(second.tolist()) == list(range(100))
    assert not torch.equal(first, second)
    assert not torch.equal(first, epoch_order(1, 0, 100))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_training_on_a_gpu_learns_and_goes_on_from_its_checkpoint(digits: ImageDataset) -> None:
    plan = DevicePlan(device="cuda:0", precision="bf16", channels_last=True)
    state = torch.cuda.get_rng_state()
    training = train(AUGMENTED, digits, plan)
    checkpoint = next(training).state.to_bytes()
    assert torch.equal(torch.cuda.get_rng_state(), state)
    *_, resumed = train(AUGMENTED, digits, plan, resume=checkpoint)
    *_, undisturbed = training
    assert resumed.train_loss == pytest.approx(undisturbed.train_loss, rel=0.05)
    *_, on_cpu = train(AUGMENTED, digits, CPU, resume=checkpoint)
    assert on_cpu.train_loss == pytest.approx(undisturbed.train_loss, rel=0.05)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_no_step_waits_for_the_device(digits: ImageDataset) -> None:
    config = TrainConfig(
        flip=True, rotation=10.0, translate=2, cutout=3, erasing=0.5, mixup=0.5, cutmix=0.5,
        clip_norm=1.0, optimizer="sgd",
    )  # fmt: skip
    plan = DevicePlan(device="cuda:0", precision="bf16", channels_last=True)
    state = TrainState.start(config, digits, plan, steps_per_epoch=2)
    split, generator = to_device(digits.train, plan), seeded_generator("test", 0)
    normalise = Normaliser(digits.mean, digits.std, plan.device)
    try:
        for mode in (0, 0, 2, 2):  # 2: an error; the first steps may search and allocate
            torch.cuda.set_sync_debug_mode(mode)
            images = normalise(augment(split.images, config, generator))
            images, partners = mix(images, split.labels, config, generator)
            optimizer_step(state, images, split.labels, partners)
    finally:
        torch.cuda.set_sync_debug_mode(0)
