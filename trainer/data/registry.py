"""Data sources by name, or by the path of pictures. Imports without torch."""

import dataclasses
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.config import MODULE, ConfigError, DataError, unknown_name
from trainer.data.dvc import has_note, pulled
from trainer.data.findings import one_line
from trainer.data.options import DEFAULT_OPTIONS, DataOptions, Progress, no_progress
from trainer.data.published import PUBLISHED

if TYPE_CHECKING:
    from trainer.data.dataset import ImageDataset, Split
    from trainer.data.listing import Listing
    from trainer.data.prepared import Known

Source = Callable[[int, DataOptions, Progress], "ImageDataset"]
"""Gets the seed, the options and who is told of progress."""


def load(
    source: str,
    *,
    seed: int,
    options: DataOptions = DEFAULT_OPTIONS,
    progress: Progress = no_progress,
    fingerprint: str | None = None,
) -> "ImageDataset":
    """The data set of a source; the seed draws its validation split and nothing else.

    source: a key of SOURCES, lightning:package:Class, or the path of a folder, a table or an export
    (it has a separator, or exists). fingerprint: of the data that are wanted; where the cache holds
    them, the source is not looked at before its test split is opened. What is read without one, or
    for want of them in the cache, may have another fingerprint. Raises DataError, one line, if the
    source is unknown or its data can't be used; ConfigError if an option is given that the source
    can't heed.
    """
    try:
        source_name(source)
        settled = settled_source(source)
        if source in SOURCES and source not in PUBLISHED:  # small, or mapped as they are
            return _read(source, seed, options, progress)
        return _load(settled, seed, options, progress, fingerprint)
    except OSError as error:
        raise DataError(f"{one_line(source)}: {one_line(error)}") from error


def _load(
    source: str, seed: int, options: DataOptions, progress: Progress, fingerprint: str | None
) -> "ImageDataset":
    """From the cache if that holds what is wanted, else from the source and into the cache."""
    from trainer.data.prepared import Known, keep_prepared, open_prepared, prepare

    def known(fingerprint: str) -> Known:
        return Known(source=source, fingerprint=fingerprint, seed=seed, options=options)

    def read() -> "ImageDataset":
        return _read(source, seed, options, progress)

    if fingerprint is None:
        data = read()
        keep_prepared(known(data.fingerprint), data)
        return data
    wanted = known(fingerprint)
    while True:
        found = open_prepared(wanted, lambda: _read_test(wanted, progress))
        if found is None:
            found = prepare(wanted, read)
        if found is not None:
            return found


def _read(source: str, seed: int, options: DataOptions, progress: Progress) -> "ImageDataset":
    """From the source itself."""
    if source in SOURCES:
        return SOURCES[source](seed, options, progress)
    if source.startswith(MODULE):
        from trainer.data.data_module import load as load_module

        return load_module(source, seed=seed, options=options, progress=progress)
    return _load_path(Path(source), source_name(source), seed, options, progress)


def _read_test(known: "Known", progress: Progress) -> "Split":
    """The test split of a data set whose other splits came from the cache."""
    source, options = known.source, known.options
    if source.startswith(MODULE):
        from trainer.data.data_module import read_test

        return read_test(source, fingerprint=known.fingerprint, options=options, progress=progress)
    data = _read(source, known.seed, options, progress)
    if data.fingerprint != known.fingerprint:
        raise DataError(f"{one_line(source)} has changed since it was first read")
    return data.open_test()


def source_name(source: str) -> str:
    """A study's name for this source: 1 to 64 of the characters A-Z a-z 0-9 . _ -

    Raises DataError if the source is neither a known name nor a path; a folder need not exist.
    """
    if source in SOURCES:
        return source
    path = Path(source.rpartition(":")[2] if source.startswith(MODULE) else settled_source(source))
    words = path.stem if path.suffix.lower() in LISTINGS else path.name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", words).strip("-.")[:64] or "data"


def settled_source(source: str) -> str:
    """The same source in words that hold in any working folder: a name, or an absolute path.

    Raises DataError if the source is neither a known name nor a path.
    """
    if source in SOURCES or source.startswith(MODULE):
        return source
    if not _is_path(source):
        known = unknown_name("data set", source, SOURCES)
        raise DataError(
            f"{known}, or the path of a folder, a .csv table or a .json export, or "
            "lightning:package:Class"
        )
    return os.path.realpath(os.path.expanduser(source))


def _is_path(source: str) -> bool:
    if source == "" or "\0" in source:
        return False
    separators = [separator for separator in (os.sep, os.altsep) if separator]
    path = Path(source)
    if path.suffix.lower() in LISTINGS or any(s in source for s in separators):
        return True
    try:
        return path.exists() or has_note(path)
    except OSError:  # too long a name for a file
        return False


def _load_path(
    path: Path, name: str, seed: int, options: DataOptions, progress: Progress
) -> "ImageDataset":
    from trainer.data.assemble import load_pictures

    identity = pulled(path)
    listing = LISTINGS.get(path.suffix.lower(), _list_folder)(path)
    listing = dataclasses.replace(listing, identity=identity)
    return load_pictures(listing, name=name, seed=seed, options=options, progress=progress)


def _list_folder(path: Path) -> "Listing":
    from trainer.data.folder import list_folder

    return list_folder(path)


def _list_table(path: Path) -> "Listing":
    from trainer.data.table import list_table

    return list_table(path)


def _list_export(path: Path) -> "Listing":
    from trainer.data.label_studio import list_export

    return list_export(path)


LISTINGS: dict[str, Callable[[Path], "Listing"]] = {".csv": _list_table, ".json": _list_export}
"""By the suffix of a file that names pictures; any other path is a folder."""


def _load_digits(seed: int) -> "ImageDataset":
    from trainer.data.digits import load as load_digits

    return load_digits(seed=seed)


def _load_fashion_mnist(seed: int) -> "ImageDataset":
    from trainer.data.fashion_mnist import load as load_fashion_mnist

    return load_fashion_mnist(seed=seed)


def _load_cifar10(seed: int) -> "ImageDataset":
    from trainer.data.cifar10 import load as load_cifar10

    return load_cifar10(seed=seed)


def _of_one_size(name: str, load_images: Callable[[int], "ImageDataset"]) -> Source:
    """A source whose images are arrays of one size, which no option changes."""

    def load_source(seed: int, options: DataOptions, _progress: Progress) -> "ImageDataset":
        if options.image_size is not None:
            raise ConfigError(f"--image-size is for picture files: {name} has images of one size")
        return load_images(seed)

    return load_source


def _published(name: str) -> Source:
    def load_source(seed: int, options: DataOptions, progress: Progress) -> "ImageDataset":
        from trainer.data.published import load as load_published

        return load_published(name, seed=seed, options=options, progress=progress)

    return load_source


SOURCES: dict[str, Source] = {
    "digits": _of_one_size("digits", _load_digits),
    "fashion-mnist": _of_one_size("fashion-mnist", _load_fashion_mnist),
    "cifar10": _of_one_size("cifar10", _load_cifar10),
    **{name: _published(name) for name in PUBLISHED},
}
