"""What it is worth that gradients keep channels_last, on a CPU.

    python -m benchmarks.formats         writes benchmarks/formats.json

Training steps of one thread on 128 noise images of 28x28 pixels. Before: no hook at poolings, and
residual networks that take every second pixel by a slice. Both kinds of step in turn, so that a
neighbour of the machine slows both; the ratio is that of two steps after one another.
"""

import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn import functional

from benchmarks.train import Task
from hpo.measured import machine
from trainer.config import Precision, TrainConfig
from trainer.device import DevicePlan, has_fast_bf16, prepare
from trainer.loop import optimizer_step
from trainer.state import TrainState

ROUNDS = 60
BACKBONES = ("smallcnn", "resnet8", "resnet20")


def sliced(block: Any, x: Tensor) -> Tensor:
    """A residual block as it was: a slice, whose gradient has no channels_last."""
    inner = functional.relu(block.bn1(block.conv1(x)), inplace=True)
    inner = block.bn2(block.conv2(inner))
    if block.new_channels > 0:
        x = functional.pad(
            x[:, :, :: block.stride, :: block.stride], (0, 0, 0, 0, 0, block.new_channels)
        )
    return functional.relu(inner + x, inplace=True)


def undo(model: nn.Module) -> None:
    """Make it the network that it was before."""
    for module in model.modules():
        module._forward_pre_hooks.clear()
        if hasattr(module, "new_channels"):
            module.forward = functools.partial(sliced, module)


def steps_of(backbone: str, plan: DevicePlan, *, before: bool) -> Callable[[], None]:
    """What makes one training step."""
    task = Task(size=(1, 28, 28), num_images=0)
    data = task.data()
    state = TrainState.start(TrainConfig(backbone=backbone), data, plan, steps_per_epoch=1)
    if before:
        undo(state.model)
    images = data.train.images.float() / 255

    def step() -> None:
        optimizer_step(state, images, data.train.labels)

    step()  # loads kernels
    return step


def measure(backbone: str, plan: DevicePlan) -> dict[str, Any]:
    """One network by one plan."""
    steps = {name: steps_of(backbone, plan, before=name == "before") for name in ("before", "now")}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - started)
    ratios = [before / now for before, now in zip(*seconds.values(), strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    medians = {name: 1000 * statistics.median(each) for name, each in seconds.items()}
    return {"backbone": backbone, "precision": plan.precision, "milliseconds": medians,
            "ratio": middle, "quartiles": [low, high]}  # fmt: skip


def main() -> None:
    """Measure, print, write."""
    prepare("cpu", 1)
    rows = []
    precisions: tuple[Precision, ...] = ("bf16", "fp32") if has_fast_bf16() else ("fp32",)
    for precision in precisions:
        plan = DevicePlan(device="cpu", precision=precision, channels_last=True)
        for backbone in BACKBONES:
            rows.append(measure(backbone, plan))
            print(json.dumps(rows[-1]), flush=True)
    found = {"machine": machine(), "rounds": ROUNDS, "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
