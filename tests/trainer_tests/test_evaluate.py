import math
from typing import get_args

import pytest
import torch
from sklearn import metrics
from torch import Tensor, nn

import trainer.evaluate
from trainer.config import Objective
from trainer.data.dataset import Split
from trainer.device import DevicePlan
from trainer.evaluate import (
    calibration_error,
    classify,
    confusion_matrix,
    early_part,
    early_size,
    evaluate,
    macro_f1,
    macro_recall,
    negative_log_likelihood,
    per_class,
    wilson_interval,
)

CPU = DevicePlan(device="cpu")
MEAN, STD = (0.4, 0.6), (0.2, 0.3)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(32, 16), nn.BatchNorm1d(16), nn.Linear(16, 4))


def some_split(num_images: int = 53) -> Split:
    source = torch.Generator().manual_seed(1)
    images = torch.randint(256, (num_images, 2, 4, 4), dtype=torch.uint8, generator=source)
    return Split(images, torch.randint(4, (num_images,), generator=source))


def expected_logits(model: nn.Module, images: Tensor) -> Tensor:
    mean, std = torch.tensor(MEAN).view(2, 1, 1), torch.tensor(STD).view(2, 1, 1)
    with torch.no_grad():
        result: Tensor = model.eval()((images / 255 - mean) / std)
    return result


@pytest.fixture(params=[1, 32 * 8, 2**20], ids=["batches of 8", "batches of 8 too", "one batch"])
def batch_values(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trainer.evaluate.PIXELS, "cpu", request.param)


@pytest.mark.usefixtures("batch_values")
def test_loss_and_accuracy_are_those_of_all_images_whatever_the_batches() -> None:
    model, split = network(), some_split()
    result = evaluate(model, split, CPU, mean=MEAN, std=STD)
    logits = expected_logits(model, split.images)
    assert result.num_images == 53
    expected = nn.functional.cross_entropy(logits, split.labels)
    assert result.loss == pytest.approx(float(expected), rel=1e-5)
    correct = int((logits.argmax(dim=1) == split.labels).sum())
    assert result.accuracy == correct / 53
    predicted = logits.argmax(dim=1)
    balanced = metrics.balanced_accuracy_score(split.labels, predicted)
    assert result.balanced_accuracy == pytest.approx(balanced)
    f1 = metrics.f1_score(split.labels, predicted, average="macro")
    assert result.macro_f1 == pytest.approx(f1)
    values = [result.value(name) for name in get_args(Objective)]
    assert values == [result.accuracy, result.balanced_accuracy, result.macro_f1]
    assert len(set(values)) == 3


@pytest.mark.usefixtures("batch_values")
def test_classify_gives_the_logits_in_the_images_order() -> None:
    model, split = network(), some_split()
    logits = classify(model, split.images, CPU, mean=MEAN, std=STD)
    torch.testing.assert_close(logits, expected_logits(model, split.images))
    assert not logits.requires_grad


@pytest.mark.parametrize("training", [True, False])
def test_the_models_mode_and_statistics_stay(training: bool) -> None:
    model = network().train(training)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    evaluate(model, some_split(), CPU, mean=MEAN, std=STD)
    assert model.training is training
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_an_empty_split_has_no_accuracy() -> None:
    result = evaluate(network(), some_split(0), CPU, mean=MEAN, std=STD)
    assert math.isnan(result.loss)
    assert all(math.isnan(result.value(name)) for name in get_args(Objective))
    assert result.num_images == 0


def test_pulse_comes_before_each_batch_and_its_error_comes_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(trainer.evaluate.PIXELS, "cpu", 1)
    pulses: list[int] = []

    def pulse() -> None:
        pulses.append(1)
        if len(pulses) == 10:
            raise KeyboardInterrupt

    model = network()
    evaluate(model, some_split(), CPU, mean=MEAN, std=STD, pulse=pulse)
    assert len(pulses) == 7
    with pytest.raises(KeyboardInterrupt):
        evaluate(model, some_split(), CPU, mean=MEAN, std=STD, pulse=pulse)
    assert model.training
    assert torch.is_grad_enabled()


def test_a_class_without_images_does_not_count_in_the_balanced_accuracy() -> None:
    model, split = network(), some_split()
    rest = split.take((split.labels != 2).nonzero()[:, 0])
    result = evaluate(model, rest, CPU, mean=MEAN, std=STD)
    matrix = confusion_matrix(expected_logits(model, rest.images), rest.labels)
    recalls = [int(matrix[c, c]) / int(matrix[c].sum()) for c in (0, 1, 3)]
    assert result.balanced_accuracy == pytest.approx(sum(recalls) / 3)
    assert result.macro_f1 == macro_f1(matrix)


