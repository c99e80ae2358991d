"""How much steadier k-fold validation makes a trial's value on few images.

    python -m benchmarks.folds         writes benchmarks/folds.json

One configuration on 400 of the digits, validated on a tenth of them that a seed draws, and on five
folds that the same seed cuts: the standard deviation over seeds is what two trials of the same
worth differ by. Beside it, the accuracy on the test images, which the value is to stand for.
"""

import dataclasses
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from hpo.measured import machine
from trainer.config import TrainConfig
from trainer.data.dataset import ImageDataset
from trainer.data.folds import cut_folds
from trainer.data.registry import load
from trainer.device import DevicePlan
from trainer.evaluate import evaluate
from trainer.folds import train_folds
from trainer.loop import train

RESULT = Path(__file__).with_suffix(".json")
PLAN = DevicePlan(device="cpu", channels_last=True)
CONFIG = TrainConfig(backbone="smallcnn", epochs=15, batch_size=32, lr=3e-3)
NUM_IMAGES, NUM_SEEDS, NUM_FOLDS = 400, 20, 5


def drawn(whole: ImageDataset, seed: int) -> ImageDataset:
    """The first images, a tenth of them for validation."""
    order = torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(seed))
    num_val = NUM_IMAGES // 10
    images = whole.train
    train_split, val = images.take(order[num_val:]), images.take(order[:num_val])
    return dataclasses.replace(whole, train=train_split, val=val, groups=None)


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    whole = load("digits", seed=0).with_validation_in_training()
    rows: dict[str, list[float]] = {"one split": [], "five folds": [], "test": []}
    seconds = dict.fromkeys(("one split", "five folds"), 0.0)
    for seed in range(NUM_SEEDS):
        data, config = drawn(whole, seed), dataclasses.replace(CONFIG, seed=seed)
        started = time.perf_counter()
        (*_, last) = train(config, data, PLAN)
        rows["one split"].append(last.val_accuracy)
        seconds["one split"] += time.perf_counter() - started
        test = data.open_test()
        found = evaluate(last.state.model, test, PLAN, mean=data.mean, std=data.std)
        rows["test"].append(found.accuracy)
        started = time.perf_counter()
        (*_, folded) = train_folds(config, cut_folds(data, NUM_FOLDS, seed, device="cpu"), PLAN)
        rows["five folds"].append(folded.val_accuracy)
        seconds["five folds"] += time.perf_counter() - started
    shown: dict[str, Any] = {
        name: {"mean": statistics.fmean(values), "std": statistics.stdev(values), "values": values}
        for name, values in rows.items()
    }
    result = {"machine": machine(), "n": NUM_SEEDS, "seconds": seconds, **shown}
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    for name, row in shown.items():
        print(f"{name:12s} {row['mean']:.4f} +- {row['std']:.4f} (n = {NUM_SEEDS})")
    print(f"five folds cost {seconds['five folds'] / seconds['one split']:.1f} times one split")


if __name__ == "__main__":
    main()
