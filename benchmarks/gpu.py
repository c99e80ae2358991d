"""What a GPU is used for: the speed of the loop, of several workers on it, of a whole study.

    python -m benchmarks.gpu [--device cuda:0] [--workers 1,2,4,8]       writes benchmarks/gpu.json

loop: images per second of whole epochs of resnet18 on images of 3x32x32 (50,000, noise), without
and with CUDA graphs, beside what is published of loops that are written for one network.
workers: trials per hour of benchmarks.study's equal study, four epochs each, by so many workers.
study: 50 trials on Fashion-MNIST, with pruning, by one worker.

Its logic is tested on a CPU, with a smaller network.
"""

import argparse
import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import study
from benchmarks.study_report import table
from benchmarks.train import Task, peak_mib
from hpo.measured import machine
from trainer.config import TrainConfig
from trainer.device import choose_plan
from trainer.flops import training_flops
from trainer.loop import train

RESULT = Path(__file__).with_suffix(".json")
PUBLISHED = {
    "cifar10-airbench, airbench94_compiled.py (A100)": (0.36, 3.09),
    "cifar10-airbench, airbench96.py (A100)": (4.9, 34.7),
    "the standard ResNet-18 training that it names (A100)": (32.3, 7 * 60.0),
}
"""PFLOP of a whole training and its seconds, by github.com/KellerJordan/cifar10-airbench."""


@dataclass(frozen=True, kw_only=True)
class Loop:
    """A training to be timed; its first epoch doesn't count."""

    device: str
    backbone: str = "resnet18"
    size: tuple[int, int, int] = (3, 32, 32)
    num_images: int = 50_000
    batch: int = 512
    epochs: int = 4

    def measure(self, *, graphs: bool) -> dict[str, Any]:
        """Images per second of the slowest epoch but the first, and what they are in TFLOP/s."""
        task = Task(device=self.device, batch=self.batch, size=self.size)
        data = task.data(self.num_images)
        config = TrainConfig(
            backbone=self.backbone, batch_size=self.batch, epochs=self.epochs, lr=1e-3,
            optimizer="sgd", flip=True, translate=4,
        )  # fmt: skip
        size, num_classes = data.input_size, data.num_classes
        plan = choose_plan(
            config, input_size=size, num_classes=num_classes, device=self.device, graphs=graphs
        )
        reports = [report.images_per_second for report in train(config, data, plan)]
        speed = min(reports[-(self.epochs - 1) :])
        flops = training_flops(config, input_size=size, num_classes=num_classes)
        return {
            "backbone": self.backbone,
            "plan": plan.to_dict(),
            "images_per_second": speed,
            "tflops": speed * flops / 1e12,
            "peak_mib": peak_mib(self.device),
        }


def loop_table(rows: list[dict[str, Any]]) -> str:
    """Markdown, the published figures below."""
    cells = []
    for row in rows:
        plan = row["plan"]
        graphs = ", CUDA graphs" if plan["graphs"] else ""
        name = f"{row['backbone']}, {plan['precision']}{graphs}"
        cells.append([name, f"{row['images_per_second']:,.0f}", f"{row['tflops']:.1f}"])
    for name, (petaflop, seconds) in PUBLISHED.items():
        cells.append([name, "", f"{1000 * petaflop / seconds:.1f}"])
    return table(["loop", "images/s", "TFLOP/s"], cells)


def workers_table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown."""
    cells = [
        [arm, f"{row['trials_per_hour']:,.0f}", f"{row['images_per_second']:,.0f}",
         f"{row['seconds']:.1f}"]
        for arm, row in rows.items()
    ]  # fmt: skip
    return table(["equal study", "trials/h", "images/s", "s"], cells)


def measure(loop: Loop, workers: list[int], *, num_images: int, trials: int) -> dict[str, Any]:
    """All three; num_images: of Fashion-MNIST."""
    name = torch.cuda.get_device_name(loop.device) if loop.device != "cpu" else "cpu"
    found: dict[str, Any] = {"machine": machine(), "device": name}
    found["loop"] = [loop.measure(graphs=graphs) for graphs in (False, True)]
    print(loop_table(found["loop"]), flush=True)
    arms = [f"hpo, {number} worker{'s' if number > 1 else ''}" for number in workers]
    kind = {**study.KINDS["equal"], "epochs": loop.epochs}
    found["workers"] = {arm: study.run(arm, kind, 0, num_images) for arm in arms}
    print(workers_table(found["workers"]), flush=True)
    kind = {**study.KINDS["pruned"], "num_trials": trials}
    found["study"] = study.run("hpo, 1 worker", kind, 0, num_images)
    print(f"{trials} trials: {found['study']['seconds']:.0f} s, best {found['study']['best']:.4f}")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--workers", default="1,2,4,8")
    parser.add_argument("--backbone", default="resnet18")
    parser.add_argument("--images", type=int, default=study.FULL, help="of Fashion-MNIST")
    parser.add_argument("--noise", type=int, default=Loop.num_images, help="images of the loop")
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device: nothing was measured")
    loop = Loop(device=options.device, backbone=options.backbone, num_images=options.noise)
    if options.device == "cpu":
        loop = dataclasses.replace(loop, batch=64, epochs=2)
    workers = [int(number) for number in options.workers.split(",")]
    found = measure(loop, workers, num_images=options.images, trials=options.trials)
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
