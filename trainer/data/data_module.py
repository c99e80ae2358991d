"""A LightningDataModule of the user's own as a data set: its items, read and kept as bytes."""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from trainer.config import ConfigError, DataError
from trainer.data.dataset import ImageDataset, Split, fingerprint
from trainer.data.options import DataOptions, Progress
from trainer.data.prepared import in_cache
from trainer.data.roots import data_root
from trainer.data.splits import draw_test, make_dataset
from trainer.foreign import one_line
from trainer.modules import find_class

_READ_TWICE = 3
"""Items that are looked at twice, to see whether they stay the same."""
_GRAY_MODES = ("1", "L")


def load(source: str, *, seed: int, options: DataOptions, progress: Progress) -> ImageDataset:
    """The data of lightning:package.module:Class, which is made without arguments.

    One that takes data_dir is given the place where data sets lie. What it says of batches (size,
    order, workers, collate_fn) is not looked at: the items of its loaders' data sets are read by
    index. Without a val_dataloader the validation split is drawn by the seed, without a
    test_dataloader the test split by the fingerprint. Raises DataError, or ConfigError for an
    option that it can't heed.
    """
    if options.image_size is not None:
        raise ConfigError(f"--image-size is for picture files: {source} is to Resize itself")
    with contextlib.redirect_stdout(sys.stderr):  # stdout belongs to results
        own = _Own(source)
        own.call("prepare_data")
        own.call("setup", "fit")
        train_set = own.data_set("train_dataloader")
        train = _read(source, "train", train_set, progress)
        val = None
        if own.has("val_dataloader"):
            val = _read(source, "val", own.data_set("val_dataloader"), progress)
    known = train if val is None else _joined(source, train, val)
    class_names = _class_names(source, train_set, known.labels)
    identity = fingerprint(known, class_names)

    def open_test() -> Split:
        with contextlib.redirect_stdout(sys.stderr):
            own.call("setup", "test")
            return _read(source, "test", own.data_set("test_dataloader"), progress)

    if not own.has("test_dataloader"):
        rest, drawn = draw_test(train.labels, identity)
        train, test = train.take(rest), train.take(drawn)
        open_test = lambda: test  # noqa: E731
    data = make_dataset(
        name=source.rpartition(":")[2],
        training=train,
        val=val,
        class_names=class_names,
        fingerprint=identity,
        flips=True,
        open_test=open_test,
        seed=seed,
    )
    return in_cache(data, options)


def read_test(source: str, *, fingerprint: str, options: DataOptions, progress: Progress) -> Split:
    """The test split of a module whose other items an earlier process has read.

    Where the module has no test_dataloader, all items are read again, since it is drawn from them.
    Raises DataError, also if those are others than the fingerprint's.
    """
    with contextlib.redirect_stdout(sys.stderr):
        own = _Own(source)
        own.call("prepare_data")
        own.call("setup", "fit")
        if own.has("test_dataloader"):
            own.call("setup", "test")
            return _read(source, "test", own.data_set("test_dataloader"), progress)
    data = load(source, seed=0, options=options, progress=progress)
    if data.fingerprint != fingerprint:
        raise DataError(f"data {source}: its items have changed since they were first read")
    return data.open_test()


class _Own:
    """The user's DataModule; what its code raises is a DataError."""

    def __init__(self, source: str) -> None:
        self._source = source
        try:
            found = find_class("data", source, "LightningDataModule")
        except ConfigError as error:
            raise DataError(str(error)) from error
        takes = inspect.signature(found).parameters
        given = {"data_dir": str(data_root())} if "data_dir" in takes else {}
        self._module = self._try(lambda: found(**given), found.__name__)

    def has(self, loader: str) -> bool:
        """Whether it is its own, not Lightning's that raises."""
        where = inspect.getmodule(getattr(type(self._module), loader))
        package = "" if where is None else where.__name__.partition(".")[0]
        return package not in ("lightning", "pytorch_lightning")

    def call(self, hook: str, *arguments: Any) -> Any:
        """What it returns."""
        return self._try(lambda: getattr(self._module, hook)(*arguments), hook)

    def data_set(self, loader: str) -> Any:
        """The one whose items the loader would give."""
        found = getattr(self.call(loader), "dataset", None)
        if not hasattr(found, "__getitem__") or not hasattr(found, "__len__"):
            raise DataError(
                f"data {self._source}: {loader} must give one DataLoader, of a data set with "
                "a length and items by index"
            )
        return found

    def _try(self, work: Callable[[], Any], what: str) -> Any:
        try:
            return work()
        except Exception as error:  # whatever the user's code leads to
            raise DataError(f"data {self._source}: {what}: {one_line(error)}") from error


