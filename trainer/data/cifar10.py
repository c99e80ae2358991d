"""CIFAR-10: 50,000 + 10,000 images of 3x32x32 in ten classes (Krizhevsky 2009)."""

import shutil
import tarfile
import warnings
from pathlib import Path

import numpy as np
import torch

from trainer.config import DataError
from trainer.data.dataset import ImageDataset, Split, fingerprint
from trainer.data.roots import data_root, fetch
from trainer.data.splits import make_dataset


def load(*, seed: int) -> ImageDataset:
    """CIFAR-10 in torchvision's layout under the data root, downloaded if it is not there.

    Raises DataError if it can't be had.
    """
    root = data_root()
    try:
        training, class_names = _read(root, train=True)
    except DataError:
        _provide(root)
        training, class_names = _read(root, train=True)
    return make_dataset(
        name="cifar10",
        training=training,
        class_names=class_names,
        fingerprint=fingerprint(training, class_names),
        flips=True,
        open_test=lambda: _read(root, train=False)[0],
        seed=seed,
    )


def _read(root: Path, *, train: bool) -> tuple[Split, tuple[str, ...]]:
    """A split and the class names. torchvision opens no batch whose published md5 differs."""
    from torchvision.datasets import CIFAR10

    try:
        with warnings.catch_warnings():
            # the published batches were written by a numpy whose dtypes a new one warns of
            warnings.simplefilter("ignore")
            batches = CIFAR10(root, train=train)
    except (RuntimeError, OSError) as error:
        raise DataError(f"cifar10 can't be read from {root}: {error}") from error
    images = np.ascontiguousarray(batches.data.transpose(0, 3, 1, 2))
    labels = torch.tensor(batches.targets, dtype=torch.int64)
    return Split(torch.from_numpy(images), labels), tuple(batches.classes)


def _provide(root: Path) -> None:
    """Unpack the archive that lies in the data root, or else a downloaded one."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity, download_url

    def download(folder: Path) -> Path:
        archive = root / CIFAR10.filename
        if not check_integrity(archive, CIFAR10.tgz_md5):
            download_url(CIFAR10.url, folder, filename=archive.name, md5=CIFAR10.tgz_md5)
            archive = folder / archive.name
        unpacked: Path = folder / CIFAR10.base_folder
        _unpack(archive, unpacked)
        return unpacked

    way_out = f"put the published {CIFAR10.filename} into {root}"
    fetch("cifar10", download, CIFAR10.base_folder, way_out)


def _unpack(archive: Path, unpacked: Path) -> None:
    """The plain files of the archive's one folder, and nothing else that it may name.

    By hand, for tarfile's own filters came with Python 3.11.4.
    """
    unpacked.mkdir()
    with tarfile.open(archive) as tar:
        for member in tar:
            folder, _, name = member.name.rpartition("/")
            content = tar.extractfile(member) if member.isfile() else None
            if content is not None and folder == unpacked.name and name not in ("", ".", ".."):
                with content, (unpacked / name).open("wb") as file:
                    shutil.copyfileobj(content, file)
