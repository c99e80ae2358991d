"""What a model weighs where it is to be used: parameters, megabytes, latency."""

import statistics
import time
from dataclasses import dataclass

import torch
from torch import nn

from trainer.backbones import build
from trainer.config import TrainConfig
from trainer.device import DevicePlan, prepare
from trainer.foreign import Shape

_LEAST_RUNS, _MOST_RUNS = 5, 50
_TIMED_SECONDS = 0.5


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Of a backbone at one image size; weights are counted in float32."""

    num_params: int
    megabytes: float
    """Of parameters and buffers, 10**6 bytes."""
    latency_ms: float | None
    """Median of one image's forward pass, in float32, by one thread on a CPU; None: not timed."""


def measure_footprint(
    config: TrainConfig,
    *,
    input_size: Shape,
    num_classes: int,
    device: str,
    times_latency: bool,
) -> Footprint:
    """Build the model with random weights and look at it; half a second if it is timed.

    Raises ConfigError if the backbone can't be built or the device isn't there.
    """
    untrained = TrainConfig(backbone=config.backbone, module=config.module, dropout=config.dropout)
    model = build(untrained, input_size=input_size, num_classes=num_classes).eval()
    tensors = [*model.parameters(), *model.buffers()]
    return Footprint(
        num_params=sum(parameter.numel() for parameter in model.parameters()),
        megabytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors) / 1e6,
        latency_ms=_latency_ms(model, input_size, device) if times_latency else None,
    )


def _latency_ms(model: nn.Module, input_size: Shape, device: str) -> float:
    prepare(device, num_threads=1)
    plan = DevicePlan(device=device)
    model = plan.place(model)
    image = torch.zeros(1, *input_size, device=device)
    seconds: list[float] = []
    with torch.inference_mode():
        for _ in range(2):
            model(image)  # loads kernels
        while len(seconds) < _LEAST_RUNS or (
            len(seconds) < _MOST_RUNS and sum(seconds) < _TIMED_SECONDS
        ):
            started = time.perf_counter()
            float(model(image).sum())  # waits for the device
            seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds)
