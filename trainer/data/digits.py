"""scikit-learn's digits: 1,797 images of 1x8x8 in ten classes; they need no download."""

import gzip
import importlib.util
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from trainer.config import DataError
from trainer.data.dataset import ImageDataset, Split, fingerprint
from trainer.data.splits import draw_test, make_dataset


def load(*, seed: int) -> ImageDataset:
    """The digits, values 0..16 times 255/16 rounded, with a fifth of them as test split."""
    table = _table()
    values = np.rint(table[:, :-1] * 255 / 16).astype(np.uint8).reshape(-1, 1, 8, 8)
    whole = Split(torch.from_numpy(values), torch.from_numpy(table[:, -1].astype(np.int64)))
    class_names = tuple(str(digit) for digit in range(10))
    identity = fingerprint(whole, class_names)
    rest, test = draw_test(whole.labels, identity)
    return make_dataset(
        name="digits",
        training=whole.take(rest),
        class_names=class_names,
        fingerprint=identity,
        flips=False,
        open_test=lambda: whole.take(test),
        seed=seed,
    )


def _table() -> npt.NDArray[np.float64]:
    """(1797,65): 64 pixels and the digit. Raises DataError if scikit-learn isn't there."""
    # not by sklearn.datasets: importing it takes a worker longer than all else that it does at
    # its start
    spec = importlib.util.find_spec("sklearn")
    if spec is None or not spec.submodule_search_locations:
        raise DataError("digits come with scikit-learn: pip install scikit-learn")
    path = Path(spec.submodule_search_locations[0]) / "datasets" / "data" / "digits.csv.gz"
    with gzip.open(path, "rt", encoding="ascii") as file:
        return np.loadtxt(file, delimiter=",")