def test_metrics_are_those_of_scikit_learn() -> None:
    source = torch.Generator().manual_seed(3)
    labels = torch.randint(5, (200,), generator=source)
    logits = torch.randn(200, 6, generator=source) + 2 * nn.functional.one_hot(labels, 6)
    predicted = logits.argmax(dim=1).numpy()
    matrix = confusion_matrix(logits, labels)
    classes = list(range(6))
    assert matrix.tolist() == metrics.confusion_matrix(labels, predicted, labels=classes).tolist()
    precision, recall, f1, support = metrics.precision_recall_fscore_support(
        labels, predicted, labels=classes, zero_division=0
    )
    ours = per_class(matrix)
    assert [m.precision for m in ours] == pytest.approx(list(precision))
    assert [m.recall for m in ours] == pytest.approx(list(recall))
    assert [m.f1 for m in ours] == pytest.approx(list(f1))
    assert [m.support for m in ours] == list(support)
    assert macro_f1(matrix) == pytest.approx(metrics.f1_score(labels, predicted, average="macro"))
    assert macro_recall(matrix) == pytest.approx(sum(recall[:5]) / 5)


def test_classes_without_images_do_not_count_in_the_means() -> None:
    matrix = torch.tensor([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    assert macro_recall(matrix) == pytest.approx((0.75 + 1) / 2)
    assert macro_f1(matrix) == pytest.approx((6 / 7 + 8 / 9) / 2)


def test_calibration_error_is_the_gap_between_confidence_and_accuracy_in_each_bin() -> None:
    """Ten answers at 0.62 of which five are right, ten at 0.93 of which all are."""
    confidence = torch.tensor([0.62] * 10 + [0.93] * 10, dtype=torch.float64)
    logits = torch.stack([confidence.log(), (1 - confidence).log()], dim=1)
    labels = torch.tensor([0, 1] * 5 + [0] * 10)
    assert calibration_error(logits, labels) == pytest.approx((0.12 + 0.07) / 2)
    assert calibration_error(logits, labels, num_bins=1) == pytest.approx(0.025)
    certain = torch.tensor([[100.0, -100.0]] * 4)
    assert calibration_error(certain, torch.tensor([0, 0, 0, 1])) == pytest.approx(0.25)


def test_calibration_error_is_that_of_a_plain_loop() -> None:
    source = torch.Generator().manual_seed(4)
    logits = 3 * torch.randn(500, 7, generator=source)
    labels = torch.randint(7, (500,), generator=source)
    probabilities = logits.double().softmax(dim=1).numpy()
    expected = 0.0
    for number in range(15):
        low, high = number / 15, (number + 1) / 15
        rows = [i for i in range(500) if low < probabilities[i].max() <= high]
        if rows:
            hits = sum(int(probabilities[i].argmax()) == int(labels[i]) for i in rows)
            confidence = sum(probabilities[i].max() for i in rows)
            expected += abs(hits - confidence) / 500
    assert calibration_error(logits, labels) == pytest.approx(expected)


def test_negative_log_likelihood_is_scikit_learn_s_log_loss() -> None:
    source = torch.Generator().manual_seed(5)
    logits, labels = torch.randn(90, 3, generator=source), torch.arange(90) % 3
    expected = metrics.log_loss(labels, logits.double().softmax(dim=1).numpy())
    assert negative_log_likelihood(logits, labels) == pytest.approx(expected)


@pytest.mark.parametrize(("successes", "trials"), [(8, 10), (1, 30), (9250, 10000)])
def test_wilsons_bounds_are_the_shares_that_are_z_deviations_away(
    successes: int, trials: int
) -> None:
    share = successes / trials
    for bound in wilson_interval(successes, trials):
        deviation = math.sqrt(bound * (1 - bound) / trials)
        assert abs(share - bound) == pytest.approx(1.96 * deviation, rel=1e-6)


def test_wilsons_interval_stays_between_0_and_1() -> None:
    assert wilson_interval(0, 0) == (0, 1)
    assert list(wilson_interval(0, 5)) == pytest.approx([0, 0.4345], abs=1e-4)
    assert list(wilson_interval(5, 5)) == pytest.approx([0.5655, 1], abs=1e-4)


def test_the_early_part_is_the_same_each_time_and_has_each_class_with_its_share(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trainer.evaluate, "EARLY_IMAGES", 50)
    split = Split(torch.zeros(217, 1, 2, 2, dtype=torch.uint8), torch.arange(217) % 10 // 4)
    part = early_part(split)
    assert len(part) == early_size(217) == 55
    shares = split.labels.bincount() / len(split)
    assert torch.allclose(part.labels.bincount() / len(part), shares, atol=0.02)
    assert torch.equal(early_part(split).labels, part.labels)


def test_few_images_are_all_looked_at_early() -> None:
    split = some_split()
    assert early_part(split) is split
    assert [early_size(number) for number in (0, 53, 3_999, 4_000, 6_000)] == [
        0, 53, 3_999, 2_000, 2_000,
    ]  # fmt: skip
