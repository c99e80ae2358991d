"""What near duplicates across the split are worth: part of python -m benchmarks.data."""

import contextlib
import hashlib
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageEnhance

from trainer.config import TrainConfig
from trainer.data.dataset import Split
from trainer.data.decoding import Task, decode
from trainer.data.pictures import read_picture
from trainer.data.registry import load
from trainer.data.similarity import group_duplicates
from trainer.data.splits import draw_test, make_dataset
from trainer.device import DevicePlan
from trainer.evaluate import evaluate
from trainer.loop import train

NUM_PICTURES, NUM_COPIED, NUM_CLEAN = 1500, 600, 2000
EPOCHS = 12
SIZE = (1, 32, 32)


def measure_leak(num_seeds: int) -> dict[str, Any]:
    """Test accuracy with copies on both sides of the split, with groups, and on clean pictures."""
    rows = []
    for seed in range(num_seeds):
        with tempfile.TemporaryDirectory(prefix="hpo-leak-") as folder:
            pool, groups, clean, recall = make_pool(Path(folder), seed)
        row = {"seed": seed, "copies_found": round(recall, 4)}
        for name, chosen in (("without_groups", None), ("with_groups", groups)):
            own, other = accuracies(pool, chosen, clean, seed)
            row |= {f"{name}_test": own, f"{name}_clean": other}
        rows.append(row)
        print(row)
    means = {}
    for name in ("without_groups", "with_groups"):
        gaps = [row[f"{name}_test"] - row[f"{name}_clean"] for row in rows]
        means[name] = {
            "test": spread([row[f"{name}_test"] for row in rows]),
            "clean": spread([row[f"{name}_clean"] for row in rows]),
            "test_minus_clean": spread(gaps),
        }
    settings = {"pictures": NUM_PICTURES, "copied": NUM_COPIED, "copies_of_each": 3}
    return {**settings, "epochs": EPOCHS, "backbone": "smallcnn", "rows": rows, **means}


def spread(values: list[float]) -> dict[str, float]:
    """Mean and standard deviation."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": round(statistics.fmean(values), 4), "std": round(std, 4)}


def make_pool(folder: Path, seed: int) -> tuple[Split, NDArray[np.int64], Split, float]:
    """Pictures, some with near copies; their groups; clean ones; the share of copies found."""
    fashion = load("fashion-mnist", seed=0)
    values = np.random.default_rng(seed)
    drawn = values.choice(len(fashion.train), NUM_PICTURES + NUM_CLEAN, replace=False)
    paths, labels, origins = [], [], []
    for number, index in enumerate(drawn[:NUM_PICTURES].tolist()):
        image = Image.fromarray(fashion.train.images[index, 0].numpy()).resize((64, 64))
        made = [save(image, folder / f"{number}.png")]
        if number < NUM_COPIED:
            light = ImageEnhance.Brightness(image).enhance(0.9)
            made.append(save(image, folder / f"{number}.jpg", quality=60))
            made.append(save(image.resize((50, 50)), folder / f"{number}-small.png"))
            made.append(save(light, folder / f"{number}-dark.png"))
        paths += made
        labels += [int(fashion.train.labels[index])] * len(made)
        origins += [number] * len(made)
    looks = [decode(Task(path, SIZE)) for path in paths]
    groups = group_duplicates(
        [look.sha256 for look in looks],
        [look.hash for look in looks],
        [look.thumbnail for look in looks],
    )
    leaders = {origin: groups[origins.index(origin)] for origin in range(NUM_COPIED)}
    copies = [i for i, o in enumerate(origins) if o < NUM_COPIED and origins.index(o) != i]
    recall = float(np.mean([groups[i] == leaders[origins[i]] for i in copies]))
    pixels = np.stack([read_picture(path, input_size=SIZE) for path in paths])
    pool = Split(torch.from_numpy(pixels), torch.tensor(labels))
    clean_paths = []
    for index in drawn[NUM_PICTURES:].tolist():
        image = Image.fromarray(fashion.train.images[index, 0].numpy()).resize((64, 64))
        clean_paths.append(save(image, folder / f"clean-{index}.png"))
    clean = np.stack([read_picture(path, input_size=SIZE) for path in clean_paths])
    return (
        pool,
        groups,
        Split(torch.from_numpy(clean), fashion.train.labels[drawn[NUM_PICTURES:]]),
        recall,
    )


def save(image: Image.Image, path: Path, **options: int) -> Path:
    """The path."""
    image.save(path, format=None, **options)
    return path


def accuracies(
    pool: Split, groups: NDArray[np.int64] | None, clean: Split, seed: int
) -> tuple[float, float]:
    """On the test split that is drawn from the pool, and on clean pictures."""
    identity = hashlib.sha256(str(seed).encode()).hexdigest()
    rest, drawn = draw_test(pool.labels, identity, groups)
    data = make_dataset(
        name="pool",
        training=pool.take(rest),
        class_names=tuple("0123456789"),
        fingerprint=identity,
        flips=True,
        open_test=lambda: pool.take(drawn),
        seed=seed,
    )
    config = TrainConfig(backbone="smallcnn", epochs=EPOCHS, batch_size=64, lr=2e-3, seed=seed)
    plan = DevicePlan(device="cpu")
    with contextlib.closing(train(config, data, plan)) as reports:
        for report in reports:
            last = report
        model = last.state.model
        tested = [
            evaluate(model, split, plan, mean=data.mean, std=data.std).accuracy
            for split in (data.open_test(), clean)
        ]
    return round(tested[0], 4), round(tested[1], 4)
