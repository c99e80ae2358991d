"""Fine-tuning beside training from scratch on few images; a start learnt without labels.

    python -m benchmarks.transfer labelled [BACKBONE]   learnt on Fashion-MNIST, tuned on digits
    python -m benchmarks.transfer unlabelled            SimCLR and MoCo, then 1 % of the labels

Each writes its part of benchmarks/transfer.json, backbone by backbone. Fashion-MNIST is halved to
14x14 pixels, so that it takes minutes of a core, and digits are scaled up to as many: at their own
8x8 what has been learnt on the one is worth less on the other. Every arm has as many learning
rates to choose from (a head alone larger ones); which one it is shown with, validation images say,
in the mean of all seeds. resnet18 is slow: it has one rate, the second, and half the epochs.
"""

import argparse
import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from benchmarks.winner import halved
from hpo.measured import machine
from trainer.backbones import as_fed
from trainer.config import TrainConfig
from trainer.data.dataset import ImageDataset, Split, channel_statistics
from trainer.data.fashion_mnist import load as load_fashion
from trainer.data.registry import load
from trainer.device import DevicePlan
from trainer.evaluate import evaluate
from trainer.export.safetensors import weights_to_bytes
from trainer.loop import train
from trainer.pretraining import PretrainConfig, pretrain

RESULT = Path(__file__).with_suffix(".json")
PLAN = DevicePlan(device="cpu", num_threads=1, channels_last=True)
SEEDS = {"resnet8": 5, "resnet20": 3, "resnet18": 3}
PRETRAINING = {"resnet8": (54_000, 5), "resnet20": (54_000, 3), "resnet18": (10_000, 2)}
"""Images, epochs."""
FEW = (5, 20, 100)
SIDE = 14
RATES = (3e-3, 1e-2, 3e-2, 1e-1)
FROZEN_RATES = (3e-2, 1e-1, 3e-1, 1.0)
ARMS: Mapping[str, Mapping[str, Any]] = {
    "from scratch": {},
    "frozen": {"trainable": "head"},
    "last stage": {"trainable": "last1"},
    "whole": {"backbone_lr": 1.0},
    "gradual": {"trainable": "gradual"},
}
ONE_PERCENT = 600


def few_of_each(data: ImageDataset, number: int, seed: int) -> ImageDataset:
    """The data with so many training images of each class, and their own statistics."""
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))
    labels = data.train.labels[order]
    chosen = torch.cat([order[labels == label][:number] for label in range(data.num_classes)])
    part = data.train.take(chosen)
    mean, std = channel_statistics(part.images)
    return dataclasses.replace(data, train=part, mean=mean, std=std)


def save(model: torch.nn.Module, data: ImageDataset, folder: Path) -> Path:
    """Weights as an export has them."""
    folder.mkdir()
    content = weights_to_bytes(model, mean=data.mean, std=data.std)
    (folder / "model.safetensors").write_bytes(content)
    return folder


def compare(
    arms: Mapping[str, Mapping[str, Any]], sets: Sequence[ImageDataset], epochs: int, backbone: str
) -> dict[str, Any]:
    """Each arm on each of the data sets, which differ in their seed; its best learning rate's."""
    found = {}
    held_out = [(data.val, data.open_test()) for data in sets]
    for name, fields in arms.items():
        tried = {}
        rates = FROZEN_RATES if fields.get("trainable") == "head" else RATES
        for lr in rates[1:2] if backbone == "resnet18" else rates:
            reports = []
            for seed, data in enumerate(sets):
                config = TrainConfig.from_dict(
                    {"backbone": backbone, "epochs": epochs, "batch_size": 32, "lr": lr,
                     "schedule": "cosine", "seed": seed, **fields}
                )  # fmt: skip
                started = time.perf_counter()
                # validated once: after each epoch it would take longer than the training
                (*_, last) = train(config, dataclasses.replace(data, val=data.val.take([])), PLAN)
                seconds = time.perf_counter() - started
                fed, model = as_fed(config, data), last.state.model
                val, test = (
                    evaluate(model, split, PLAN, mean=fed.mean, std=fed.std).accuracy
                    for split in held_out[seed]
                )
                reports.append((val, test, seconds))
            tried[lr] = reports
        best = max(tried, key=lambda lr: statistics.fmean(val for val, _, _ in tried[lr]))
        tests = [accuracy for _, accuracy, _ in tried[best]]
        found[name] = {
            "lr": best,
            "test": tests,
            "mean": statistics.fmean(tests),
            "std": statistics.stdev(tests),
            "seconds": statistics.fmean(seconds for _, _, seconds in tried[best]),
        }
        shown = found[name]
        print(f"  {name:24s} {shown['mean']:.4f} +- {shown['std']:.4f} (lr {best})", flush=True)
    return found


