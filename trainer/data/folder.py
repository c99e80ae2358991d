"""A folder of pictures: one sub-folder a class, or train/[val/]test above such sub-folders."""

import hashlib
import json
import logging
import os
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from trainer.config import DataError, unknown_name
from trainer.data.dataset import ImageDataset, Split
from trainer.data.pictures import SUFFIXES, read_header, read_picture
from trainer.data.splits import draw_test, make_dataset

_PARTS = ("train", "val", "test")
_SMALLEST_SIDE, _LARGEST_SIDE = 32, 224
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Picture:
    path: Path
    label: int


def load(folder: Path, *, name: str, seed: int) -> ImageDataset:
    """The pictures below a folder, as squares of one size.

    The side is the median of the shorter sides outside the test split, in 32..224 pixels; there
    is one channel if all those pictures are gray, else three. The fingerprint is that of the
    files' bytes, labels and class names: neither file names nor a decoder's version change it.
    Of a test folder only the headers are read before open_test is called.
    Raises DataError if there are no pictures, no two classes, or a picture that can't be read.
    """
    if not os.path.isdir(folder):  # unlike Path's, it is calm about names that can't be
        raise DataError(f"{folder}: no such folder")
    parts = _find_parts(folder)
    class_names = _class_names(parts["train"])
    pictures = {part: _list_pictures(path, class_names) for part, path in parts.items()}
    test = pictures.pop("test", [])
    identity, pictures = _identify(pictures, class_names)
    if not test:
        labels = torch.tensor([picture.label for picture in pictures["train"]])
        rest, drawn = draw_test(labels, identity)
        test = _take(pictures["train"], drawn)
        pictures["train"] = _take(pictures["train"], rest)
        if not test:
            raise DataError(f"{folder}: too few pictures for a test split ({len(labels)})")
    input_size = _input_size([picture for part in pictures.values() for picture in part])
    for picture in test:
        read_header(picture.path)
    val = pictures.get("val")
    return make_dataset(
        name=name,
        training=_decode(pictures["train"], input_size),
        val=_decode(val, input_size) if val else None,
        class_names=class_names,
        fingerprint=identity,
        flips=True,
        open_test=lambda: _decode(test, input_size),
        seed=seed,
    )


def _find_parts(folder: Path) -> dict[str, Path]:
    """Where the parts of the data lie: train alone is the folder itself."""
    folders = _folders(folder)
    names = [path.name for path in folders]
    if "train" not in names or not _folders(folder / "train"):
        return {"train": folder}
    for name in names:
        if name not in _PARTS:
            raise DataError(f"{folder}: {unknown_name('folder beside train', name, _PARTS)}")
    return {path.name: path for path in folders}


def _class_names(folder: Path) -> tuple[str, ...]:
    names = tuple(path.name for path in _folders(folder))
    if not names:
        raise DataError(f"{folder}: no sub-folders, one a class with its pictures is needed")
    if len(names) == 1:
        raise DataError(f"{folder}: one class only ({names[0]}), at least two are needed")
    return names


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _list_pictures(folder: Path, class_names: Sequence[str]) -> list[_Picture]:
    pictures = []
    for class_folder in _folders(folder):
        if class_folder.name not in class_names:
            raise DataError(f"{folder}: {unknown_name('class', class_folder.name, class_names)}")
        label = class_names.index(class_folder.name)
        pictures += [_Picture(path, label) for path in _picture_files(class_folder)]
    if not pictures:
        raise DataError(f"{folder}: no sub-folders with pictures")
    return pictures


def _picture_files(class_folder: Path) -> list[Path]:
    if below := _folders(class_folder):
        raise DataError(f"{below[0]}: a class's pictures must lie in its folder, not deeper")
    files = sorted(p for p in class_folder.iterdir() if not p.name.startswith(".") and p.is_file())
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not pictures:
        raise DataError(f"{class_folder}: no pictures ({', '.join(sorted(SUFFIXES))})")
    if len(pictures) < len(files):
        others = sorted({path.suffix.lower() or path.name for path in files} - SUFFIXES)
        num_others = len(files) - len(pictures)
        _log.warning("%s: %d files passed over (%s)", class_folder, num_others, ", ".join(others))
    return pictures


def _identify(
    parts: dict[str, list[_Picture]], class_names: Sequence[str]
) -> tuple[str, dict[str, list[_Picture]]]:
    """The fingerprint, and the pictures in an order that their labels and content decide."""
    digests = {
        picture: hashlib.sha256(picture.path.read_bytes()).hexdigest()
        for pictures in parts.values()
        for picture in pictures
    }
    ordered = {
        part: sorted(pictures, key=lambda p: (p.label, digests[p], p.path))
        for part, pictures in parts.items()
    }
    content = {part: [(p.label, digests[p]) for p in ordered[part]] for part in ordered}
    document = json.dumps([list(class_names), content], sort_keys=True)
    return hashlib.sha256(document.encode()).hexdigest(), ordered


def _take(pictures: Sequence[_Picture], indices: torch.Tensor) -> list[_Picture]:
    return [pictures[index] for index in indices.tolist()]


def _input_size(pictures: Sequence[_Picture]) -> tuple[int, int, int]:
    headers = [read_header(picture.path) for picture in pictures]
    median = statistics.median_low(header.shorter_side for header in headers)
    side = min(max(median, _SMALLEST_SIDE), _LARGEST_SIDE)
    channels = 1 if all(header.is_gray for header in headers) else 3
    return channels, side, side


def _decode(pictures: Sequence[_Picture], input_size: tuple[int, int, int]) -> Split:
    images = np.empty((len(pictures), *input_size), dtype=np.uint8)
    for image, picture in zip(images, pictures, strict=True):
        image[...] = read_picture(picture.path, input_size=input_size)
    labels = torch.tensor([picture.label for picture in pictures], dtype=torch.int64)
    return Split(torch.from_numpy(images), labels)
