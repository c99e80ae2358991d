"""Self-supervised pretraining: a backbone learns from images without their labels.

simclr: two views of an image are to be more alike than those of any two images of the batch
(Chen et al. 2020, "A Simple Framework for Contrastive Learning"). moco: than a view and a queue of
earlier views, made by an average of the network (He et al. 2020, "Momentum Contrast"; the head of
its second version). Views are cut out, mirrored, and changed in brightness and contrast; there is
no blur, which serves large pictures.
"""

import copy
import dataclasses
import io
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional

from trainer.augment import flip
from trainer.backbones import build
from trainer.config import ConfigError, DataError, TrainConfig, TrainingDiverged, unknown_name
from trainer.data.dataset import ImageDataset
from trainer.device import DevicePlan, prepare
from trainer.evaluate import Normaliser, no_pulse
from trainer.heads import head_name
from trainer.memory import memory_errors
from trainer.optim import lr_at, make_optimizer, set_lr
from trainer.seeds import own_randomness, seeded_generator
from trainer.state import CheckpointError
from trainer.transfer import sent

Method = Literal["simclr", "moco"]
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """All that decides a pretraining, but for data and device. Raises ConfigError."""

    backbone: str
    method: Method = "simclr"
    epochs: int = 20
    batch_size: int = 256
    """Images per step, two views of each."""
    lr: float = 2e-3
    """Peak, of AdamW with a cosine."""
    weight_decay: float = 1e-2
    temperature: float = 0.2
    """By which likeness is divided; > 0."""
    features: int = 128
    """Of the projection in which views are compared."""
    queue: int = 4096
    """Of moco: earlier views to be told from."""
    momentum: float = 0.99
    """Of moco: the share that the averaged network keeps at each step."""
    least_area: float = 0.3
    """Share of a picture that a view shows at least, in (0, 1]."""
    seed: int = 0

    def __post_init__(self) -> None:
        if self.method not in get_args(Method):
            raise ConfigError(unknown_name("method", self.method, get_args(Method)))
        for name, least in (("epochs", 1), ("batch_size", 2), ("features", 2), ("queue", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"{name} must be >= {least}, got {getattr(self, name)}")
        for name in ("lr", "temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} must be > 0, got {getattr(self, name)}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"momentum must be in [0, 1), got {self.momentum}")
        if not 0 < self.least_area <= 1:
            raise ConfigError(f"least_area must be in (0, 1], got {self.least_area}")

    @property
    def train_config(self) -> TrainConfig:
        """The network and the optimizer, as a training has them."""
        return TrainConfig(
            backbone=self.backbone,
            lr=self.lr,
            weight_decay=self.weight_decay,
            schedule="cosine",
            seed=self.seed,
        )


@dataclass(frozen=True, kw_only=True)
class PretrainReport:
    """An epoch of pretraining. loss: its mean over the batches, in nats."""

    epoch: int
    loss: float
    images_per_second: float
    seconds: float
    state: "Pretraining"


class Pretraining:
    """The network with its projection, the optimizer, and what moco keeps beside them."""

    def __init__(self, config: PretrainConfig, data: ImageDataset, plan: DevicePlan) -> None:
        self.config, self.plan, self.identity = config, plan, [data.fingerprint, len(data.train)]
        own = config.train_config
        model = build(own, input_size=data.input_size, num_classes=2)
        self.head = head_name(model)
        with own_randomness("projection", config.seed):
            width = model.get_submodule(self.head).in_features
            assert isinstance(width, int)
            projection = nn.Sequential(
                nn.Linear(width, width), nn.ReLU(inplace=True), nn.Linear(width, config.features)
            )
            model.set_submodule(self.head, projection)
            queue = functional.normalize(torch.randn(config.queue, config.features))
        self.model = plan.place(model)
        self.optimizer = make_optimizer(own, self.model)
        self.keys = copy.deepcopy(self.model).requires_grad_(False)
        self.queue = queue.to(plan.device)
        self.epoch, self.seconds = 0, 0.0

    @property
    def backbone(self) -> nn.Module:
        """The network with no head: nothing else of it is worth keeping."""
        model = copy.deepcopy(self.model)
        model.set_submodule(self.head, nn.Identity())
        return model

    def to_bytes(self) -> bytes:
        """Tensors and plain Python only."""
        file = io.BytesIO()
        torch.save({name: _plain(getattr(self, name)) for name in _PARTS} | self._about(), file)
        return file.getvalue()

    def load(self, content: bytes) -> None:
        """Go on from to_bytes(). Raises CheckpointError if it is another pretraining's."""
        try:
            saved = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
            about = {name: saved[name] for name in self._about()}
        except Exception as error:  # torch.load raises whatever a broken file leads to
            raise CheckpointError("the checkpoint can't be read: it is broken") from error
        if about != self._about():
            raise CheckpointError("the checkpoint is of another pretraining")
        for name in ("model", "optimizer", "keys"):
            getattr(self, name).load_state_dict(saved[name])
        self.queue = saved["queue"].to(self.plan.device)
        self.epoch, self.seconds = saved["epoch"], saved["seconds"]

    def _about(self) -> dict[str, Any]:
        return {
            "format": FORMAT, "config": dataclasses.asdict(self.config), "identity": self.identity,
        }  # fmt: skip


_PARTS = ("model", "optimizer", "keys", "queue", "epoch", "seconds")


def _plain(part: Any) -> Any:
    return part.state_dict() if hasattr(part, "state_dict") else part


def pretrain(
    config: PretrainConfig,
    data: ImageDataset,
    plan: DevicePlan,
    *,
    resume: bytes | None = None,
    pulse: Callable[[], None] = no_pulse,
) -> Iterator[PretrainReport]:
    """Train on data.train without its labels, a report after each epoch.

    Resuming goes on bit for bit on a CPU. Raises TrainingDiverged, OutOfMemory, ConfigError,
    CheckpointError; DataError with fewer images than two.
    """
    images, batch_size = data.train.images, min(config.batch_size, len(data.train))
    if batch_size < 2:
        raise DataError("at least two images are needed to pretrain")
    prepare(plan.device, plan.num_threads)
    own = config.train_config
    with memory_errors(own, plan.device):
        state = Pretraining(config, data, plan)
        if resume is not None:
            state.load(resume)
        images = images.to(plan.device)
    normalise = Normaliser(data.mean, data.std, plan.device)
    num_batches = len(images) // batch_size  # contrast wants batches of one size
    for epoch in range(state.epoch, config.epochs):
        started = time.perf_counter()
        generator = seeded_generator("views", config.seed, epoch)
        order = torch.randperm(len(images), generator=generator).to(plan.device)
        total = torch.zeros((), device=plan.device)
        with memory_errors(own, plan.device), own_randomness("pretrain", config.seed, epoch):
            state.model.train()
            for index in range(num_batches):
                pulse()
                progress = (epoch * num_batches + index) / (config.epochs * num_batches)
                set_lr(state.optimizer, lr_at(own, progress))
                batch = images.index_select(0, order[index * batch_size : (index + 1) * batch_size])
                first, second = (
                    view(normalise(batch), config.least_area, data.flips, generator)
                    for _ in range(2)
                )
                total += METHODS[config.method](state, first, second)
            loss = float(total) / num_batches
        if not math.isfinite(loss):
            raise TrainingDiverged(
                f"the loss is {loss} after {epoch + 1} epochs (lr {config.lr:g})"
            )
        seconds = time.perf_counter() - started
        state.epoch, state.seconds = epoch + 1, state.seconds + seconds
        yield PretrainReport(
            epoch=epoch + 1,
            loss=loss,
            images_per_second=num_batches * batch_size / seconds,
            seconds=state.seconds,
            state=state,
        )


def view(images: Tensor, least_area: float, flips: bool, generator: torch.Generator) -> Tensor:
    """A part of each picture, at its full size, of another brightness and contrast.

    images: (N,C,H,W) float, normalised; generator: of the CPU.
    """
    num_images = len(images)
    area, x, y, gain, shift = torch.rand(5, num_images, generator=generator)
    scale = (least_area + (1 - least_area) * area).sqrt()
    zero, room = torch.zeros(num_images), 1 - scale
    rows = (scale, zero, room * (2 * x - 1), zero, scale, room * (2 * y - 1))
    theta = sent(torch.stack(rows, dim=1).view(num_images, 2, 3), images.device)
    grid = functional.affine_grid(theta, list(images.shape), align_corners=False)
    images = functional.grid_sample(images, grid, padding_mode="border", align_corners=False)
    if flips:
        images = flip(images, generator)
    gain, shift = (sent(each, images.device)[:, None, None, None] for each in (gain, shift))
    changed: Tensor = images * (0.6 + 0.8 * gain) + (shift - 0.5) * 0.8
    return changed


def _simclr(state: Pretraining, first: Tensor, second: Tensor) -> Tensor:
    """A step on NT-Xent; its loss, 0-d."""
    projected = _project(state, state.model, torch.cat([first, second]))
    num_images = len(first)
    likeness = projected @ projected.T / state.config.temperature
    likeness.fill_diagonal_(-math.inf)
    other = torch.arange(2 * num_images, device=likeness.device).roll(num_images)
    return _step(state, functional.cross_entropy(likeness, other))


def _moco(state: Pretraining, first: Tensor, second: Tensor) -> Tensor:
    """A step on InfoNCE with a queue of keys; its loss, 0-d."""
    config = state.config
    with torch.no_grad():
        for own, average in zip(state.model.parameters(), state.keys.parameters(), strict=True):
            average.lerp_(own, 1 - config.momentum)
        state.keys.train()
        keys = _project(state, state.keys, second)
    queries = _project(state, state.model, first)
    same = (queries * keys).sum(dim=1, keepdim=True)
    likeness = torch.cat([same, queries @ state.queue.T], dim=1) / config.temperature
    zeros = torch.zeros(len(first), dtype=torch.int64, device=likeness.device)
    loss = _step(state, functional.cross_entropy(likeness, zeros))
    state.queue = torch.cat([keys, state.queue])[: config.queue]
    return loss


def _project(state: Pretraining, model: nn.Module, images: Tensor) -> Tensor:
    """Unit vectors, float32 (N,features)."""
    with state.plan.autocast():
        projected = model(state.plan.lay_out(images))
    return functional.normalize(projected.float())


def _step(state: Pretraining, loss: Tensor) -> Tensor:
    state.optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    state.optimizer.step()
    return loss.detach()


METHODS: dict[str, Callable[[Pretraining, Tensor, Tensor], Tensor]] = {
    "simclr": _simclr,
    "moco": _moco,
}
