"""Small files of other people's: never a pipe or a device, never without end. Imports no torch."""

import errno
import os
import stat
from pathlib import Path

LARGEST_TEXT_BYTES = 2**26
"""Of a manifest or a space file: a thousand times what is usual."""


def check_regular(path: Path) -> None:
    """Raises OSError if this is no file with an end: a folder, a pipe, a device, a socket."""
    _refuse_others(os.stat(path).st_mode, path)


def read_small(path: Path, most_bytes: int = LARGEST_TEXT_BYTES) -> bytes:
    """The file's content. Raises OSError as check_regular does, and if there is more of it."""
    # a pipe is opened without waiting for its other end
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        _refuse_others(os.fstat(descriptor).st_mode, path)
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise OSError(errno.EFBIG, f"it has more than {most_bytes:,} bytes", str(path))
    return content


def _refuse_others(mode: int, path: Path) -> None:
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is no regular file", str(path))


def is_utf8(path: Path) -> bool:
    """Whether all of the path's bytes are text, as libraries in C++ and Rust take a path to be."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        return False
    return True
