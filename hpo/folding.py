"""What k-fold validation makes of a study's data, and of a trial's work. Imports torch."""

import functools
from dataclasses import dataclass

from hpo.spec import StudySpec
from trainer.config import TrainConfig
from trainer.data.dataset import ImageDataset
from trainer.data.folds import cut_folds, fold_parts
from trainer.evaluate import early_size
from trainer.footprint import measure_footprint
from trainer.memory import is_probed

_COPIES = 4
"""Of its weights that a model holds between two steps: they, gradients, adamw's two moments."""


@dataclass(frozen=True, kw_only=True)
class EpochWork:
    """What a trial does in an epoch, and holds in memory for it."""

    num_train: int
    """Images that one model is trained on; the fewest of any fold."""
    num_trained: int
    """Images that all models of a trial are trained on."""
    num_checked: int
    """Images that all models of a trial are validated on."""
    num_checked_early: int
    """The same at the quarter of the first epoch."""
    image_bytes: int


def work_of_an_epoch(data: ImageDataset, *, folds: int | None, seed: int) -> EpochWork:
    """seed: of the study. Raises ConfigError if a class has too few images for so many folds."""
    images = data.train.images.nbytes + data.val.images.nbytes
    if folds is None:
        num_train = len(data.train)
        return EpochWork(
            num_train=num_train,
            num_trained=num_train,
            num_checked=len(data.val),
            num_checked_early=early_size(len(data.val)),
            image_bytes=images,
        )
    num_images = len(data.train) + len(data.val)
    sizes = [len(part) for part in fold_parts(data, folds, seed)]
    one = images // num_images
    return EpochWork(
        num_train=num_images - max(sizes),
        num_trained=(folds - 1) * num_images,
        num_checked=num_images,
        num_checked_early=sum(map(early_size, sizes)),
        image_bytes=one * (3 * num_images - sizes[-1]),
    )


def folds_of(spec: StudySpec, data: ImageDataset, device: str) -> tuple[ImageDataset, ...]:
    """The study's folds, on the device; none if it has one validation split."""
    return () if spec.folds is None else _cut(data, spec.folds, spec.seed, device)


def bytes_beside_a_model(
    spec: StudySpec, config: TrainConfig, data: ImageDataset, device: str
) -> int:
    """Of images and, with folds, of the other models, while one trains where memory is probed."""
    images = data.train.images.nbytes + data.val.images.nbytes
    if spec.folds is None or not is_probed(device):
        return images
    footprint = measure_footprint(
        config,
        input_size=data.input_size,
        num_classes=data.num_classes,
        device="cpu",
        times_latency=False,
    )
    others = (spec.folds - 1) * _COPIES * footprint.megabytes * 1e6
    return 2 * images + int(others)


@functools.lru_cache(maxsize=1)
def _cut(data: ImageDataset, folds: int, seed: int, device: str) -> tuple[ImageDataset, ...]:
    """Once in a worker's life: its data, study and device stay the same."""
    return cut_folds(data, folds, seed, device=device)
