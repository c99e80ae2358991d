"""Fashion-MNIST: 60,000 + 10,000 images of 1x28x28 in ten classes (Xiao et al. 2017)."""

import gzip
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from trainer.config import DataError
from trainer.data.dataset import ImageDataset, Split, fingerprint
from trainer.data.roots import data_root, fetch
from trainer.data.splits import make_dataset

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
"""Of Debian's package dataset-fashion-mnist."""
CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
_KINDS = {"images": "images-idx3-ubyte", "labels": "labels-idx1-ubyte"}
_UINT8 = 0x08


def load(*, seed: int) -> ImageDataset:
    """Fashion-MNIST from the first folder that has it, downloaded if none has.

    Raises DataError if it can't be had or a file of it is broken.
    """
    folder = _find() or _download()
    training = _read(folder, "train")
    return make_dataset(
        name="fashion-mnist",
        training=training,
        class_names=CLASS_NAMES,
        fingerprint=fingerprint(training, CLASS_NAMES),
        flips=True,
        open_test=lambda: _read(folder, "t10k"),
        seed=seed,
    )


def _find() -> Path | None:
    root = data_root()
    for folder in (root / "fashion-mnist", root / "FashionMNIST" / "raw", DEBIAN_FOLDER):
        if all(_file(folder, part, kind) for part in ("train", "t10k") for kind in _KINDS):
            return folder
    return None


def _file(folder: Path, part: str, kind: str) -> Path | None:
    plain = folder / f"{part}-{_KINDS[kind]}"
    for path in (plain, plain.with_name(plain.name + ".gz")):
        if path.is_file():
            return path
    return None


def _download() -> Path:
    root = data_root()

    def download(folder: Path) -> Path:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(folder, download=True)
        return folder / "FashionMNIST" / "raw"

    way_out = (
        "install Debian's package dataset-fashion-mnist, or put its four files "
        f"(train-images-idx3-ubyte.gz, ...) into {root / 'fashion-mnist'}"
    )
    fetch("fashion-mnist", download, "FashionMNIST/raw", way_out)
    return root / "FashionMNIST" / "raw"


def _read(folder: Path, part: str) -> Split:
    images, labels = _read_idx(folder, part, "images"), _read_idx(folder, part, "labels")
    if images.ndim != 3 or labels.shape != images.shape[:1]:
        raise DataError(f"{folder}: images and labels of {part} don't fit together")
    return Split(images.unsqueeze(1), labels.to(torch.int64))


def _read_idx(folder: Path, part: str, kind: str) -> Tensor:
    """The array in a file of the IDX format (big-endian header), uint8 of any shape."""
    path = _file(folder, part, kind)
    if path is None:
        raise DataError(f"{folder}: {part}-{_KINDS[kind]} is missing")
    try:
        content = path.read_bytes()
        if path.suffix == ".gz":
            content = gzip.decompress(content)
        zeros, value_type, num_axes = struct.unpack_from(">HBB", content)
        shape = struct.unpack_from(f">{num_axes}I", content, 4)
    except (OSError, EOFError, zlib.error, struct.error) as error:
        raise DataError(f"{path} can't be read: {error}") from error
    values = np.frombuffer(content, np.uint8, offset=4 + 4 * num_axes)
    if zeros != 0 or value_type != _UINT8 or len(values) != np.prod(shape, dtype=np.int64):
        raise DataError(f"{path} is torn or no IDX file of bytes")
    return torch.from_numpy(values.reshape(shape).copy())
