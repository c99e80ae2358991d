"""Does a training in bf16, or in another memory format, come to the same accuracy?

    python -m benchmarks.precision [--seeds 10]     a quarter of an hour of a core; writes
                                                    benchmarks/precision.json

Both are chosen for speed and change sums in their last digits. Each seed trains the same
configuration in plain fp32, in fp32 with channels_last, and in bf16 with channels_last; differences
are paired. Where the processor has no bf16 it is emulated: slow, but with the same rounding.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.leak import spread
from benchmarks.transfer import small_fashion
from hpo.measured import machine
from trainer.config import TrainConfig
from trainer.data import digits
from trainer.data.dataset import ImageDataset, Split
from trainer.device import DevicePlan, has_fast_bf16
from trainer.evaluate import evaluate
from trainer.loop import train

RESULT = Path(__file__).with_suffix(".json")
PLAIN = "fp32"
WAYS: Mapping[str, DevicePlan] = {
    PLAIN: DevicePlan(device="cpu"),
    "fp32, channels_last": DevicePlan(device="cpu", channels_last=True),
    "bf16, channels_last": DevicePlan(device="cpu", channels_last=True, precision="bf16"),
}


def accuracy(config: TrainConfig, data: ImageDataset, test: Split, plan: DevicePlan) -> float:
    """On the test images, after the last epoch."""
    *_, last = train(config, data, plan)
    return evaluate(last.state.model, test, plan, mean=data.mean, std=data.std).accuracy


def main() -> None:
    """All seeds of all ways."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.precision")
    parser.add_argument("--seeds", type=int, default=10)
    num_seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    result: dict[str, Any] = {"machine": machine(), "has_bf16": has_fast_bf16(), "n": num_seeds}
    for source, data, epochs in (("digits", digits.load(seed=0), 10),
                                 ("Fashion-MNIST, 14x14", small_fashion(5_000), 4)):  # fmt: skip
        data, test = dataclasses.replace(data, val=data.val.take([])), data.open_test()
        for backbone in ("smallcnn", "resnet8"):
            rows = [
                {
                    name: accuracy(
                        TrainConfig(backbone=backbone, epochs=epochs, lr=1e-2, seed=seed),
                        data,
                        test,
                        plan,
                    )
                    for name, plan in WAYS.items()
                }
                for seed in range(num_seeds)
            ]
            found = {name: spread([row[name] for row in rows]) for name in WAYS} | {
                f"{name} - {PLAIN}": spread([row[name] - row[PLAIN] for row in rows])
                for name in WAYS
                if name != PLAIN
            }
            result[f"{backbone} on {source}"] = {"epochs": epochs, "found": found, "rows": rows}
            means = {name: round(statistics.fmean(row[name] for row in rows), 4) for name in WAYS}
            print(f"{backbone} on {source}: {means}", flush=True)
    RESULT.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
