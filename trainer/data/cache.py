"""Folders that are made once and shared: whole or absent, bounded in size. Imports without torch.

A folder is locked by its own file descriptor (flock), which the kernel closes however a process
ends: there are no lock files, and nobody has to tidy up after the dead. Who makes a folder locks
the partial one, who uses a folder shares its lock, and who needs room takes only what nobody
holds.
"""

import contextlib
import errno
import fcntl
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.config import DataError
from trainer.data.roots import cache_bytes, cache_root

_PARTIAL, _GONE = ".partial-", ".gone-"
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Held:
    """A whole folder that stays as long as its lock, a file descriptor, is open."""

    path: Path
    lock: int

    def let_go(self) -> None:
        """Once and no more."""
        os.close(self.lock)


def _always(_folder: Path) -> bool:
    return True


def held_folder(
    name: str,
    build: Callable[[Path], None],
    *,
    num_bytes: int,
    is_whole: Callable[[Path], bool] = _always,
) -> Held:
    """The folder of this name in the cache, built if it isn't there.

    build: fills an empty folder; one process does, others wait for it, and go on from the
    beginning if it dies. num_bytes: what it will take, about. is_whole: whether what is there is
    what was built; what a failing disk has changed is built anew. Raises DataError if the cache
    can't be written.
    """
    root = _root()
    path = root / name
    while True:
        held = found_folder(name, is_whole)
        if held is not None:
            return held
        with locked_folder(root / (_PARTIAL + name)) as partial:
            if path.is_dir():
                partial.rmdir()
                continue
            _empty(partial)
            try:
                make_room(num_bytes)
                build(partial)
            except BaseException:
                shutil.rmtree(partial, ignore_errors=True)
                raise
            partial.rename(path)


def found_folder(name: str, is_whole: Callable[[Path], bool] = _always) -> Held | None:
    """The folder of this name in the cache if it is there and whole; a broken one is removed.

    Processes that have files of a broken one mapped keep them. Raises DataError if the cache can't
    be written.
    """
    path = _root() / name
    held = _hold(path)
    if held is None:
        return None
    if is_whole(path):
        os.utime(path)
        return held
    _log.warning("%s in the cache is not whole: it is made anew", name)
    gone = path.with_name(_GONE + secrets.token_hex(8))
    with contextlib.suppress(FileNotFoundError):  # another process was faster
        if _is_at(path, held.lock):
            path.rename(gone)
    held.let_go()
    shutil.rmtree(gone, ignore_errors=True)
    return None


def kept_folder(name: str) -> Path:
    """The folder of this name in the cache, made if it isn't there."""
    path = _root() / name
    _make(path)
    os.utime(path)
    return path


@contextlib.contextmanager
def full_disks_told() -> Iterator[None]:
    """A disk that is full while the cache is written to becomes a DataError with the way out."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise DataError(
            f"the disk of the cache {cache_root()} is full: make room there, or set HPO_HOME to "
            "a folder on another disk"
        ) from error


@contextlib.contextmanager
def locked_folder(path: Path) -> Iterator[Path]:
    """The folder, made if need be, with nobody else in it. Waits for whoever is."""
    while True:
        _make(path)
        lock = _open(path)
        if lock is None:
            continue
        _lock(lock, fcntl.LOCK_EX)
        if _is_at(path, lock):
            break
        os.close(lock)
    try:
        yield path
    finally:
        os.close(lock)


def make_room(num_bytes: int) -> None:
    """Remove what nobody holds, what was used longest ago first, until so much fits."""
    limit = cache_bytes() - num_bytes
    entries = sorted(_entries(_root()), key=lambda entry: entry.rank)
    total = sum(entry.num_bytes for entry in entries)
    for entry in entries:
        if (entry.is_waste or total > limit) and _remove(entry.path):
            total -= entry.num_bytes


@dataclass(frozen=True)
class _Entry:
    path: Path
    num_bytes: int
    used_at: float

    @property
    def is_waste(self) -> bool:
        """Whether it is what a killed process left."""
        return self.path.name.startswith((_PARTIAL, _GONE))

    @property
    def rank(self) -> tuple[bool, float]:
        return not self.is_waste, self.used_at


def _entries(root: Path) -> Iterator[_Entry]:
    for path in root.iterdir():
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            num_bytes = sum(file.stat().st_size for file in os.scandir(path))
            yield _Entry(path, num_bytes, path.stat().st_mtime)


def _remove(path: Path) -> bool:
    """Whether nobody held it."""
    lock = _open(path)
    if lock is None:
        return True
    try:
        if not _lock_now(lock, fcntl.LOCK_EX) or not _is_at(path, lock):
            return False
        gone = path.with_name(_GONE + secrets.token_hex(8))
        path.rename(gone)
        shutil.rmtree(gone, ignore_errors=True)
        return True
    finally:
        os.close(lock)


def _hold(path: Path) -> Held | None:
    lock = _open(path)
    if lock is None:
        return None
    _lock(lock, fcntl.LOCK_SH)
    if _is_at(path, lock):
        return Held(path, lock)
    os.close(lock)
    return None


def _open(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except FileNotFoundError:
        return None


def _lock(lock: int, operation: int) -> None:
    """Waits for whoever holds the lock, and logs who that is."""
    if not _lock_now(lock, operation):
        _log.warning("another process reads these pictures: waiting for it%s", _holder(lock))
        fcntl.flock(lock, operation)


def _holder(lock: int) -> str:
    """The number of the process that holds a lock on this folder, where the kernel shows it."""
    there = os.fstat(lock)
    inode = f"{os.major(there.st_dev):02x}:{os.minor(there.st_dev):02x}:{there.st_ino}"
    with contextlib.suppress(OSError):
        for line in Path("/proc/locks").read_text().splitlines():
            # "1: FLOCK  ADVISORY  WRITE 4711 08:01:1234 0 EOF"; 0: in another container
            words = line.split()
            if words[1] == "FLOCK" and words[5] == inode and words[4] != "0":
                return f" (process {words[4]})"
    return ""


def _lock_now(lock: int, operation: int) -> bool:
    try:
        fcntl.flock(lock, operation | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(path: Path, lock: int) -> bool:
    """Whether the folder of this file descriptor is still the one of that path."""
    try:
        there = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(lock))


def _empty(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def _make(folder: Path) -> None:
    """Make the folder and those above it; root makes them for the owner of what was there."""
    if folder.is_dir():
        return
    _make(folder.parent)
    folder.mkdir(exist_ok=True)
    owner = folder.parent.stat()
    if os.geteuid() == 0 and owner.st_uid != 0:
        os.chown(folder, owner.st_uid, owner.st_gid, follow_symlinks=False)


def _root() -> Path:
    root = cache_root()
    try:
        _make(root)
        found = root.stat()
        # a lock on a folder that others can open would be theirs to hold
        if os.geteuid() in (0, found.st_uid) and found.st_mode & 0o077:
            root.chmod(0o700)
    except OSError as error:
        raise DataError(
            f"the cache {root} can't be made ({error.strerror}): set HPO_HOME to a folder that "
            "can be written"
        ) from error
    return root
