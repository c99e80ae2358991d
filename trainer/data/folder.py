"""A folder of pictures: one sub-folder a class, or train/[val/]test above such sub-folders."""

import logging
import os
from collections.abc import Sequence
from pathlib import Path

from trainer.config import DataError, unknown_name
from trainer.data.findings import one_line
from trainer.data.listing import PARTS, Listing, Picture, label_of
from trainer.data.pictures import SUFFIXES

_log = logging.getLogger(__name__)


def list_folder(folder: Path) -> Listing:
    """The pictures below a folder. Raises DataError if there are none, or no two classes."""
    if not os.path.isdir(folder):  # unlike Path's, it is calm about names that can't be
        raise DataError(f"{folder}: no such folder")
    parts = _find_parts(folder)
    class_names = tuple(path.name for path in _folders(parts["train"]))
    if not class_names:
        raise DataError(
            f"{parts['train']}: no sub-folders, one a class with its pictures is needed"
        )
    pictures = {part: _list_pictures(path, class_names) for part, path in parts.items()}
    return Listing(source=str(folder), class_names=class_names, parts=pictures)


def _find_parts(folder: Path) -> dict[str, Path]:
    """Where the parts of the data lie: train alone is the folder itself."""
    folders = _folders(folder)
    names = [path.name for path in folders]
    if "train" not in names or not _folders(folder / "train"):
        return {"train": folder}
    for name in names:
        if name not in PARTS:
            raise DataError(f"{folder}: {unknown_name('folder beside train', name, PARTS)}")
    return {path.name: path for path in folders}


def _folders(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))


def _list_pictures(folder: Path, class_names: Sequence[str]) -> list[Picture]:
    pictures = []
    for class_folder in _folders(folder):
        label = label_of(class_folder.name, class_names, str(folder))
        pictures += [Picture(path, label) for path in _picture_files(class_folder)]
    if not pictures:
        raise DataError(f"{one_line(folder)}: no sub-folders with pictures")
    return pictures


def _picture_files(class_folder: Path) -> list[Path]:
    if below := _folders(class_folder):
        raise DataError(
            f"{one_line(below[0])}: a class's pictures must lie in its folder, not deeper"
        )
    files = sorted(p for p in class_folder.iterdir() if not p.name.startswith(".") and p.is_file())
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES]
    if not pictures:
        raise DataError(f"{one_line(class_folder)}: no pictures ({', '.join(sorted(SUFFIXES))})")
    if len(pictures) < len(files):
        others = sorted({path.suffix.lower() or path.name for path in files} - SUFFIXES)
        num_others = len(files) - len(pictures)
        _log.warning(
            "%s: %d files passed over (%s)", one_line(class_folder), num_others, ", ".join(others)
        )
    return pictures
