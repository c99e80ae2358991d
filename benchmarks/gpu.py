"""What a GPU is used for: the speed of the loop, of several workers on it, of a whole study.

    python -m benchmarks.gpu [--device cuda:0] [--workers auto,1,2,4,8]  writes benchmarks/gpu.json

loop: images per second of whole epochs of resnet18 on images of 3x32x32 (50,000, noise), without
and with CUDA graphs, beside what is published of loops that are written for one network.
workers: trials per hour of benchmarks.study's equal study, four epochs each, by so many workers;
auto are as many as hpo itself finds to be best (hpo.sharing), for which it takes time of its study.
study: 50 trials on Fashion-MNIST, with pruning, by one worker.

Its logic is tested on a CPU, with a smaller network.
"""

import argparse
import json
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


def loop_speed(backbone: str, task: Task, *, epochs: int, graphs: bool) -> dict[str, Any]:
    """Images per second of the slowest epoch but the first, and what they are in TFLOP/s."""
    data = task.data()
    config = TrainConfig(
        backbone=backbone, batch_size=task.batch, epochs=epochs, lr=1e-3, optimizer="sgd",
        flip=True, translate=4,
    )  # fmt: skip
    size, num_classes = data.input_size, data.num_classes
    plan = choose_plan(
        config, input_size=size, num_classes=num_classes, device=task.device, graphs=graphs
    )
    reports = [report.images_per_second for report in train(config, data, plan)]
    speed = min(reports[-(epochs - 1) :])
    flops = training_flops(config, input_size=size, num_classes=num_classes)
    return {
        "backbone": backbone,
        "plan": plan.to_dict(),
        "images_per_second": speed,
        "tflops": speed * flops / 1e12,
        "peak_mib": peak_mib(task.device),
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


def main(arguments: list[str] | None = None) -> None:
    """Measure all three, and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu")
    parser.add_argument("--device", default="cuda:0")
    parser.add_argument("--workers", default="auto,1,2,4,8")
    parser.add_argument("--backbone", default="resnet18", help="of the loop")
    parser.add_argument("--batch", type=int, default=512, help="of the loop")
    parser.add_argument("--noise", type=int, default=50_000, help="images of the loop")
    parser.add_argument("--epochs", type=int, default=4, help="of the loop and the equal study")
    parser.add_argument("--images", type=int, default=study.FULL, help="of Fashion-MNIST")
    parser.add_argument("--trials", type=int, default=50, help="of the last study")
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args(arguments)
    if options.device != "cpu" and not torch.cuda.is_available():
        raise SystemExit("there is no CUDA device: nothing was measured")
    task = Task(
        device=options.device, batch=options.batch, size=(3, 32, 32), num_images=options.noise
    )
    loop = [
        loop_speed(options.backbone, task, epochs=options.epochs, graphs=graphs)
        for graphs in (False, True)
    ]
    print(loop_table(loop), flush=True)
    kind = {**study.KINDS["equal"], "epochs": options.epochs}
    arms = [
        "hpo" if text == "auto" else f"hpo, {text} worker{'s' * (text != '1')}"
        for text in options.workers.split(",")
    ]
    workers = {arm: study.run(arm, kind, 0, options.images) for arm in arms}
    print(workers_table(workers), flush=True)
    kind = {**study.KINDS["pruned"], "num_trials": options.trials}
    last = study.run("hpo, 1 worker", kind, 0, options.images)
    print(f"{options.trials} trials: {last['seconds']:.0f} s, best {last['best']:.4f}")
    found = {"machine": machine(), "loop": loop, "workers": workers, "study": last}
    options.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
