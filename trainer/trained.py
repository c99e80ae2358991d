"""The model of a training that has ended, from its last checkpoint."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from trainer.backbones import as_fed, build
from trainer.batches import batch_bounds
from trainer.config import TrainConfig, is_module
from trainer.data.dataset import ImageDataset
from trainer.device import DevicePlan
from trainer.state import (
    MODULE_KEYS,
    CheckpointError,
    TrainState,
    first_line,
    read_checkpoint,
    read_history,
)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A model, and how it came about."""

    model: nn.Module
    plan: DevicePlan
    averaging: str
    """Which average of weights the model is; "none": the last weights."""
    history: Sequence[dict[str, Any]]
    """All reports of the training, as plain values."""


def open_trained(
    content: bytes, config: TrainConfig, data: ImageDataset, *, device: str, end_step: int | None
) -> Trained:
    """What train(config, data, plan, end_step=end_step) has come to.

    content: its last report's state as bytes. device: where the model is put. Raises
    CheckpointError if the bytes are none of this training, or of one that has not ended.
    """
    history = read_history(content)
    if not history or not history[-1]["finished"]:
        raise CheckpointError("the checkpoint is of a training that has not ended")
    data = as_fed(config, data)
    if is_module(config.backbone):
        return _open_module(content, config, data, device=device, end_step=end_step)
    state = TrainState.start(
        config,
        data,
        DevicePlan(device=device),
        steps_per_epoch=len(batch_bounds(len(data.train), config.batch_size)),
        resume=content,
        end_step=end_step,
    )
    return Trained(model=state.result, plan=state.plan, averaging=state.averaging, history=history)


def _open_module(
    content: bytes, config: TrainConfig, data: ImageDataset, *, device: str, end_step: int | None
) -> Trained:
    saved = read_checkpoint(content, config, data, MODULE_KEYS, end_step)
    plan = DevicePlan.from_dict(saved["plan"]).on(device)
    model = build(config, input_size=data.input_size, num_classes=data.num_classes)
    try:
        model.load_state_dict(saved["lightning"]["state_dict"])
    except (KeyError, RuntimeError) as error:
        raise CheckpointError(f"the checkpoint doesn't fit: {first_line(error)}") from error
    return Trained(model=plan.place(model), plan=plan, averaging="none", history=saved["history"])
