"""Checkpoints of trials: atomic files, the newest valid one wins, old ones go.

    root/STUDY_KEY/TRIAL_NUMBER/TOKEN/STEP.ckpt

Names are integers alone. A folder belongs to the lease whose token it bears. Who takes a trial over
first makes a folder of its own, in one step, with links to the valid files of the newest folder
before; what the old attempt still writes is in a folder that nobody reads. Contents are bytes with
a checksum: storage knows nothing of what they mean. Symbolic links below the root are not followed.
"""

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from storage.errors import LeaseLost, StorageError
from storage.folders import make_folder
from storage.home import home

_MAGIC = b"hpo checkpoint 1\n"
_DIGEST_BYTES = 32
KEPT = 2
"""The newest, and the one before in case the newest is torn."""


class Checkpoints(Protocol):
    """The checkpoints of one attempt at a trial. OSError from any method: no place to keep them."""

    def take_over(self) -> bytes | None:
        """The newest valid checkpoint of the attempts before, which are cut off from here on.

        Raises LeaseLost if a later attempt has been here already.
        """

    def save(self, step: int, payload: bytes) -> None:
        """Keep the state at `step` and the one before it. Raises LeaseLost after a take-over."""

    def remove(self) -> None:
        """The trial has ended for good."""


def checkpoint_url() -> str | None:
    """HPO_CHECKPOINTS where it is an object store (s3://BUCKET/PREFIX), None where a folder.

    Raises StorageError for any other kind of store.
    """
    named = os.environ.get("HPO_CHECKPOINTS") or ""
    scheme, separator, _ = named.partition("://")
    if not separator or scheme == "file":
        return None
    if scheme != "s3":
        raise StorageError(
            f"HPO_CHECKPOINTS: no {scheme[:20]!r} stores: give a folder or s3://BUCKET/PREFIX"
        )
    return named


def checkpoint_root() -> Path:
    """HPO_CHECKPOINTS (a folder that all workers share), or a folder below HPO_HOME.

    Raises StorageError for a file:// without an absolute path.
    """
    named = os.environ.get("HPO_CHECKPOINTS") or str(home() / "checkpoints")
    if named.startswith("file://"):
        named = named.removeprefix("file://")
        if not named.startswith("/"):
            raise StorageError("HPO_CHECKPOINTS names no folder of this machine: file:///FOLDER")
    return Path(named)


class TrialCheckpoints:
    """Checkpoints in a folder that all workers see, as `Checkpoints` has it."""

    def __init__(self, root: Path, *, study_key: int, trial_number: int, token: int) -> None:
        self._trial = root / f"{study_key:d}" / f"{trial_number:d}"
        self._token = token
        self._own = self._trial / f"{token:d}"

    def take_over(self) -> bytes | None:
        """The newest valid checkpoint of the attempts before, which are cut off from here on.

        Raises LeaseLost if a later attempt has been here already.
        """
        make_folder(self._trial)
        for folder in (self._trial.parent, self._trial):
            os.close(_open_folder(folder))
        if any(token > self._token for token in self._tokens()):
            raise LeaseLost("the checkpoints were taken over")
        inherited = self._valid_files()
        half = self._trial / f".{self._token:d}"
        shutil.rmtree(half, ignore_errors=True)
        make_folder(half)
        for step, payload in inherited:
            write_file(half / f"{step:d}.ckpt", payload)
        if not self._own.exists():
            half.rename(self._own)
        for token in self._tokens():
            if token < self._token:
                shutil.rmtree(self._trial / f"{token:d}", ignore_errors=True)
                shutil.rmtree(self._trial / f".{token:d}", ignore_errors=True)
        return inherited[0][1] if inherited else None

    def save(self, step: int, payload: bytes) -> None:
        """Keep the state at `step` and the one before it. Raises LeaseLost after a take-over."""
        try:
            write_file(self._own / f"{step:d}.ckpt", payload)
        except FileNotFoundError as error:
            raise LeaseLost("the checkpoints were taken over") from error
        for _, path in list(_by_step(self._own))[KEPT:]:
            path.unlink(missing_ok=True)

    def remove(self) -> None:
        """The trial has ended for good."""
        shutil.rmtree(self._trial, ignore_errors=True)

    def _tokens(self) -> set[int]:
        """Of the folders of all attempts, finished ones and (with a dot) half-made ones."""
        names = [folder.name.removeprefix(".") for folder in self._trial.iterdir()]
        return {int(name) for name in names if name.isdigit()}

    def _valid_files(self) -> list[tuple[int, bytes]]:
        """(step, payload), newest first, of the newest folder."""
        folders = {token: self._trial / f"{token:d}" for token in self._tokens()}
        tokens = [
            token for token, path in folders.items() if path.is_dir() and not path.is_symlink()
        ]
        if not tokens:
            return []
        found = []
        for step, path in _by_step(self._trial / f"{max(tokens):d}"):
            payload = read_file(path)
            if payload is not None:
                found.append((step, payload))
        return found[:KEPT]


def _by_step(folder: Path) -> Iterator[tuple[int, Path]]:
    """The checkpoint files of a folder, newest first; links and strangers are passed over."""
    steps = [
        (int(path.stem), path)
        for path in folder.glob("*.ckpt")
        if path.stem.isdigit() and not path.is_symlink()
    ]
    yield from sorted(steps, reverse=True)


def write_file(path: Path, payload: bytes) -> None:
    """All of it or nothing, also when the machine stops here. Raises OSError, with this path."""
    partial = f".{path.name}.partial"
    folder = _open_folder(path.parent)
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW
        with open(os.open(partial, flags, 0o644, dir_fd=folder), "wb") as file:
            file.write(seal(payload))
            file.flush()
            os.fsync(file.fileno())
        os.rename(partial, path.name, src_dir_fd=folder, dst_dir_fd=folder)
        os.fsync(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(partial, dir_fd=folder)
        error.filename = str(path)  # of a full disk there is none, or that of the partial file
        raise
    finally:
        os.close(folder)


def _open_folder(path: Path) -> int:
    """A descriptor. Raises OSError if it is a symbolic link, wherever that leads."""
    if path.is_symlink():
        raise OSError(errno.ELOOP, "a symbolic link among the checkpoints", str(path))
    return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)


def read_file(path: Path) -> bytes | None:
    """The payload, or None if the file is not one that we wrote whole."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW), "rb") as file:
            return unseal(file.read())
    except OSError:
        return None


def seal(payload: bytes) -> bytes:
    """With a checksum before it, so that `unseal` knows it."""
    return _MAGIC + hashlib.sha256(payload).digest() + payload


def unseal(content: bytes) -> bytes | None:
    """The payload, or None if the content is not what `seal` made, whole."""
    if not content.startswith(_MAGIC):
        return None
    digest = content[len(_MAGIC) : len(_MAGIC) + _DIGEST_BYTES]
    payload = content[len(_MAGIC) + _DIGEST_BYTES :]
    return payload if hashlib.sha256(payload).digest() == digest else None
