"""Rare classes, made from Fashion-MNIST: what each way of balancing is worth.

    python -m benchmarks.balance [--seeds 8]     about ten minutes of one core; writes
                                                 benchmarks/balance.json

For each seed five of the ten classes, drawn by the seed, keep 10 images, the others 500 (1:50). All
ways train the same network on the same images for as many steps, and are tested on all 10,000 test
images, which have 1,000 of each class. Images are halved to 14x14 pixels.

SMOTE works on features, so all ways are tried on a head alone, too: of a resnet8 that has learnt
from all training images without their labels (SimCLR, three epochs).
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.leak import spread
from benchmarks.transfer import save
from hpo.measured import machine
from trainer.config import TrainConfig
from trainer.data.dataset import ImageDataset, Split, channel_statistics
from trainer.data.fashion_mnist import load
from trainer.device import DevicePlan
from trainer.evaluate import classify, confusion_matrix, macro_f1, macro_recall, per_class
from trainer.loop import train
from trainer.pretraining import PretrainConfig, pretrain

NUM_MANY, NUM_FEW, NUM_RARE_CLASSES = 500, 10, 5
EPOCHS = 20
RESULT = Path(__file__).with_suffix(".json")
WHOLE: dict[str, dict[str, Any]] = {
    "plain loss": {},
    "weighted loss": {"balance": "loss"},
    "balanced sampling": {"balance": "sampling"},
}
"""Name -> fields of TrainConfig. The first is what the others are compared with."""
HEAD: dict[str, dict[str, Any]] = {**WHOLE, "SMOTE": {"balance": "smote"}}


def crooked(whole: ImageDataset, seed: int) -> tuple[ImageDataset, list[int]]:
    """The few images that this seed has, and its rare classes."""
    chance = torch.Generator().manual_seed(seed)
    rare = sorted(torch.randperm(whole.num_classes, generator=chance)[:NUM_RARE_CLASSES].tolist())
    chosen = []
    for label in range(whole.num_classes):
        places = (whole.train.labels == label).nonzero()[:, 0]
        order = torch.randperm(len(places), generator=chance)
        chosen.append(places[order[: NUM_FEW if label in rare else NUM_MANY]])
    split = _small(whole.train.take(torch.cat(chosen)))
    mean, std = channel_statistics(split.images)
    return dataclasses.replace(whole, train=split, val=split.take([]), mean=mean, std=std), rare


def _small(split: Split) -> Split:
    halved = functional.avg_pool2d(split.images.float(), 2)
    return Split(halved.round().to(torch.uint8), split.labels)


def measure(
    data: ImageDataset, rare: Sequence[int], test: Split, seed: int, fields: dict[str, Any]
) -> dict[str, float]:
    """One training, on the test images: shares in [0, 1]."""
    config = TrainConfig.from_dict(
        {"backbone": "smallcnn", "epochs": EPOCHS, "batch_size": 64, "lr": 3e-3, "seed": seed}
        | fields
    )
    plan = DevicePlan(device="cpu")
    *_, last = train(config, data, plan)
    logits = classify(last.state.result, test.images, plan, mean=data.mean, std=data.std)
    matrix = confusion_matrix(logits, test.labels)
    classes = per_class(matrix)
    many = [label for label in range(data.num_classes) if label not in rare]
    return {
        "macro_f1": macro_f1(matrix),
        "minority_recall": statistics.fmean(classes[label].recall for label in rare),
        "majority_recall": statistics.fmean(classes[label].recall for label in many),
        # the test images have all classes alike: it is also the accuracy
        "balanced_accuracy": macro_recall(matrix),
    }


def pretrained(whole: ImageDataset, folder: Path) -> dict[str, Any]:
    """Fields of a head's training on a network that no label has been shown to."""
    split = _small(whole.train)
    mean, std = channel_statistics(split.images)
    data = dataclasses.replace(whole, train=split, val=split.take([]), mean=mean, std=std)
    config = PretrainConfig(backbone="resnet8", method="simclr", epochs=3)
    for report in pretrain(config, data, DevicePlan(device="cpu", channels_last=True)):
        print(f"SimCLR: epoch {report.epoch}, loss {report.loss:.3f}", flush=True)
    weights = save(report.state.backbone, data, folder)
    return {"backbone": "resnet8", "weights": str(weights), "trainable": "head"}


def summarise(rows: Sequence[dict[str, Any]], ways: Sequence[str]) -> dict[str, Any]:
    """Mean and standard deviation of each way, and of its differences from the first, paired."""
    first, *_ = ways
    summary: dict[str, Any] = {}
    for way in ways:
        found = [row[way] for row in rows]
        summary[way] = {name: spread([each[name] for each in found]) for name in found[0]}
        if way != first:
            summary[f"{way} - {first}"] = {
                name: spread([row[way][name] - row[first][name] for row in rows])
                for name in found[0]
            }
    return summary


def main() -> None:
    """Train each way with each seed, and sum up."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.balance")
    parser.add_argument("--seeds", type=int, default=8)
    num_seeds = parser.parse_args().seeds
    torch.set_num_threads(1)
    whole = load(seed=0)
    with tempfile.TemporaryDirectory() as folder:
        compare(whole, pretrained(whole, Path(folder, "weights")), num_seeds)


def compare(whole: ImageDataset, head: dict[str, Any], num_seeds: int) -> None:
    """head: the fields of a head's training."""
    ways = {f"whole network, {name}": fields for name, fields in WHOLE.items()}
    ways |= {f"head, {name}": {**head, **fields} for name, fields in HEAD.items()}
    test = _small(whole.open_test())
    rows: list[dict[str, Any]] = []
    for seed in range(num_seeds):
        data, rare = crooked(whole, seed)
        row: dict[str, Any] = {"seed": seed, "rare_classes": [data.class_names[c] for c in rare]}
        for way, fields in ways.items():
            row[way] = {
                name: round(value, 4)
                for name, value in measure(data, rare, test, seed, fields).items()
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
    result = {
        "machine": machine(),
        "images": {"common": NUM_MANY, "rare": NUM_FEW, "rare_classes": NUM_RARE_CLASSES},
        "epochs": EPOCHS,
        "n": num_seeds,
        "summary": {
            part: summarise(rows, [way for way in ways if way.startswith(part)])
            for part in ("whole network", "head")
        },
        "rows": rows,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
