"""What an export says of the test: accuracy and its interval, a class at a time, calibration."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from trainer.evaluate import (
    calibration_error,
    confusion_matrix,
    macro_f1,
    macro_recall,
    negative_log_likelihood,
    per_class,
    wilson_interval,
)

SUMMARY = (
    "accuracy",
    "ci95",
    "num_images",
    "macro_recall",
    "macro_f1",
    "expected_calibration_error",
    "negative_log_likelihood",
)
"""Of final_metrics, what stands in the manifest."""


def final_metrics(logits: Tensor, labels: Tensor, class_names: Sequence[str]) -> dict[str, Any]:
    """What metrics.json says of the test. logits: (N,classes), N >= 1; labels: int64 (N,)."""
    confusion = confusion_matrix(logits, labels)
    num_images, num_correct = int(confusion.sum()), int(confusion.trace())
    classes = [
        {
            "class": name,
            "precision": found.precision,
            "recall": found.recall,
            "f1": found.f1,
            "support": found.support,
        }
        for name, found in zip(class_names, per_class(confusion), strict=True)
    ]
    return {
        "accuracy": num_correct / num_images,
        "ci95": list(wilson_interval(num_correct, num_images)),
        "num_images": num_images,
        "macro_recall": macro_recall(confusion),
        "macro_f1": macro_f1(confusion),
        "expected_calibration_error": calibration_error(logits, labels),
        "negative_log_likelihood": negative_log_likelihood(logits, labels),
        "per_class": classes,
        "confusion_matrix": confusion.tolist(),
    }
