"""How fast a backbone is trained here, and where a training's time goes.

    python -m benchmarks.train [--seconds 20] [BACKBONE ...]     writes benchmarks/train.json
    python -m benchmarks.train --device cuda:0 --size 3x32x32 --batch 512 resnet18

On a CPU a process of one thread on each core, all at work at once, as workers are; the figures are
those of one of them, the middle one by speed. On another device one process; the parts of a step
are then those of the host, which runs ahead. Images of Fashion-MNIST, or noise of a given size.

A backbone's own convolutions are timed alone, forward and backward, on random tensors of the shapes
that they have in it, in its precision and memory format: no training can be faster than they are.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpo.measured import machine
from storage.checkpoints import TrialCheckpoints
from trainer.augment import augment
from trainer.batches import to_device
from trainer.config import TrainConfig
from trainer.data.dataset import ImageDataset, Split
from trainer.data.registry import load
from trainer.device import DevicePlan, choose_plan
from trainer.evaluate import Normaliser, evaluate
from trainer.flops import peak_flops, training_flops
from trainer.loop import optimizer_step
from trainer.mixing import mix
from trainer.seeds import seeded_generator
from trainer.state import TrainState

RESULT = Path(__file__).with_suffix(".json")
DEFAULT = ("smallcnn", "resnet8", "resnet20")
PARTS = ("data", "forward", "backward", "optimizer")
_STEPS_WITHOUT_WAITING = 10
_KIB = 1024 if sys.platform != "darwin" else 1
Spent = defaultdict[str, float]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is measured of each backbone; size: (C, H, W) of noise, None for Fashion-MNIST."""

    seconds: float = 20.0
    device: str = "cpu"
    batch: int = 128
    size: tuple[int, int, int] | None = None
    num_images: int = 10_000
    """Of noise, and a batch more."""

    def data(self) -> ImageDataset:
        """The images."""
        if self.size is None:
            return load("fashion-mnist", seed=0)
        count = self.num_images + self.batch
        images = torch.randint(256, (count, *self.size), dtype=torch.uint8)
        split = Split(images, torch.arange(count) % 10)
        return ImageDataset(
            name="noise", train=split, val=split.take(range(min(2_000, count))),
            fingerprint=64 * "0", class_names=tuple("0123456789"), mean=(0.5,) * self.size[0],
            std=(0.3,) * self.size[0], open_test=lambda: split, flips=True,
        )  # fmt: skip


