"""What one worker needs: images per second and peak memory, for each default backbone.

    python -m benchmarks.worker        writes benchmarks/worker.json and prints a table

Fashion-MNIST, a quarter of an epoch and the evaluation after it, one process each, in turn.
"""

import json
import platform
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

BACKBONES = ("smallcnn", "resnet8", "resnet20")
_KIB = 1024 if sys.platform != "darwin" else 1


def measure(backbone: str) -> dict[str, Any]:
    """Train a quarter epoch in this process; images/s of training and the process's peak memory."""
    from trainer.config import TrainConfig
    from trainer.data.registry import load
    from trainer.device import available_devices, choose_plan
    from trainer.loop import train

    data = load("fashion-mnist", seed=0)
    config = TrainConfig(backbone=backbone, batch_size=128, flip=True, translate=1)
    plan = choose_plan(
        config,
        input_size=data.input_size,
        num_classes=data.num_classes,
        device=available_devices()[0],
    )
    reports = train(config, data, plan)
    report = next(reports)
    reports.close()
    peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _KIB
    return {
        "backbone": backbone,
        "images_per_second": round(report.images_per_second),
        "seconds_an_epoch": round(len(data.train) / report.images_per_second, 1),
        "peak_mib": round(peak_bytes / 2**20),
        "plan": plan.to_dict(),
    }


def main() -> None:
    """Each backbone in a process of its own, so that the peaks are theirs."""
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    rows = []
    for backbone in BACKBONES:
        command = [sys.executable, "-m", "benchmarks.worker", backbone]
        shown = subprocess.run(command, capture_output=True, text=True, check=True)
        rows.append(json.loads(shown.stdout))
    result = {"machine": machine(), "rows": rows}
    Path(__file__).with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    print(f"{'backbone':10s} {'images/s':>9s} {'s/epoch':>8s} {'peak MiB':>9s}  precision")
    for row in rows:
        precision = row["plan"]["precision"] + (
            " channels_last" if row["plan"]["channels_last"] else ""
        )
        print(
            f"{row['backbone']:10s} {row['images_per_second']:9,d} {row['seconds_an_epoch']:8.1f} "
            f"{row['peak_mib']:9,d}  {precision}"
        )


def machine() -> dict[str, Any]:
    """Where it was measured."""
    import os

    import torch

    model = platform.processor()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        model = next((line.split(": ")[1] for line in lines if "model name" in line), model)
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "none"
    return {"cpu": model, "cores": os.cpu_count(), "gpu": device, "torch": torch.__version__}


if __name__ == "__main__":
    main()
