"""How fast a configuration trains and is evaluated here, found out in seconds."""

import dataclasses
import time
from dataclasses import dataclass

from trainer.augment import augment
from trainer.batches import to_device
from trainer.config import Precision, TrainConfig, trains_on_features
from trainer.data.dataset import ImageDataset
from trainer.device import choose_plan
from trainer.evaluate import Normaliser, evaluate, no_pulse
from trainer.features import as_features, on_features
from trainer.loop import optimizer_step
from trainer.mixing import mix
from trainer.seeds import seeded_generator
from trainer.state import TrainState

_MOST_IMAGES = 4096
"""Trained on again and again: more would tell nothing new."""
_LEAST_STEPS = 3


@dataclass(frozen=True, kw_only=True)
class Speed:
    """Images per second of one worker, and how it uses its device."""

    train: float
    evaluate: float
    precision: str
    channels_last: bool
    micro_batch: int | None
    """Images at once where the batch doesn't fit into the device's memory."""
    features: float | None = None
    """Of images whose features are computed, where a head alone is trained on them."""


def measure_speed(
    config: TrainConfig,
    data: ImageDataset,
    *,
    device: str,
    seconds: float,
    precision: Precision | None = None,
) -> Speed:
    """Train for about so many seconds on the first images, then evaluate for half as long.

    Slow configurations take three optimizer steps, however long. Raises ConfigError or
    OutOfMemory as a training would.
    """
    plan = choose_plan(
        config,
        input_size=data.input_size,
        num_classes=data.num_classes,
        device=device,
        precision=precision,
    )
    first = range(min(_MOST_IMAGES, len(data.train)))
    config = dataclasses.replace(config, pretrained=False, batch_size=min(
        config.batch_size, max(2, len(first))
    ))  # fmt: skip
    state = TrainState.start(config, data, plan, steps_per_epoch=1)
    few = dataclasses.replace(
        data, train=data.train.take(first), val=data.val.take([]), groups=None
    )
    features, model = None, state.model
    if trains_on_features(config):
        as_features(model, _other(few), plan, no_pulse)  # loads kernels
        started = time.perf_counter()
        few, model = as_features(model, few, plan, no_pulse), on_features(model)
        features = len(few.train) / (time.perf_counter() - started)
    normalise = Normaliser(few.mean, few.std, plan.device)
    split = to_device(few.train, plan)
    generator = seeded_generator("speed", config.seed)
    model.train()

    def step(index: int) -> int:
        start = index * config.batch_size % max(1, len(split) - config.batch_size + 1)
        end = start + config.batch_size
        images = augment(split.images[start:end], config, generator)
        labels = split.labels[start:end]
        images, partners = mix(normalise(images), labels, config, generator)
        float(optimizer_step(state, images, labels, partners, model=model))
        return config.batch_size

    step(0)  # loads kernels
    num_images, index, started = 0, 1, time.perf_counter()
    while index <= _LEAST_STEPS or time.perf_counter() - started < seconds:
        num_images += step(index)
        index += 1
    train_speed = num_images / (time.perf_counter() - started)
    shown = type(split)(split.images[:256], split.labels[:256])
    num_images, started = 0, time.perf_counter()
    while not num_images or time.perf_counter() - started < seconds / 2:
        evaluate(model, shown, plan, mean=few.mean, std=few.std)
        num_images += len(shown)
    return Speed(
        train=train_speed,
        evaluate=num_images / (time.perf_counter() - started),
        precision=plan.precision,
        channels_last=plan.channels_last,
        micro_batch=plan.micro_batch,
        features=features,
    )


def _other(data: ImageDataset) -> ImageDataset:
    """A few of its images, of which no features are kept for those of all."""
    return dataclasses.replace(data, train=data.train.take(range(min(8, len(data.train)))))