def _read(source: str, part: str, items: Any, progress: Progress) -> Split:
    """All items as bytes. Raises DataError for one that is no image with a label."""
    where, number = f"data {source}: {part}", len(items)
    for index in range(min(_READ_TWICE, number)):
        once, again = (_pixels(where, index, _item(where, items, index)[0]) for _ in range(2))
        if once.shape != again.shape or not torch.equal(once, again):
            raise DataError(
                f"{where}: item {index} is another image each time: leave random transforms out, "
                "hpo's fields flip, translate, rotation, policy, ... do that while it trains"
            )
    images: Tensor | None = None
    labels = torch.empty(number, dtype=torch.int64)
    for index in range(number):
        image, label = _item(where, items, index)
        pixels = _pixels(where, index, image)
        if images is None:
            images = torch.empty((number, *pixels.shape), dtype=torch.uint8)
        if pixels.shape != images.shape[1:]:
            raise DataError(
                f"{where}: item {index} is {_size(pixels)}, others are {_size(images[0])}: "
                "Resize and convert them to one size and number of channels"
            )
        images[index], labels[index] = pixels, label
        progress("images", index + 1, number)
    if images is None:
        raise DataError(f"{where}: no images")
    return Split(images, labels)


def _item(where: str, items: Any, index: int) -> tuple[Any, int]:
    try:
        image, label = items[index]
        return image, int(label)
    except Exception as error:  # whatever the user's code leads to
        raise DataError(f"{where}: item {index} is no (image, label): {one_line(error)}") from error


def _pixels(where: str, index: int, image: Any) -> Tensor:
    """uint8 (C,H,W). Raises DataError."""
    if isinstance(image, Image.Image):
        image = image.convert("L" if image.mode in _GRAY_MODES else "RGB")
        pixels = np.array(image, dtype=np.uint8)
        return torch.from_numpy(pixels).view(image.height, image.width, -1).permute(2, 0, 1)
    if not isinstance(image, Tensor) or image.ndim != 3:
        shape = f"{tuple(image.shape)} " if isinstance(image, Tensor) else ""
        raise DataError(
            f"{where}: item {index} is a {shape}{type(image).__name__}, not a PIL image or a "
            "tensor (C,H,W)"
        )
    if image.dtype == torch.uint8:
        return image
    low, high = float(image.min()), float(image.max())
    if not image.is_floating_point() or not 0 <= low <= high <= 1:
        raise DataError(
            f"{where}: item {index} has values from {low:g} to {high:g}, not uint8 or within 0 to "
            "1: leave Normalize out, hpo measures mean and std itself and puts them into the export"
        )
    return (image * 255).round().to(torch.uint8)


def _joined(source: str, train: Split, val: Split) -> Split:
    if val.images.shape[1:] != train.images.shape[1:]:
        raise DataError(
            f"data {source}: images of train are {_size(train.images[0])}, those of val "
            f"{_size(val.images[0])}: Resize them to one size"
        )
    return Split(torch.cat([train.images, val.images]), torch.cat([train.labels, val.labels]))


def _size(image: Tensor) -> str:
    return "x".join(map(str, image.shape))


def _class_names(source: str, items: Any, labels: Tensor) -> tuple[str, ...]:
    """Those that the data set, or the one that it is a part of, has; else numbers."""
    if int(labels.min()) < 0:
        raise DataError(f"data {source}: labels must be 0 or more, got {int(labels.min())}")
    for each in _inner(items):
        names: Sequence[Any] | None = getattr(each, "classes", None)
        if names is not None and len(names) > int(labels.max()):
            return tuple(map(str, names))
    return tuple(map(str, range(int(labels.max()) + 1)))


def _inner(items: Any) -> Iterator[Any]:
    while items is not None:
        yield items
        items = getattr(items, "dataset", None)
