"""How fast a backbone is trained here, and where a training's time goes.

    python -m benchmarks.train [--seconds 20] [BACKBONE ...]     writes benchmarks/train.json

A process of one thread on each core, all at work at once, as workers are; the figures are those of
one of them, the middle one by speed. Images of Fashion-MNIST, batches of 128. A backbone's own
convolutions are timed alone, forward and backward, on random tensors of the shapes that they have
in it, in its precision and memory format: no training can be faster than they are.
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hpo.measured import machine
from storage.checkpoints import TrialCheckpoints
from trainer.augment import augment
from trainer.config import TrainConfig
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
BATCH = 128
Spent = defaultdict[str, float]
_KIB = 1024 if sys.platform != "darwin" else 1


def measure(backbone: str, seconds: float) -> dict[str, Any]:
    """One backbone in this process, for so many seconds a part."""
    data = load("fashion-mnist", seed=0)
    config = TrainConfig(backbone=backbone, batch_size=BATCH, flip=True, translate=2)
    plan = choose_plan(
        config, input_size=data.input_size, num_classes=data.num_classes, device="cpu"
    )
    state = TrainState.start(config, data, plan, steps_per_epoch=len(data.train) // BATCH)
    normalise, generator = Normaliser(data.mean, data.std, "cpu"), seeded_generator("bench", 0)
    spent: Spent = defaultdict(float)

    def step() -> None:
        chosen = torch.randint(len(data.train), (BATCH,), generator=generator)
        with counted(spent, "data"):
            images = augment(data.train.images.index_select(0, chosen), config, generator)
            labels = data.train.labels.index_select(0, chosen)
            images, partners = mix(normalise(images), labels, config, generator)
        optimizer_step(state, images, labels, partners)

    state.model.train()
    with parts_of_a_step(state, spent):
        step()
        spent.clear()
        num_steps, whole = repeat(step, seconds)
    parts = {name: 1000 * spent[name] / num_steps for name in ("data", "forward", "backward",
                                                               "optimizer")}  # fmt: skip
    step_seconds = whole / num_steps
    parts["other"] = 1000 * step_seconds - sum(parts.values())
    alone = sum(
        seconds_alone(module, shape, plan, first=index == 0)
        for index, (module, shape) in enumerate(layers(state.model, images_like(data.input_size)))
    )
    num_evaluations, evaluation = repeat(
        lambda: evaluate(state.model, data.val, plan, mean=data.mean, std=data.std), seconds / 4
    )
    flops = training_flops(config, input_size=data.input_size, num_classes=data.num_classes)
    peak = peak_flops("cpu")
    speed = BATCH / step_seconds
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
        "convolutions_share_of_peak": BATCH * flops / alone / peak,
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB / 2**20,
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


def images_like(size: tuple[int, int, int]) -> Tensor:
    """A batch of noise."""
    return torch.randn(BATCH, *size)


def layers(model: nn.Module, images: Tensor) -> list[tuple[nn.Module, tuple[int, ...]]]:
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
        model(images)
    for handle in handles:
        handle.remove()
    return found


def seconds_alone(
    module: nn.Module, shape: tuple[int, ...], plan: DevicePlan, *, first: bool
) -> float:
    """Of a layer's forward and backward pass, the least of a few; the first needs no gradient."""
    images = torch.randn(shape)
    if len(shape) == 4:
        images = plan.lay_out(images)
    images.requires_grad_(not first)
    with plan.autocast():
        gradient = torch.randn_like(module(images))
    if gradient.ndim == 4:
        gradient = plan.lay_out(gradient)
    times = []
    for _ in range(10):
        started = time.perf_counter()
        with plan.autocast():
            made = module(images)
        torch.autograd.backward(made, gradient)
        times.append(time.perf_counter() - started)
        images.grad = None
        module.zero_grad()
    return min(times)


def checkpoint_seconds(state: TrainState) -> float:
    """Of one that is written whole, the mean of a few."""
    with tempfile.TemporaryDirectory() as folder:
        place = TrialCheckpoints(Path(folder), study_key=1, trial_number=0, token=1)
        place.take_over()
        steps = iter(range(1, 1000))
        num_saved, seconds = repeat(lambda: place.save(next(steps), state.to_bytes()), 0.5)
    return seconds / num_saved


def all_at_once(backbone: str, seconds: float) -> dict[str, Any]:
    """The middle one of a process on each core."""
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else [0]
    arguments = [sys.executable, "-m", "benchmarks.train", "--one", "--seconds", f"{seconds}"]
    running = []
    for core in cores:
        pin = ["taskset", "-c", f"{core}"] if sys.platform == "linux" else []
        running.append(
            subprocess.Popen([*pin, *arguments, backbone], stdout=subprocess.PIPE, text=True)
        )
    rows: list[dict[str, Any]] = [json.loads(each.communicate()[0]) for each in running]
    return sorted(rows, key=lambda row: float(row["images_per_second"]))[len(rows) // 2]


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


HEADER = (
    "backbone", "precision", "images/s", "of the peak", "of its own convolutions",
    "convolutions, of the peak", "data ms", "forward ms", "backward ms", "optimizer ms", "other ms",
    "s an epoch", "s an evaluation", "ms a checkpoint", "peak MiB",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    """Each backbone in processes of its own, so that the memory is theirs."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train")
    parser.add_argument("--seconds", type=float, default=20.0, help="of training, each")
    parser.add_argument("--one", action="store_true", help="in this process, as JSON")
    parser.add_argument("backbones", nargs="*", default=list(DEFAULT))
    options = parser.parse_args(arguments)
    if options.one:
        print(json.dumps(measure(options.backbones[0], options.seconds)))
        return
    rows = []
    print("| " + " | ".join(HEADER) + " |\n|" + "---|" * len(HEADER))
    for backbone in options.backbones:
        rows.append(all_at_once(backbone, options.seconds))
        print(line(rows[-1]), flush=True)
    RESULT.write_text(json.dumps({"machine": machine(), "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
