"""torchvision's sets for classification, in one table, read by torchvision's own loaders.

Imports without torch. FGVC Aircraft is not here: torchvision knows no checksum of its archive.
"""

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.config import ConfigError, DataError
from trainer.data.cache import locked_folder
from trainer.data.options import DataOptions, Progress
from trainer.data.roots import data_root, fetch

if TYPE_CHECKING:
    from trainer.data.dataset import ImageDataset, Split

Pictures = Iterable[tuple[str | Path, int]]


@dataclass(frozen=True, kw_only=True)
class Published:
    """A set of torchvision's: how it is opened, and what of it is where."""

    loader: str
    """The class in torchvision.datasets."""
    parts: Mapping[str, Mapping[str, Any]]
    """Our train, val and test, and the loader's words for them."""
    archives: tuple[str, ...]
    """What its publisher gives away, where the loader looks for it below the data root."""
    folder: str
    """What the loader makes of it, below the data root."""
    flips: bool = True
    class_names: tuple[str, ...] = ()
    """Where the loader has none."""
    pictures: Callable[[Any], Pictures] | None = None
    """Files and labels of an opened part; without it the part is an array."""

    def open(self, root: Path, part: str, *, download: bool = False) -> Any:
        """The loader's data set. It raises RuntimeError or OSError where it isn't whole."""
        import torchvision

        keeping = {"loader": str} if self.pictures is _loaded_paths else {}
        with warnings.catch_warnings():
            # published pickles were written by a numpy whose dtypes a new one warns of
            warnings.simplefilter("ignore")
            return getattr(torchvision.datasets, self.loader)(
                root, **self.parts[part], download=download, **keeping
            )

    def names(self, opened: Any) -> tuple[str, ...]:
        """Of the classes; a class of several names goes by the first."""
        found = self.class_names or opened.classes
        return tuple(name if isinstance(name, str) else name[0] for name in found)


def load(name: str, *, seed: int, options: DataOptions, progress: Progress) -> "ImageDataset":
    """The set of this name in PUBLISHED, from the data root, downloaded if it isn't there.

    Raises DataError, one line that says what to put where, if it can't be had.
    """
    published = PUBLISHED[name]
    root = data_root()
    opened = _opened(name, published, root)
    if published.pictures is not None:
        return _load_pictures(name, published, opened, seed, options, progress)
    if options.image_size is not None:
        raise ConfigError(f"--image-size is for picture files: {name} has images of one size")
    from trainer.data.dataset import fingerprint
    from trainer.data.prepared import in_cache
    from trainer.data.splits import make_dataset

    training = _split(opened["train"])
    class_names = published.names(opened["train"])
    data = make_dataset(
        name=name,
        training=training,
        class_names=class_names,
        fingerprint=fingerprint(training, class_names),
        flips=published.flips,
        open_test=lambda: _split(published.open(root, "test")),
        seed=seed,
    )
    return in_cache(data, options)


def _load_pictures(
    name: str,
    published: Published,
    opened: Mapping[str, Any],
    seed: int,
    options: DataOptions,
    progress: Progress,
) -> "ImageDataset":
    from trainer.data.assemble import load_pictures
    from trainer.data.listing import Listing, Picture

    assert published.pictures is not None
    parts = {
        part: [Picture(Path(path), label) for path, label in published.pictures(of_part)]
        for part, of_part in opened.items()
    }
    listing = Listing(
        source=name,
        class_names=published.names(opened["train"]),
        parts=parts,
        flips=published.flips,
    )
    return load_pictures(listing, name=name, seed=seed, options=options, progress=progress)


def _opened(name: str, published: Published, root: Path) -> dict[str, Any]:
    """Its parts but for a test part of arrays, which is not to be read yet."""
    wanted = [part for part in published.parts if part != "test" or published.pictures is not None]

    def open_all() -> dict[str, Any]:
        return {part: published.open(root, part) for part in wanted}

    try:
        return open_all()
    except (RuntimeError, OSError):
        way_out = f"put the published {', '.join(published.archives)} below {root}"
    try:
        with locked_folder(root):
            try:
                return open_all()  # another process may have fetched it meanwhile
            except (RuntimeError, OSError):
                download = functools.partial(_download, published, root)
                fetch(name, download, published.folder, way_out)
        return open_all()
    except (RuntimeError, OSError) as error:
        raise DataError(f"{name} can't be read from {root} ({error}): {way_out}") from error


def _download(published: Published, root: Path, folder: Path) -> Path:
    """Unpack the archives that lie below the data root, or else downloaded ones."""
    links = []
    for archive in published.archives:
        if (root / archive).is_file():
            (folder / archive).parent.mkdir(parents=True, exist_ok=True)
            os.symlink(root / archive, folder / archive)
            links.append(folder / archive)
    for part in published.parts:
        published.open(folder, part, download=True)
    for link in links:
        link.unlink()
    return folder / published.folder


