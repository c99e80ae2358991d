"""A folder that appears whole or not at all, even if its maker is killed. No torch in here."""

import ctypes
import errno
import fcntl
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from trainer.config import ConfigError
from trainer.reading import is_utf8, read_small

MADE_BY = "hpo"
"""Stands in the manifest of each export: only such a folder is ever replaced."""

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


def check_out(out: Path) -> None:
    """See to it that an export can be written to this folder, before anything is trained for it.

    Makes the folders above it. Raises ConfigError if the folder holds anything but an older export
    of ours, can't be written, or has a name that is no UTF-8: torch, ONNX Runtime and safetensors
    open no file below such a folder.
    """
    with _in_one_line(out):
        target = _target(out)
        if not is_utf8(target):
            raise ConfigError(
                f"the export folder {out} can't be used: the libraries that write models take no "
                f"path with bytes that aren't UTF-8 ({target}): give another --out"
            )
        _refuse_foreign(target)
        target.parent.mkdir(parents=True, exist_ok=True)
        probe = _beside(target, "partial")
        probe.mkdir()
        probe.rmdir()


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """An empty folder to fill, which becomes `out` in one step when the block ends.

    Until then it lies beside it as .NAME.partial-*; an older export stays where it is. When the
    block raises, it is removed; what a killed process has left is removed by the next call.
    Raises ConfigError as check_out does, and if the disk refuses what the block writes.
    """
    check_out(out)
    target = _target(out)
    with _in_one_line(out):
        _remove_leftovers(target)
        partial, lock = _make_partial(target)
        try:
            yield partial
            _sync(partial)
            _refuse_foreign(target)
            _publish(partial, target)
        finally:
            # Either it failed, or the older export is here now.
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


def check_room(out: Path, num_bytes: int) -> None:
    """Raises ConfigError if the disk that the folder is to be on has less room."""
    with _in_one_line(out):
        free = shutil.disk_usage(_target(out).parent).free
    if free < num_bytes:
        raise ConfigError(
            f"the export folder {out} needs about {num_bytes / 2**20:,.0f} MiB, and its disk has "
            f"{free / 2**20:,.0f} MiB left: free as much, or give another --out"
        )


@contextmanager
def scratch_folder(out: Path) -> Iterator[Path]:
    """A folder where new_folder would make its own, which is removed when the block ends.

    Raises ConfigError as new_folder does.
    """
    check_out(out)
    with _in_one_line(out):
        partial, lock = _make_partial(_target(out))
        try:
            yield partial
        finally:
            shutil.rmtree(partial, ignore_errors=True)
            os.close(lock)


def _target(out: Path) -> Path:
    return Path(os.path.realpath(out))


def _beside(target: Path, kind: str) -> Path:
    return target.with_name(f".{target.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


@contextmanager
def _in_one_line(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(f"the export folder {out} can't be written: {reason}") from error
    except ValueError as error:
        if isinstance(error, ConfigError) or "null byte" not in str(error):
            raise
        raise ConfigError(f"the export folder {str(out)!r} can't be written: {error}") from error


def _refuse_foreign(target: Path) -> None:
    """Raises ConfigError unless the folder is absent, empty, or an older export of ours."""
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise ConfigError(f"{target} is a file: name a folder for the export")
    if os.path.ismount(target):
        raise ConfigError(f"{target} is where a disk is mounted: name a folder inside it")
    if any(target.iterdir()) and not _is_ours(target):
        raise ConfigError(
            f"{target} isn't empty and is no older export: name another folder for the export"
        )


def _is_ours(folder: Path) -> bool:
    try:
        manifest = json.loads(read_small(folder / "manifest.json"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(manifest, dict) and manifest.get("made_by") == MADE_BY


def _make_partial(target: Path) -> tuple[Path, int]:
    """A new folder beside the target, and the descriptor that locks it while this process lives.

    A lock and not the process's number says who lives: containers that share a disk have numbers
    of their own.
    """
    while True:
        partial = _beside(target, "partial")
        partial.mkdir()
        try:
            lock = os.open(partial, os.O_RDONLY)
        except FileNotFoundError:  # another process took it for a leftover
            continue
        if _lock(lock) and partial.exists():
            return partial, lock
        os.close(lock)


def _lock(descriptor: int, *, without_locks: bool = True) -> bool:
    """Whether the lock is ours now. without_locks: the answer on a disk that has none."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        return without_locks and error.errno not in (errno.EAGAIN, errno.EACCES)
    return True


def _remove_leftovers(target: Path) -> None:
    """Put away what killed processes have left beside the target."""
    for path in sorted(target.parent.iterdir()):
        if path.name.startswith(f".{target.name}.old-"):
            if not target.exists():
                path.rename(target)
            shutil.rmtree(path, ignore_errors=True)
        elif path.name.startswith(f".{target.name}.partial-"):
            _remove_if_dead(path)


def _remove_if_dead(partial: Path) -> None:
    try:
        lock = os.open(partial, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError:
        return
    try:
        if _lock(lock, without_locks=False):
            shutil.rmtree(partial, ignore_errors=True)
    finally:
        os.close(lock)


def _sync(folder: Path) -> None:
    """Have all that is in the folder, and its list of names, on the disk."""
    for path in [*folder.rglob("*"), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def _publish(partial: Path, target: Path) -> None:
    """Give the folder its name. An older export is at the other's name then."""
    if not target.exists() or not any(target.iterdir()):
        partial.rename(target)
    elif not _exchange(partial, target):
        old = _beside(target, "old")
        target.rename(old)
        partial.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    parent = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step, by Linux's renameat2. False where there is no such thing.

    Elsewhere two renames do it, between which neither folder has the name: _remove_leftovers puts
    the older one back if the process is killed just there.
    """
    renameat2 = getattr(ctypes.CDLL(None), "renameat2", None)
    if renameat2 is None:
        return False
    paths = os.fsencode(one), os.fsencode(other)
    return bool(renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0)
