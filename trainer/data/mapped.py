"""Images in a file that is mapped into memory: read by many processes, held once by the kernel."""

import hashlib
import mmap
import os
import warnings
import weakref
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from trainer.data.cache import Held

_FAULT_BYTES = 2**16
"""What the kernel maps around a page that is touched (16 pages)."""


_NUM_BLOCKS, _BLOCK_BYTES = 64, 2**16
"""Of a file, by which it is known to be whole."""
_NOTE = ".whole"
"""What the name of that note ends with."""


class Residency:
    """How much of a mapping this process has in memory; above a limit it is let go of.

    The pages stay in the kernel's cache while there is room for them.
    """

    def __init__(self, mapping: mmap.mmap, limit_bytes: int) -> None:
        self._mapping, self._limit = mapping, limit_bytes // 2
        self._num_bytes = 0

    def touch(self, num_images: int, num_bytes: int) -> None:
        """Called when so much is about to be read, or was."""
        self._num_bytes += max(num_bytes, num_images * _FAULT_BYTES)
        if self._num_bytes > self._limit:
            self._mapping.madvise(mmap.MADV_DONTNEED)
            self._num_bytes = 0


class MappedImages(Tensor):
    """uint8 (N,C,H,W) in a mapped file, of which this process keeps only some in memory.

    A slice is another of these; anything else that is made of it is a tensor like any other.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]
    residency: Residency

    def index_select(self, dim: int, index: Tensor) -> Tensor:
        """As of any tensor: a copy of these images."""
        chosen = super().index_select(dim, index)
        self.residency.touch(len(index), chosen.nbytes)
        return chosen

    def __getitem__(self, key: Any) -> Tensor:
        found = super().__getitem__(key)
        self.residency.touch(len(found) if found.ndim == 4 else 1, found.nbytes)
        return as_mapped(found, self.residency) if isinstance(key, slice) else found

    def to(self, *args: Any, **kwargs: Any) -> Tensor:
        """As of any tensor: itself where nothing changes."""
        moved = super().to(*args, **kwargs)
        if moved is not self:
            self.residency.touch(0, self.nbytes)
        return moved


def as_mapped(images: Tensor, residency: Residency) -> MappedImages:
    """The same memory."""
    mapped = images.as_subclass(MappedImages)
    mapped.residency = residency
    return mapped


def map_images(
    held: Held, name: str, shape: tuple[int, int, int, int], *, max_memory_bytes: int | None
) -> Tensor:
    """The images of a file in a folder of the cache: uint8 (N,C,H,W), never to be written to.

    They hold the folder, and let it go with the last tensor that shows them.
    """
    with (held.path / name).open("rb") as file:
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    pixels = np.frombuffer(mapping, np.uint8).reshape(shape)
    weakref.finalize(pixels, held.let_go)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that it can't be written to
        images = torch.from_numpy(pixels)
    if max_memory_bytes is None or images.nbytes <= max_memory_bytes:
        return images
    return as_mapped(images, Residency(mapping, max_memory_bytes))


def write_whole(path: Path, num_bytes: int) -> None:
    """A file of so many bytes, for which there is room on the disk. Raises OSError."""
    with path.open("xb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, num_bytes)
        else:
            file.truncate(num_bytes)


def note_whole(path: Path) -> None:
    """Write down, beside a file that is whole, by what are_whole knows it again."""
    with path.open("rb") as file:
        path.with_name(path.name + _NOTE).write_text(_sampled(file), encoding="ascii")


def are_whole(path: Path) -> bool:
    """Whether a file is as it was when note_whole noted it, by its size and 64 blocks of it.

    A file of up to 4 MiB is compared as a whole. Of a larger one a few changed bytes go unnoticed,
    but not a part that was lost.
    """
    try:
        with path.open("rb") as file:
            return path.with_name(path.name + _NOTE).read_bytes() == _sampled(file).encode()
    except OSError:
        return False


def _sampled(file: BinaryIO) -> str:
    """Digest of the file's size and of blocks spread over it evenly, the first and the last too."""
    num_bytes = os.fstat(file.fileno()).st_size
    last = max(0, num_bytes - _BLOCK_BYTES)
    starts = sorted({last * index // (_NUM_BLOCKS - 1) for index in range(_NUM_BLOCKS)})
    digest = hashlib.sha256(str(num_bytes).encode())
    for start in starts:
        digest.update(os.pread(file.fileno(), _BLOCK_BYTES, start))
    return digest.hexdigest()


def join(first: Tensor, second: Tensor) -> Tensor:
    """Both, one after the other; without a copy where they lie so in memory. (N,C,H,W)."""
    together = (len(first) + len(second), *first.shape[1:])
    follows = (
        first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
        and first.is_contiguous()
        and second.is_contiguous()
        and second.storage_offset() == first.storage_offset() + first.numel()
    )
    if not follows:
        return torch.cat([first, second])
    whole = first.as_strided(together, first.stride(), first.storage_offset())
    return as_mapped(whole, first.residency) if isinstance(first, MappedImages) else whole
