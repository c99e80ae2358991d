"""The usual training script on Fashion-MNIST: torchvision's data set, PIL transforms, DataLoader.

Written once for all peers. The networks are the project's own, so that all arms do the same work.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset
from torchvision import datasets, transforms

from trainer.backbones import build
from trainer.config import TrainConfig

MEAN, STD = (0.2860,), (0.3530,)


def loaders(folder: str, batch_size: int, num_train: int) -> tuple[Any, Any]:
    """Of the first num_train training images, and of the others for validation."""
    normalise = [transforms.ToTensor(), transforms.Normalize(MEAN, STD)]
    flips = [transforms.RandomHorizontalFlip(), transforms.RandomCrop(28, padding=2)]
    train = datasets.FashionMNIST(folder, transform=transforms.Compose([*flips, *normalise]))
    val = datasets.FashionMNIST(folder, transform=transforms.Compose(normalise))
    return (
        DataLoader(Subset(train, range(num_train)), batch_size=batch_size, shuffle=True),
        DataLoader(Subset(val, range(num_train, len(val))), batch_size=512),
    )


def trained(params: dict[str, Any], task: dict[str, Any]) -> Iterator[float]:
    """Train as params say (lr, batch_size, backbone, seed); validation accuracy after each epoch.

    task: folder, num_train, epochs.
    """
    torch.manual_seed(params["seed"])
    train, val = loaders(task["folder"], params["batch_size"], task["num_train"])
    config = TrainConfig(backbone=params["backbone"])
    model = build(config, input_size=(1, 28, 28), num_classes=10)
    optimizer = torch.optim.Adam(model.parameters(), lr=params["lr"])
    loss_function = nn.CrossEntropyLoss()
    for _ in range(task["epochs"]):
        model.train()
        for images, labels in train:
            optimizer.zero_grad()
            loss = loss_function(model(images), labels)
            loss.backward()
            optimizer.step()
        model.eval()
        num_right = 0
        with torch.no_grad():
            for images, labels in val:
                num_right += int((model(images).argmax(dim=1) == labels).sum())
        yield num_right / len(val.dataset)


class Witness:
    """A line for each epoch of each trial, so that all arms are read alike."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def note(self, trial: object, epoch: int, value: float, params: dict[str, Any]) -> None:
        """One write, which processes don't mix up."""
        line = {"at": time.time(), "trial": str(trial), "epoch": epoch, "value": value, **params}
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def objective_of(task: dict[str, Any]) -> Callable[[Any], float]:
    """What Optuna's users write; with pruning where the task says so."""
    import optuna

    witness = Witness(task["witness"])

    def objective(trial: optuna.Trial) -> float:
        params = {
            "lr": trial.suggest_float("lr", *task["lr"], log=True),
            "batch_size": trial.suggest_categorical("batch_size", task["batch_size"]),
            "backbone": trial.suggest_categorical("backbone", task["backbone"]),
            "seed": trial.number,
        }
        value = 0.0
        for epoch, value in enumerate(trained(params, task), start=1):
            witness.note(trial.number, epoch, value, params)
            trial.report(value, epoch)
            if task["prunes"] and trial.should_prune():
                raise optuna.TrialPruned
        return value

    return objective