def measure(backbone: str, task: Task) -> dict[str, Any]:
    """One backbone in this process."""
    data, batch, device = task.data(), task.batch, task.device
    config = TrainConfig(backbone=backbone, batch_size=batch, flip=True, translate=2)
    size, num_classes = data.input_size, data.num_classes
    plan = choose_plan(config, input_size=size, num_classes=num_classes, device=device)
    state = TrainState.start(config, data, plan, steps_per_epoch=len(data.train) // batch)
    normalise, generator = Normaliser(data.mean, data.std, device), seeded_generator("bench", 0)
    split, val = to_device(data.train, plan), to_device(data.val, plan)
    spent: Spent = defaultdict(float)

    def steps() -> None:
        for _ in range(_STEPS_WITHOUT_WAITING):
            chosen = torch.randint(len(split), (batch,), generator=generator).to(device)
            with counted(spent, "data"):
                images = augment(split.images.index_select(0, chosen), config, generator)
                labels = split.labels.index_select(0, chosen)
                images, partners = mix(normalise(images), labels, config, generator)
            loss = optimizer_step(state, images, labels, partners)
        float(loss)  # waits for the device

    state.model.train()
    with parts_of_a_step(state, spent):
        steps()
        spent.clear()
        count, whole = repeat(steps, task.seconds)
    num_steps = count * _STEPS_WITHOUT_WAITING
    step_seconds = whole / num_steps
    parts = {name: 1000 * spent[name] / num_steps for name in PARTS}
    parts["other"] = 1000 * step_seconds - sum(parts.values())
    alone = sum(
        seconds_alone(module, shape, plan, first=index == 0)
        for index, (module, shape) in enumerate(layers(state.model, batch, size, plan))
    )
    num_evaluations, evaluation = repeat(
        lambda: evaluate(state.model, val, plan, mean=data.mean, std=data.std), task.seconds / 4
    )
    flops = training_flops(config, input_size=size, num_classes=num_classes)
    peak, speed = peak_flops(device), batch / step_seconds
    return {
        "backbone": backbone,
        "plan": plan.to_dict(),
        "images_per_second": speed,
        "milliseconds_a_step": parts,
        "seconds_an_epoch": len(data.train) / speed,
        "seconds_an_evaluation": evaluation / num_evaluations,
        "milliseconds_a_checkpoint": 1000 * checkpoint_seconds(state),
        "peak_gflops": peak / 1e9,
        "share_of_peak": speed * flops / peak,
        "share_of_own_convolutions": alone / step_seconds,
        "convolutions_share_of_peak": batch * flops / alone / peak,
        "peak_mib": peak_mib(device),
    }


@contextmanager
def counted(spent: Spent, part: str) -> Iterator[None]:
    """Count seconds."""
    started = time.perf_counter()
    yield
    spent[part] += time.perf_counter() - started


@contextmanager
def parts_of_a_step(state: TrainState, spent: Spent) -> Iterator[None]:
    """Count forward, backward and optimizer of all steps in here, by torch's own hooks."""
    marks: dict[str, float] = {}

    def begin(part: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            marks[part] = time.perf_counter()

        return hook

    def end(part: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            spent[part] += time.perf_counter() - marks[part]

        return hook

    original = torch.autograd.backward

    def backward(*args: Any, **kwargs: Any) -> None:
        with counted(spent, "backward"):
            original(*args, **kwargs)

    handles = [
        state.model.register_forward_pre_hook(begin("forward")),
        state.model.register_forward_hook(end("forward")),
        state.optimizer.register_step_pre_hook(begin("optimizer")),
        state.optimizer.register_step_post_hook(end("optimizer")),
    ]
    torch.autograd.backward = backward
    try:
        yield
    finally:
        torch.autograd.backward = original
        for handle in handles:
            handle.remove()


def repeat(call: Callable[[], Any], seconds: float) -> tuple[int, float]:
    """(calls, seconds), at least three calls."""
    started, num_calls = time.perf_counter(), 0
    while num_calls < 3 or time.perf_counter() - started < seconds:
        call()
        num_calls += 1
    return num_calls, time.perf_counter() - started


def layers(
    model: nn.Module, batch: int, size: tuple[int, int, int], plan: DevicePlan
) -> list[tuple[nn.Module, tuple[int, ...]]]:
    """Convolutions and linear layers, with the shape of what goes into each."""
    found: list[tuple[nn.Module, tuple[int, ...]]] = []

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        found.append((module, tuple(inputs[0].shape)))

    handles = [
        module.register_forward_pre_hook(note)
        for module in model.modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    with torch.no_grad():
        model(torch.randn(batch, *size, device=plan.device))
    for handle in handles:
        handle.remove()
    return found


def seconds_alone(
    module: nn.Module, shape: tuple[int, ...], plan: DevicePlan, *, first: bool
) -> float:
    """Of a layer's forward and backward pass, the least of a few; the first needs no gradient."""
    images = torch.randn(shape, device=plan.device)
    images = plan.lay_out(images) if len(shape) == 4 else images
    images.requires_grad_(not first)
    with plan.autocast():
        gradient = torch.randn_like(module(images))
    gradient = plan.lay_out(gradient) if gradient.ndim == 4 else gradient

    def both() -> None:
        with plan.autocast():
            made = module(images)
        torch.autograd.backward(made, gradient)
        images.grad = None
        module.zero_grad()

    def some() -> None:
        for _ in range(1 if plan.device == "cpu" else 20):
            both()
        if plan.device != "cpu":
            torch.accelerator.synchronize(plan.device)

    some()
    times = [repeat(some, 0.0) for _ in range(4)]
    return min(seconds / count for count, seconds in times) / (1 if plan.device == "cpu" else 20)


def checkpoint_seconds(state: TrainState) -> float:
    """Of one that is written whole, the mean of a few."""
    with tempfile.TemporaryDirectory() as folder:
        place = TrialCheckpoints(Path(folder), study_key=1, trial_number=0, token=1)
        place.take_over()
        steps = iter(range(1, 100_000))
        num_saved, seconds = repeat(lambda: place.save(next(steps), state.to_bytes()), 0.5)
    return seconds / num_saved


def peak_mib(device: str) -> float:
    """Of this process, or of the device that it has used."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB / 2**20


def all_at_once(backbone: str, arguments: Sequence[str], device: str) -> dict[str, Any]:
    """The middle one of a process on each core, or the only one."""
    cores: Sequence[int | None] = [None]
    if device == "cpu" and hasattr(os, "sched_getaffinity"):
        cores = sorted(os.sched_getaffinity(0))
    running = []
    for core in cores:
        pin = [] if core is None else ["taskset", "-c", f"{core}"]
        command = [*pin, sys.executable, "-m", "benchmarks.train", "--one", *arguments, backbone]
        running.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
    rows: list[dict[str, Any]] = [json.loads(each.communicate()[0]) for each in running]
    return sorted(rows, key=lambda row: float(row["images_per_second"]))[len(rows) // 2]


HEADER = (
    "backbone", "precision", "images/s", "of the peak", "of its own convolutions",
    "convolutions, of the peak", "data ms", "forward ms", "backward ms", "optimizer ms", "other ms",
    "s an epoch", "s an evaluation", "ms a checkpoint", "peak MiB",
)  # fmt: skip


def line(row: dict[str, Any]) -> str:
    """One row of the table, in Markdown."""
    plan, parts = row["plan"], row["milliseconds_a_step"]
    layout = " channels_last" if plan["channels_last"] else ""
    cells = [
        row["backbone"], f"{plan['precision']}{layout}", f"{row['images_per_second']:,.0f}",
        f"{row['share_of_peak']:.0%}", f"{row['share_of_own_convolutions']:.0%}",
        f"{row['convolutions_share_of_peak']:.0%}",
        *(f"{parts[name]:.1f}" for name in parts),
        f"{row['seconds_an_epoch']:.1f}", f"{row['seconds_an_evaluation']:.2f}",
        f"{row['milliseconds_a_checkpoint']:.1f}", f"{row['peak_mib']:.0f}",
    ]  # fmt: skip
    return "| " + " | ".join(cells) + " |"


def main(arguments: list[str] | None = None) -> None:
    """Each backbone in processes of its own, so that the memory is theirs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train")
    parser.add_argument("--seconds", type=float, default=20.0, help="of training, each")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--size", help="CxHxW of noise instead of Fashion-MNIST")
    parser.add_argument("--out", type=Path, default=RESULT)
    parser.add_argument("--one", action="store_true", help="in this process, as JSON")
    parser.add_argument("backbones", nargs="*", default=list(DEFAULT))
    options = parser.parse_args(arguments)
    if options.one:
        channels, height, width = map(int, (options.size or "0x0x0").split("x"))
        task = Task(
            seconds=options.seconds, device=options.device, batch=options.batch,
            size=(channels, height, width) if options.size else None,
        )  # fmt: skip
        print(json.dumps(measure(options.backbones[0], task)))
        return
    given = ["--seconds", f"{options.seconds}", "--device", options.device]
    given += ["--batch", f"{options.batch}", *(["--size", options.size] if options.size else [])]
    rows = []
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    for backbone in options.backbones:
        rows.append(all_at_once(backbone, given, options.device))
        print(line(rows[-1]), flush=True)
    options.out.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
