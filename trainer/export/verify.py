"""An exported file, loaded again and compared with the model on real images."""

import dataclasses
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trainer.data.dataset import Split
from trainer.export.formats import Format
from trainer.export.latency import Latency, measure
from trainer.export.model import Classifier

_LARGEST_BATCH = 256
_BATCH_VALUES = 2**20
"""Values of all images of a batch together: it bounds the memory."""
_TOLERANCE = 1e-3
"""Largest difference of a logit, as a share of the largest logit or of 1, whichever is more."""


DEFAULT_TOLERANCE = 0.01
"""How much less accurate a format of reduced precision may be: one point."""


class ExportRefused(Exception):
    """The file isn't the model; the message is one line that says in what they differ."""


@dataclass(frozen=True, kw_only=True)
class FormatCheck:
    """What was found about an exported file."""

    file: str
    bytes: int
    max_abs_diff: float
    """Largest difference of any logit from the model's, over all images."""
    accuracy: float
    """Of the file itself, on the same images, in [0, 1]."""
    latency: Latency

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        values = dataclasses.asdict(self)
        latency = values.pop("latency")
        return {**values, **latency}


def verify(
    path: Path,
    fmt: Format,
    manifest: Mapping[str, Any],
    test: Split,
    reference: Tensor,
    *,
    tolerance: float = DEFAULT_TOLERANCE,
) -> FormatCheck:
    """Run the file on each image of the split, in batches of 1, 2, many and what is left.

    reference: the model's logits of these images, float32 (N,classes). tolerance: how much less
    accurate a format of reduced precision may be. Raises ExportRefused if the file gives other
    logits, or is less accurate than that.
    """
    classify = fmt.load(path, manifest)
    logits = classify_all(classify, test.images)
    if logits.shape != reference.shape or logits.dtype != reference.dtype:
        raise ExportRefused(
            f"gives {logits.dtype} {tuple(logits.shape)} where the model gives"
            f" {reference.dtype} {tuple(reference.shape)}"
        )
    difference = float((logits - reference).abs().max())
    accuracy = _accuracy(logits, test)
    if fmt.exact:
        check_logits(logits, reference)
    else:
        _check_accuracy(accuracy, _accuracy(reference, test), logits, tolerance)
    return FormatCheck(
        file=path.name,
        bytes=path.stat().st_size,
        max_abs_diff=difference,
        accuracy=accuracy,
        latency=measure(classify, test.images),
    )


def check_logits(logits: Tensor, reference: Tensor) -> None:
    """Raises ExportRefused if these aren't the model's logits. Both: float32 (N,classes)."""
    difference = float((logits - reference).abs().max())
    # A comparison with NaN is false: it is refused, too.
    if not difference <= _TOLERANCE * max(1.0, float(reference.abs().max())):
        raise ExportRefused(f"differs from the model by {difference:.3g} in a logit")


def _check_accuracy(accuracy: float, model: float, logits: Tensor, tolerance: float) -> None:
    if not bool(logits.isfinite().all()):
        raise ExportRefused("gives logits that aren't finite")
    # Shares of so many images: what is lost has no digits beyond those.
    if model - accuracy > tolerance + 1e-9:
        raise ExportRefused(
            f"its accuracy is {accuracy:.4f} where the model's is {model:.4f}: it loses "
            f"{model - accuracy:.4f}, more than the tolerance of {tolerance:g}"
        )


def _accuracy(logits: Tensor, split: Split) -> float:
    return float((logits.argmax(dim=1) == split.labels).double().mean())


def classify_all(classify: Classifier, images: Tensor) -> Tensor:
    """Logits, (N,classes), of uint8 images (N,C,H,W) on the CPU, N >= 1."""
    batches = [
        torch.from_numpy(classify(images[start:stop].contiguous().numpy()))
        for start, stop in _batches(len(images), images[0].numel())
    ]
    return torch.cat(batches)


def _batches(num_images: int, values: int) -> Iterator[tuple[int, int]]:
    """Starts and ends: one image, two, then many: a file that knows one batch size fails here."""
    many = min(max(_BATCH_VALUES // values, 8), _LARGEST_BATCH)
    start = 0
    for size in (1, 2):
        if start < num_images:
            yield start, min(start + size, num_images)
            start += size
    for begin in range(start, num_images, many):
        yield begin, min(begin + many, num_images)
