"""Picture files read in parallel, by processes of their own. Imports without torch."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from trainer.config import DataError
from trainer.cores import num_cores
from trainer.data.findings import one_line
from trainer.data.pictures import decode_picture, read_header
from trainer.data.similarity import perceptual_hash, small_thumbnail

_FEW_BYTES = 2**26
"""Of picture files, up to which starting processes takes longer than it saves."""
_CHUNK = 16
"""Pictures that a process gets at once."""

Item = TypeVar("Item")
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Header:
    """What a picture's header says; reason: why it can't be read, else None."""

    shorter_side: int = 0
    is_gray: bool = False
    reason: str | None = None


@dataclass(frozen=True)
class Task:
    """A picture to decode, and where its pixels are to be written."""

    path: Path
    input_size: tuple[int, int, int]
    rows: Path | None = None
    """A file of rows, each as long as a picture's pixels; None if nobody wants them."""
    row: int = 0


@dataclass(frozen=True)
class Look:
    """What a decoded picture is; reason: why it can't be decoded, else None."""

    sha256: str = ""
    hash: int = 0
    thumbnail: bytes = b""
    reason: str | None = None


def look_at_header(path: Path) -> Header:
    """Of a picture file, broken or not."""
    try:
        header = read_header(path)
    except DataError as error:
        return Header(reason=_reason(error, path))
    return Header(header.shorter_side, header.is_gray)


def decode(task: Task) -> Look:
    """Decode a picture file, broken or not; its pixels go to their place."""
    try:
        picture = decode_picture(task.path, input_size=task.input_size)
    except (DataError, OSError) as error:
        return Look(reason=_reason(error, task.path))
    if task.rows is not None:
        with task.rows.open("r+b") as file:
            file.seek(task.row * picture.pixels.nbytes)
            file.write(picture.pixels.data)
    return Look(
        picture.sha256, perceptual_hash(picture.thumbnail), small_thumbnail(picture.thumbnail)
    )


class Decoders:
    """As many processes as this one may use cores, started when they are worth it."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def map(
        self,
        function: Callable[[Item], Answer],
        items: Sequence[Item],
        *,
        num_bytes: int,
        progress: Callable[[int, int], None],
    ) -> Iterator[Answer]:
        """The function's answers, in the items' order. num_bytes: of all those files together.

        Raises DataError if a process dies.
        """
        pool = self._started(num_bytes)
        answers = (
            map(function, items) if pool is None else pool.map(function, items, chunksize=_CHUNK)
        )
        try:
            for number, answer in enumerate(answers, 1):
                yield answer
                progress(number, len(items))
        except BrokenProcessPool as error:
            raise DataError(
                "a process that decodes pictures died, out of memory or killed: try again"
            ) from error

    def close(self) -> None:
        """End the processes; what they haven't begun is not done."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

    def _started(self, num_bytes: int) -> ProcessPoolExecutor | None:
        num_processes = num_cores()
        if num_processes == 1 or (self._pool is None and num_bytes < _FEW_BYTES):
            return None
        if self._pool is None:
            # spawned: a forked process would hold the locks of this one
            self._pool = ProcessPoolExecutor(
                num_processes, multiprocessing.get_context("spawn"), initializer=_begin
            )
        return self._pool


@contextmanager
def decoders() -> Iterator[Decoders]:
    """Decoders for a while."""
    made = Decoders()
    try:
        yield made
    finally:
        made.close()


def _begin() -> None:
    """In each process: Ctrl-C is its parent's business, and it doesn't outlive that."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None

    def leave_with_parent() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=leave_with_parent, daemon=True).start()


def _reason(error: Exception, path: Path) -> str:
    """The message without the path, which stands beside it."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    return (
        str(error).removeprefix(f"{one_line(path)}: ").removeprefix("can't be read as a picture: ")
    )
