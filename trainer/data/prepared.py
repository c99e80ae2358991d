"""What reading a data set came to, kept in the cache for the processes that follow.

A process that knows a study's fingerprint maps the images, and neither lists nor reads the source,
nor runs a DataModule's code. The fingerprint is a digest of the content, so what was kept under it
is what the study was made with, whatever became of the source since.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from trainer.data.cache import Held, found_folder, full_disks_told, held_folder
from trainer.data.dataset import ImageDataset, Split
from trainer.data.mapped import are_whole, map_images, note_whole, write_whole
from trainer.data.options import DataOptions
from trainer.data.splits import make_dataset

_FORMAT = 1
"""Of these files: another number, another place."""
_ABOUT, _NUMBERS, IMAGES = "about.json", "numbers", "images"


@dataclass(frozen=True, kw_only=True)
class Known:
    """By what a data set that was read before is found."""

    source: str
    fingerprint: str
    seed: int
    options: DataOptions

    @property
    def folder(self) -> str:
        """Its name in the cache."""
        options = dataclasses.replace(self.options, max_memory_bytes=None).to_dict()
        about = json.dumps([_FORMAT, self.source, self.fingerprint, self.seed, options])
        return f"set-{hashlib.sha256(about.encode(errors='surrogateescape')).hexdigest()[:32]}"


def open_prepared(known: Known, open_test: Callable[[], Split]) -> ImageDataset | None:
    """The data set as an earlier process has read it; None if the cache holds no whole one.

    Its findings are empty: they are told where the source is looked at.
    """
    held = found_folder(known.folder, _is_whole)
    if held is None:
        return None
    try:
        about = json.loads((held.path / _ABOUT).read_bytes())
        numbers = torch.from_numpy(np.fromfile(held.path / _NUMBERS, "<i8").astype(np.int64))
    finally:
        held.let_go()
    images_held = found_folder(about["images"], lambda folder: are_whole(folder / IMAGES))
    if images_held is None:
        return None
    return _assembled(about, numbers, images_held, known, open_test)


def _assembled(
    about: dict[str, Any],
    numbers: torch.Tensor,
    held: Held,
    known: Known,
    open_test: Callable[[], Split],
) -> ImageDataset:
    num_train, (num_images, *size) = about["num_train"], about["shape"]
    shape = (num_images, size[0], size[1], size[2])
    memory = known.options.max_memory_bytes
    images = map_images(held, IMAGES, shape, max_memory_bytes=memory)
    labels, groups = numbers[:num_images], numbers[num_images:]
    data = make_dataset(
        name=about["name"],
        training=Split(images[:num_train], labels[:num_train]),
        val=Split(images[num_train:], labels[num_train:]),
        class_names=tuple(about["class_names"]),
        fingerprint=known.fingerprint,
        flips=about["flips"],
        open_test=open_test,
        seed=known.seed,
        statistics=(tuple(about["mean"]), tuple(about["std"])),
    )
    return dataclasses.replace(
        data, groups=groups if len(groups) else None, kept_in=about["images"]
    )


def prepare(known: Known, read: Callable[[], ImageDataset]) -> ImageDataset | None:
    """Read a data set that no process has read yet, and keep it; None if another one did meanwhile.

    One process reads, and others that want the same wait for it. What is read and has another
    fingerprint is returned and not kept.
    """
    found: list[ImageDataset] = []

    def build(folder: Path) -> None:
        found.append(read())
        if found[0].fingerprint != known.fingerprint:
            raise _Other
        _write(folder, found[0])

    try:
        with full_disks_told():
            held_folder(known.folder, build, num_bytes=0, is_whole=_is_whole).let_go()
    except _Other:
        pass
    return found[0] if found else None


class _Other(Exception):
    """The source is not what it was."""


def keep_prepared(known: Known, data: ImageDataset) -> None:
    """Keep a data set that was read for processes that follow, if its images lie in the cache."""
    if data.kept_in is not None:
        with full_disks_told():
            held_folder(
                known.folder,
                lambda folder: _write(folder, data),
                num_bytes=0,
                is_whole=_is_whole,
            ).let_go()


def in_cache(data: ImageDataset, options: DataOptions) -> ImageDataset:
    """The same data set with its images of train and val in one mapped file of the cache."""
    parts = [split.images.contiguous().numpy() for split in (data.train, data.val)]
    num_train, num_images = len(data.train), len(data.train) + len(data.val)
    shape = (num_images, *data.input_size)
    digest = hashlib.sha256(json.dumps([_FORMAT, shape]).encode())
    for pixels in parts:
        digest.update(pixels.data)

    def build(folder: Path) -> None:
        path = folder / IMAGES
        write_whole(path, sum(pixels.nbytes for pixels in parts))
        with path.open("r+b") as file:
            for pixels in parts:
                file.write(pixels.data)
            file.flush()
            os.fsync(file.fileno())
        note_whole(path)

    name = f"images-{digest.hexdigest()[:32]}"
    with full_disks_told():
        held = held_folder(
            name,
            build,
            num_bytes=sum(pixels.nbytes for pixels in parts),
            is_whole=lambda folder: are_whole(folder / IMAGES),
        )
    images = map_images(held, IMAGES, shape, max_memory_bytes=options.max_memory_bytes)
    return dataclasses.replace(
        data,
        train=Split(images[:num_train], data.train.labels),
        val=Split(images[num_train:], data.val.labels),
        kept_in=name,
    )


def _write(folder: Path, data: ImageDataset) -> None:
    numbers = torch.cat([data.train.labels, data.val.labels])
    if data.groups is not None:
        numbers = torch.cat([numbers, data.groups])
    content = numbers.numpy().astype("<i8").tobytes()
    about = {
        "name": data.name,
        "fingerprint": data.fingerprint,
        "images": data.kept_in,
        "shape": [len(data.train) + len(data.val), *data.input_size],
        "num_train": len(data.train),
        "class_names": data.class_names,
        "mean": data.mean,
        "std": data.std,
        "flips": data.flips,
    }
    about["digest"] = _digest(about, content)
    (folder / _NUMBERS).write_bytes(content)
    (folder / _ABOUT).write_text(json.dumps(about), encoding="utf-8")


def _is_whole(folder: Path) -> bool:
    """Whether these are the bytes that were written, and the images are there."""
    try:
        about = json.loads((folder / _ABOUT).read_bytes())
        digest = about.pop("digest")
        if digest != _digest(about, (folder / _NUMBERS).read_bytes()):
            return False
        return are_whole(folder.parent / about["images"] / IMAGES)
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


def _digest(about: dict[str, Any], numbers: bytes) -> str:
    words = json.dumps(about, sort_keys=True).encode()
    return hashlib.sha256(words + b"\0" + numbers).hexdigest()