def _split(opened: Any) -> "Split":
    """An opened part as it lies in memory: uint8 (N,C,H,W)."""
    import numpy as np
    import torch

    from trainer.data.dataset import Split

    images = np.asarray(opened.data)
    if images.ndim == 3:
        images = images[:, None]
    elif images.shape[3] == 3:
        images = images.transpose(0, 3, 1, 2)
    labels = opened.targets if hasattr(opened, "targets") else opened.labels
    return Split(
        torch.from_numpy(np.ascontiguousarray(images)),
        torch.from_numpy(np.asarray(labels).astype(np.int64)),
    )


def _loaded_paths(opened: Any) -> Pictures:
    """Of a loader that is given what loads a path: it gives back the path instead."""
    return (opened[index] for index in range(len(opened)))


def _pets(opened: Any) -> Pictures:
    return zip(opened._images, opened._labels, strict=True)


def _signs(opened: Any) -> Pictures:
    return list(opened._samples)


_TRAIN_TEST = {"train": {"split": "train"}, "test": {"split": "test"}}
_TRAIN_VAL_TEST = {"train": {"split": "train"}, "val": {"split": "val"}, "test": {"split": "test"}}
_BY_FLAG = {"train": {"train": True}, "test": {"train": False}}
_DIGITS = tuple("0123456789")
_IDX = ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1")

PUBLISHED: dict[str, Published] = {
    "cifar100": Published(
        loader="CIFAR100",
        parts=_BY_FLAG,
        archives=("cifar-100-python.tar.gz",),
        folder="cifar-100-python",
    ),
    "dtd": Published(
        loader="DTD",
        parts=_TRAIN_VAL_TEST,
        archives=("dtd/dtd-r1.0.1.tar.gz",),
        folder="dtd",
        pictures=_loaded_paths,
    ),
    "eurosat": Published(
        loader="EuroSAT",
        parts={"train": {}},
        archives=("eurosat/EuroSAT.zip",),
        folder="eurosat",
        pictures=_loaded_paths,
    ),
    "flowers102": Published(
        loader="Flowers102",
        parts=_TRAIN_VAL_TEST,
        archives=(
            "flowers-102/102flowers.tgz",
            "flowers-102/imagelabels.mat",
            "flowers-102/setid.mat",
        ),
        folder="flowers-102",
        pictures=_loaded_paths,
    ),
    "food101": Published(
        loader="Food101",
        parts=_TRAIN_TEST,
        archives=("food-101.tar.gz",),
        folder="food-101",
        pictures=_loaded_paths,
    ),
    "gtsrb": Published(
        loader="GTSRB",
        parts=_TRAIN_TEST,
        archives=(
            "gtsrb/GTSRB-Training_fixed.zip",
            "gtsrb/GTSRB_Final_Test_Images.zip",
            "gtsrb/GTSRB_Final_Test_GT.zip",
        ),
        folder="gtsrb",
        flips=False,
        class_names=tuple(f"{number:05d}" for number in range(43)),
        pictures=_signs,
    ),
    "imagenette": Published(
        loader="Imagenette",
        parts={"train": {"split": "train"}, "test": {"split": "val"}},
        archives=("imagenette2.tgz",),
        folder="imagenette2",
        pictures=_loaded_paths,
    ),
    "kmnist": Published(
        loader="KMNIST",
        parts=_BY_FLAG,
        archives=tuple(f"KMNIST/raw/{name}-ubyte.gz" for name in _IDX),
        folder="KMNIST/raw",
        flips=False,
    ),
    "mnist": Published(
        loader="MNIST",
        parts=_BY_FLAG,
        archives=tuple(f"MNIST/raw/{name}-ubyte.gz" for name in _IDX),
        folder="MNIST/raw",
        flips=False,
        class_names=_DIGITS,
    ),
    "oxford-pets": Published(
        loader="OxfordIIITPet",
        parts={"train": {"split": "trainval"}, "test": {"split": "test"}},
        archives=("oxford-iiit-pet/images.tar.gz", "oxford-iiit-pet/annotations.tar.gz"),
        folder="oxford-iiit-pet",
        pictures=_pets,
    ),
    "stl10": Published(
        loader="STL10",
        parts=_TRAIN_TEST,
        archives=("stl10_binary.tar.gz",),
        folder="stl10_binary",
    ),
    "svhn": Published(
        loader="SVHN",
        parts=_TRAIN_TEST,
        archives=("train_32x32.mat", "test_32x32.mat"),
        folder=".",
        flips=False,
        class_names=_DIGITS,
    ),
}
