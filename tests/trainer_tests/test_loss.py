import pytest
import torch
from torch.nn import functional

from trainer.loss import summed_loss
from trainer.mixing import Partners

LOGITS = torch.randn(6, 3, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 0])
OTHERS = torch.tensor([1, 1, 0, 2, 0, 0])


def one_hot(smoothing: float, labels: torch.Tensor) -> torch.Tensor:
    return (1 - smoothing) * functional.one_hot(labels, 3) + smoothing / 3


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_plain_loss_is_torch_s_own_to_the_last_bit(smoothing: float) -> None:
    expected = functional.cross_entropy(LOGITS, LABELS, reduction="sum", label_smoothing=smoothing)
    assert torch.equal(summed_loss(LOGITS, LABELS, smoothing=smoothing), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_mixed_loss_is_that_of_the_mixed_and_smoothed_targets(smoothing: float) -> None:
    partners = Partners(labels=OTHERS, share=0.7)
    targets = 0.7 * one_hot(smoothing, LABELS) + 0.3 * one_hot(smoothing, OTHERS)
    expected = functional.cross_entropy(LOGITS, targets, reduction="sum")
    torch.testing.assert_close(summed_loss(LOGITS, LABELS, partners, smoothing=smoothing), expected)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_an_image_of_weight_three_counts_as_three_images(smoothing: float) -> None:
    weights = torch.tensor([1.0, 3.0, 2.0])
    times = weights[LABELS].long()
    expected = functional.cross_entropy(
        LOGITS.repeat_interleave(times, 0),
        LABELS.repeat_interleave(times),
        reduction="sum",
        label_smoothing=smoothing,
    )
    found = summed_loss(LOGITS, LABELS, weights=weights, smoothing=smoothing)
    torch.testing.assert_close(found, expected)


def test_a_mixed_image_weighs_by_its_shares_of_both_classes() -> None:
    weights = torch.tensor([1.0, 3.0, 2.0])
    own, theirs = (
        (weights[labels] * functional.cross_entropy(LOGITS, labels, reduction="none")).sum()
        for labels in (LABELS, OTHERS)
    )
    found = summed_loss(LOGITS, LABELS, Partners(labels=OTHERS, share=0.7), weights, smoothing=0.0)
    torch.testing.assert_close(found, 0.7 * own + 0.3 * theirs)
