"""How good a model is on a split: loss, accuracy, recall, F1, confusion matrix."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.config import Objective
from trainer.data.dataset import Split
from trainer.device import DevicePlan
from trainer.memory import is_out_of_memory

PIXELS = {"cpu": 2**17, "mps": 2**23, "cuda": 2**24}
"""Values of all images of a batch together. With four times as many a CPU, whose caches don't hold
them, takes 1.5 to 1.8 times as long (smallcnn, resnet8)."""


EARLY_IMAGES = 2_000
"""Of the validation images, about so many judge a training after its first quarter epoch."""


def no_pulse() -> None:
    """Nothing."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """A model on a split: loss is the mean cross-entropy; all are NaN without images."""

    loss: float
    accuracy: float
    balanced_accuracy: float
    """macro_recall of the confusion matrix."""
    macro_f1: float
    num_images: int

    def value(self, objective: Objective) -> float:
        """What a training is judged by."""
        return float(getattr(self, objective))


@dataclass(frozen=True, kw_only=True)
class ClassMetrics:
    """One class against the rest; what would be 0/0 is 0."""

    precision: float
    recall: float
    f1: float
    support: int
    """Images of this class."""
    predicted: int
    """Images that were taken for this class."""


class Normaliser:
    """uint8 (N,C,H,W) or float in 0..255 -> (x / 255 - mean) / std, float32, on a device."""

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], device: str) -> None:
        self.shift = 255 * torch.tensor(mean, device=device).view(-1, 1, 1)
        self.scale = 255 * torch.tensor(std, device=device).view(-1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        return images.float().sub(self.shift).div_(self.scale)


def evaluate(
    model: nn.Module,
    split: Split,
    plan: DevicePlan,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    pulse: Callable[[], None] = no_pulse,
) -> Evaluation:
    """Loss and accuracies of the model, in large batches; it waits for the device at their end."""
    if not len(split):
        nothing = math.nan
        return Evaluation(
            loss=nothing,
            accuracy=nothing,
            balanced_accuracy=nothing,
            macro_f1=nothing,
            num_images=0,
        )
    total_loss = torch.zeros((), device=plan.device)
    predicted = []
    labels = split.labels.to(plan.device)
    start = 0
    for logits in _logits(model, split.images, plan, Normaliser(mean, std, plan.device), pulse):
        batch_labels = labels[start : start + len(logits)]
        total_loss += functional.cross_entropy(logits, batch_labels, reduction="sum")
        predicted.append(logits.argmax(dim=1))
        start += len(logits)
    guesses = torch.cat(predicted)
    found = _metrics(
        *(
            chosen.bincount(minlength=logits.shape[1]).tolist()
            for chosen in (labels[guesses == labels], labels, guesses)
        )
    )
    return Evaluation(
        loss=float(total_loss) / start,
        accuracy=int((guesses == labels).sum()) / start,
        balanced_accuracy=_mean_recall(found),
        macro_f1=_mean_f1(found),
        num_images=start,
    )


def early_part(split: Split) -> Split:
    """EARLY_IMAGES of them or somewhat more, the same each time, each class with its share.

    All where there are fewer than twice as many. Where most trainings are judged once and stopped,
    looking at everything costs a seventh of them.
    """
    stride = _early_stride(len(split))
    if stride == 1:
        return split
    by_class = torch.argsort(split.labels, stable=True)
    chosen = by_class[::stride].sort().values
    return type(split)(split.images[chosen], split.labels[chosen])


def early_size(num_images: int) -> int:
    """How many early_part takes of so many."""
    return math.ceil(num_images / _early_stride(num_images))


def _early_stride(num_images: int) -> int:
    return max(1, num_images // EARLY_IMAGES)


def classify(
    model: nn.Module,
    images: Tensor,
    plan: DevicePlan,
    *,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    pulse: Callable[[], None] = no_pulse,
) -> Tensor:
    """Logits (N,classes), float32 on the CPU, of uint8 images (N,C,H,W), N >= 1."""
    normalise = Normaliser(mean, std, plan.device)
    return torch.cat(list(_logits(model, images, plan, normalise, pulse))).cpu()


def _logits(
    model: nn.Module,
    images: Tensor,
    plan: DevicePlan,
    normalise: Normaliser,
    pulse: Callable[[], None],
) -> Iterator[Tensor]:
    """Logits (n,classes) batch by batch, on the device; the model's mode is as before after it.

    Where memory doesn't hold a batch, this one and those that follow are half as large.
    """
    size = max(8, min(2048, PIXELS[torch.device(plan.device).type] // images[0].numel()))
    start = 0
    was_training = model.training
    model.eval()
    try:
        while start < len(images):
            pulse()
            batch = images[start : start + size]
            logits = _forward_if_it_fits(model, batch, plan, normalise)
            if logits is None:
                size = len(batch) // 2
                torch.accelerator.empty_cache()
            else:
                start += len(batch)
                yield logits
    finally:
        model.train(was_training)


def _forward_if_it_fits(
    model: nn.Module, batch: Tensor, plan: DevicePlan, normalise: Normaliser
) -> Tensor | None:
    """None if memory doesn't hold it. One image that doesn't fit raises what torch raises."""
    try:
        return _forward(model, batch, plan, normalise)
    except (MemoryError, RuntimeError) as error:
        if len(batch) == 1 or not is_out_of_memory(error):
            raise
        return None


def _forward(model: nn.Module, batch: Tensor, plan: DevicePlan, normalise: Normaliser) -> Tensor:
    with torch.no_grad(), plan.autocast():
        logits: Tensor = model(plan.lay_out(normalise(batch.to(plan.device))))
    return logits.float()


def confusion_matrix(logits: Tensor, labels: Tensor) -> Tensor:
    """int64 (classes,classes): row is the true class, column the predicted one.

    logits: (N,classes); labels: int64 (N,).
    """
    num_classes = logits.shape[1]
    cells = labels * num_classes + logits.argmax(dim=1)
    return torch.bincount(cells, minlength=num_classes**2).view(num_classes, num_classes)


def per_class(confusion: Tensor) -> list[ClassMetrics]:
    """Precision, recall and F1 of each class. confusion: as confusion_matrix gives it."""
    counts = (confusion.diagonal(), confusion.sum(dim=1), confusion.sum(dim=0))
    return _metrics(*(each.tolist() for each in counts))


def _metrics(hits: list[int], support: list[int], predicted: list[int]) -> list[ClassMetrics]:
    return [
        ClassMetrics(
            precision=hit / max(1, guesses),
            recall=hit / max(1, images),
            f1=2 * hit / max(1, images + guesses),
            support=images,
            predicted=guesses,
        )
        for hit, images, guesses in zip(hits, support, predicted, strict=True)
    ]


def macro_recall(confusion: Tensor) -> float:
    """Mean recall of the classes that have images (balanced accuracy)."""
    return _mean_recall(per_class(confusion))


def macro_f1(confusion: Tensor) -> float:
    """Mean F1 of the classes that have images or were predicted (as scikit-learn's)."""
    return _mean_f1(per_class(confusion))


def _mean_recall(classes: list[ClassMetrics]) -> float:
    return _mean([one.recall for one in classes if one.support])


def _mean_f1(classes: list[ClassMetrics]) -> float:
    return _mean([one.f1 for one in classes if one.support or one.predicted])


def wilson_interval(successes: int, trials: int, z: float = 1.96) -> tuple[float, float]:
    """Confidence interval of a share (Wilson 1927); z = 1.96 is 95 %. (0, 1) without trials."""
    if trials == 0:
        return 0.0, 1.0
    share = successes / trials
    centre = share + z * z / (2 * trials)
    spread = z * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    scale = 1 + z * z / trials
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    """Mean of -log of the probability of the true class, in nats.

    logits: (N,classes), N >= 1; labels: int64 (N,).
    """
    return float(functional.cross_entropy(logits.double(), labels))


def calibration_error(logits: Tensor, labels: Tensor, *, num_bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, equal-width bins), in [0, 1].

    How far the probability of the predicted class lies from how often it is right, in the mean.
    logits: (N,classes), N >= 1; labels: int64 (N,).
    """
    confidence, predicted = logits.double().softmax(dim=1).max(dim=1)
    # Bins are open to the left, as in the paper: 1.0 is in the last.
    bins = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    gaps = (predicted == labels).double() - confidence
    summed = torch.zeros(num_bins, dtype=torch.float64).index_add_(0, bins, gaps)
    return float(summed.abs().sum()) / len(labels)


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else math.nan
