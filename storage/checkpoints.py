"""Checkpoints of trials: atomic files, the newest valid one wins, old ones go.

    root/STUDY_KEY/TRIAL_NUMBER/TOKEN/STEP.ckpt

Names are integers alone. A folder belongs to the lease whose token it bears. Who takes a trial over
first makes a folder of its own, in one step, with links to the valid files of the newest folder
before; what the old attempt still writes is in a folder that nobody reads. Contents are bytes with
a checksum: storage knows nothing of what they mean.
"""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from storage.errors import LeaseLost
from storage.home import home

_MAGIC = b"hpo checkpoint 1\n"
_DIGEST_BYTES = 32
_KEPT = 2
"""The newest, and the one before in case the newest is torn."""
_STOPPED = "stopped"
"""Marks a trial that stopped at a rung: nobody writes here, and it may be taken up again."""
MOST_STOPPED_BYTES = 10 * 2**30
"""What the stopped trials of a study may keep together."""


def checkpoint_root() -> Path:
    """HPO_CHECKPOINTS (a folder that all workers share), or a folder below HPO_HOME."""
    return Path(os.environ.get("HPO_CHECKPOINTS") or home() / "checkpoints")


class TrialCheckpoints:
    """The checkpoints of one attempt at a trial. OSError from any method: no place to keep them."""

    def __init__(self, root: Path, *, study_key: int, trial_number: int, token: int) -> None:
        self._trial = root / f"{study_key:d}" / f"{trial_number:d}"
        self._token = token
        self._own = self._trial / f"{token:d}"

    def take_over(self) -> bytes | None:
        """The newest valid checkpoint of the attempts before, which are cut off from here on.

        Raises LeaseLost if a later attempt has been here already.
        """
        self._trial.mkdir(parents=True, exist_ok=True)
        if any(token > self._token for token in self._tokens()):
            raise LeaseLost("the checkpoints were taken over")
        inherited = self._valid_files()
        half = self._trial / f".{self._token:d}"
        shutil.rmtree(half, ignore_errors=True)
        half.mkdir()
        for step, payload in inherited:
            _write(half / f"{step:d}.ckpt", payload)
        if not self._own.exists():
            half.rename(self._own)
        (self._trial / _STOPPED).unlink(missing_ok=True)
        for token in self._tokens():
            if token < self._token:
                shutil.rmtree(self._trial / f"{token:d}", ignore_errors=True)
                shutil.rmtree(self._trial / f".{token:d}", ignore_errors=True)
        return inherited[0][1] if inherited else None

    def save(self, step: int, payload: bytes) -> None:
        """Keep the state at `step` and the one before it. Raises LeaseLost after a take-over."""
        try:
            _write(self._own / f"{step:d}.ckpt", payload)
        except FileNotFoundError as error:
            raise LeaseLost("the checkpoints were taken over") from error
        for _, path in list(_by_step(self._own))[_KEPT:]:
            path.unlink(missing_ok=True)

    def stop(self, *, most_bytes: int = MOST_STOPPED_BYTES) -> None:
        """The trial may be taken up again. Where such trials keep too much, the oldest go."""
        for _, path in list(_by_step(self._own))[1:]:
            path.unlink(missing_ok=True)
        (self._trial / _STOPPED).touch()
        stopped = sorted(
            self._trial.parent.glob(f"*/{_STOPPED}"), key=lambda mark: mark.stat().st_mtime_ns
        )
        kept_bytes = [_bytes_below(mark.parent) for mark in stopped]
        for index, mark in enumerate(stopped):
            if sum(kept_bytes[index:]) > most_bytes:
                shutil.rmtree(mark.parent, ignore_errors=True)

    def remove(self) -> None:
        """The trial has ended for good."""
        shutil.rmtree(self._trial, ignore_errors=True)

    def _tokens(self) -> set[int]:
        """Of the folders of all attempts, finished ones and (with a dot) half-made ones."""
        names = [folder.name.removeprefix(".") for folder in self._trial.iterdir()]
        return {int(name) for name in names if name.isdigit()}

    def _valid_files(self) -> list[tuple[int, bytes]]:
        """(step, payload), newest first, of the newest folder."""
        tokens = [token for token in self._tokens() if (self._trial / f"{token:d}").is_dir()]
        if not tokens:
            return []
        found = []
        for step, path in _by_step(self._trial / f"{max(tokens):d}"):
            payload = _read(path)
            if payload is not None:
                found.append((step, payload))
        return found[:_KEPT]


def _bytes_below(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*.ckpt"))


def _by_step(folder: Path) -> Iterator[tuple[int, Path]]:
    """The checkpoint files of a folder, newest first; links and strangers are passed over."""
    steps = [
        (int(path.stem), path)
        for path in folder.glob("*.ckpt")
        if path.stem.isdigit() and not path.is_symlink()
    ]
    yield from sorted(steps, reverse=True)


def _write(path: Path, payload: bytes) -> None:
    """All of it or nothing, also when the machine stops here."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(_MAGIC)
            file.write(hashlib.sha256(payload).digest())
            file.write(payload)
            file.flush()
            os.fsync(file.fileno())
        partial.rename(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


def _read(path: Path) -> bytes | None:
    """The payload, or None if the file is not one that we wrote whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if not content.startswith(_MAGIC):
        return None
    digest = content[len(_MAGIC) : len(_MAGIC) + _DIGEST_BYTES]
    payload = content[len(_MAGIC) + _DIGEST_BYTES :]
    return payload if hashlib.sha256(payload).digest() == digest else None