def scaled(split: Split) -> Split:
    """Images of SIDE pixels."""
    images = functional.interpolate(split.images.float(), size=SIDE, mode="bilinear")
    return Split(images.round().to(torch.uint8), split.labels)


def small_fashion(num_images: int | None = None) -> ImageDataset:
    """Fashion-MNIST at 14x14 pixels."""
    whole = load_fashion(seed=0)
    train_split = whole.train if num_images is None else whole.train.take(range(num_images))
    train_split, val = halved(train_split), halved(whole.val)
    mean, std = channel_statistics(train_split.images)
    return dataclasses.replace(
        whole, train=train_split, val=val, mean=mean, std=std,
        open_test=lambda: halved(whole.open_test()),
    )  # fmt: skip


def labelled(backbone: str) -> None:
    """Pretrained here on Fashion-MNIST with its labels, tuned on few digits."""
    found_digits = load("digits", seed=0)
    digits = dataclasses.replace(
        found_digits, train=scaled(found_digits.train), val=scaled(found_digits.val),
        open_test=lambda: scaled(found_digits.open_test()),
    )  # fmt: skip
    num_images, epochs = PRETRAINING[backbone]
    with tempfile.TemporaryDirectory() as folder:
        source = small_fashion(num_images)
        config = TrainConfig(backbone=backbone, epochs=epochs, lr=1e-2)
        (*_, last) = train(config, source, PLAN)
        print(f"{backbone}: {last.val_accuracy:.4f} on Fashion-MNIST", flush=True)
        weights = save(last.state.model, source, Path(folder, backbone))
        found: dict[str, Any] = {"pretrained to": last.val_accuracy, "images a class": {}}
        arms = {
            name: {**fields, **({"weights": str(weights)} if fields else {})}
            for name, fields in ARMS.items()
        }
        for number in FEW:
            print(f"{backbone}, {number} images a class", flush=True)
            sets = [few_of_each(digits, number, seed) for seed in range(SEEDS[backbone])]
            passes = max(10, min(40, 6_000 // (10 * number)))
            passes //= 2 if backbone == "resnet18" else 1
            found["images a class"][number] = compare(arms, sets, passes, backbone)
            keep(f"labelled {backbone}", found)


def unlabelled() -> dict[str, Any]:
    """SimCLR and MoCo on all images without labels, then 600 labelled ones."""
    backbone, source = "resnet8", small_fashion()
    whole = source.with_validation_in_training()
    arms: dict[str, Mapping[str, Any]] = {"from scratch": {}}
    found: dict[str, Any] = {"images": len(whole.train)}
    with tempfile.TemporaryDirectory() as folder:
        for method in ("simclr", "moco"):
            config = PretrainConfig(backbone=backbone, method=method, epochs=5)
            for report in pretrain(config, whole, PLAN):
                print(f"{method}: epoch {report.epoch}, loss {report.loss:.3f}", flush=True)
            found[method] = {"loss": report.loss, "seconds": report.seconds}
            weights = str(save(report.state.backbone, whole, Path(folder, method)))
            arms[f"{method}, frozen"] = {"weights": weights, "trainable": "head"}
            arms[f"{method}, whole, backbone_lr 0.1"] = {"weights": weights, "backbone_lr": 0.1}
        sets = [few_of_each(source, ONE_PERCENT // 10, seed) for seed in range(5)]
        found["arms"] = compare(arms, sets, 20, backbone)
    return found


def main() -> None:
    """One part, kept beside the other."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.transfer")
    parser.add_argument("part", choices=("labelled", "unlabelled"))
    parser.add_argument("backbones", nargs="*", default=list(PRETRAINING))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "unlabelled":
        keep("unlabelled", unlabelled())
        return
    for backbone in options.backbones:
        labelled(backbone)


def keep(part: str, found: Mapping[str, Any]) -> None:
    """Beside what is there."""
    kept = json.loads(RESULT.read_text()) if RESULT.exists() else {}
    kept[part] = {"machine": machine(), **found}
    RESULT.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
