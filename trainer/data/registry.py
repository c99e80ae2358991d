"""Data sources by name, or by the path of a folder of pictures. Imports without torch."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import DataError, unknown_name

if TYPE_CHECKING:
    from trainer.data.dataset import ImageDataset


def load(source: str, *, seed: int) -> "ImageDataset":
    """The data set of a source; the seed draws its validation split and nothing else.

    source: a key of SOURCES, or the path of a folder (it has a separator, or exists).
    Raises DataError, one line, if the source is unknown or its data can't be used.
    """
    name = source_name(source)
    try:
        if source in SOURCES:
            return SOURCES[source](seed)
        return _load_folder(Path(source).expanduser(), name, seed)
    except OSError as error:
        raise DataError(f"{source}: {error}") from error


def source_name(source: str) -> str:
    """A study's name for this source: 1 to 64 of the characters A-Z a-z 0-9 . _ -

    Raises DataError if the source is neither a known name nor a path; a folder need not exist.
    """
    if source in SOURCES:
        return source
    folder = Path(settled_source(source)).name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", folder).strip("-.")[:64] or "data"


def settled_source(source: str) -> str:
    """The same source in words that hold in any working folder: a name, or an absolute path.

    Raises DataError if the source is neither a known name nor a path.
    """
    if source in SOURCES:
        return source
    if not _is_path(source):
        known = unknown_name("data set", source, SOURCES)
        raise DataError(f"{known}, or the path of a folder")
    return str(Path(source).expanduser().resolve())


def _is_path(source: str) -> bool:
    separators = [separator for separator in (os.sep, os.altsep) if separator]
    return any(s in source for s in separators) or os.path.isdir(source)


def _load_folder(folder: Path, name: str, seed: int) -> "ImageDataset":
    from trainer.data.folder import load as load_folder

    return load_folder(folder, name=name, seed=seed)


def _load_digits(seed: int) -> "ImageDataset":
    from trainer.data.digits import load as load_digits

    return load_digits(seed=seed)


def _load_fashion_mnist(seed: int) -> "ImageDataset":
    from trainer.data.fashion_mnist import load as load_fashion_mnist

    return load_fashion_mnist(seed=seed)


def _load_cifar10(seed: int) -> "ImageDataset":
    from trainer.data.cifar10 import load as load_cifar10

    return load_cifar10(seed=seed)


SOURCES: dict[str, Callable[[int], "ImageDataset"]] = {
    "digits": _load_digits,
    "fashion-mnist": _load_fashion_mnist,
    "cifar10": _load_cifar10,
}
