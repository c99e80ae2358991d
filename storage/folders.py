"""Folders and files that may lie where another user has rights.

Root may work in the home of somebody else, who goes on to own what is in it, and who may have put a
link in the place of each file. So a folder is followed once, to a descriptor; files are opened
below that, never through a link; and what root makes belongs to the folder's owner.
"""

import contextlib
import errno
import fcntl
import os
import pwd
import secrets
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from storage.errors import StorageError
from storage.locks import lock


@dataclass(frozen=True, kw_only=True)
class PrivateFolder:
    """A folder that only its owner enters, held open by a descriptor."""

    path: Path
    descriptor: int

    @property
    def owner(self) -> os.stat_result:
        """st_uid and st_gid say whose it is."""
        return os.fstat(self.descriptor)

    def file(self, name: str) -> int:
        """A descriptor that reads, and writes at the end; the file is made if need be.

        Raises StorageError if something else is in its place.
        """
        owner = self.owner
        flags = os.O_RDWR | os.O_APPEND | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            return self._new_file(name, flags, owner)
        except FileExistsError:
            pass
        try:
            descriptor = os.open(name, flags, dir_fd=self.descriptor)
        except PermissionError as error:
            whose = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False).st_uid
            raise StorageError(
                f"{self.path / name} belongs to {name_of(whose)}: remove it, or set HPO_HOME to a "
                "folder of yours"
            ) from error
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            raise StorageError(f"{self.path / name} is no file of ours: remove it") from error
        found = os.fstat(descriptor)
        if (
            not stat.S_ISREG(found.st_mode)
            or found.st_nlink != 1
            or found.st_uid not in (owner.st_uid, os.geteuid())
        ):
            os.close(descriptor)
            raise StorageError(f"{self.path / name} is no file of ours: remove it")
        if stat.S_IMODE(found.st_mode) != 0o600:
            os.fchmod(descriptor, 0o600)
        return descriptor

    def _new_file(self, name: str, flags: int, owner: os.stat_result) -> int:
        descriptor = os.open(name, flags | os.O_CREAT | os.O_EXCL, 0o600, dir_fd=self.descriptor)
        if os.geteuid() == 0 and owner.st_uid != 0:
            os.fchown(descriptor, owner.st_uid, owner.st_gid)
        return descriptor

    def folder(self, name: str) -> int | None:
        """A descriptor of a folder in it; None if there is no such.

        Through a link only if nobody but this user can have put it there.
        """
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        if self.owner.st_uid != os.geteuid():
            flags |= os.O_NOFOLLOW
        try:
            return os.open(name, flags, dir_fd=self.descriptor)
        except FileNotFoundError:
            return None

    def read(self, name: str) -> tuple[bytes, os.stat_result]:
        """What a file holds, and what it is. Raises OSError, also if it is something else."""
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        with open(os.open(name, flags, dir_fd=self.descriptor), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode):
                raise FileNotFoundError(errno.ENOENT, "No such file", name)
            return file.read(), found

    def write(self, name: str, content: bytes) -> None:
        """Put the content in the place of the file, in one step. Raises OSError."""
        partial = f"{secrets.token_hex(8)}.partial"
        with open(self._new_file(partial, os.O_WRONLY | os.O_NOFOLLOW, self.owner), "wb") as file:
            file.write(content)
        self.rename(partial, name)

    def rename(self, name: str, to: str) -> None:
        """Put one file in the place of another. Raises OSError."""
        os.replace(name, to, src_dir_fd=self.descriptor, dst_dir_fd=self.descriptor)

    def close(self) -> None:
        """Once and no more."""
        os.close(self.descriptor)

    def size(self, name: str) -> int:
        """The bytes of a file; -1 if there is no such, or a link of that name."""
        try:
            found = os.stat(name, dir_fd=self.descriptor, follow_symlinks=False)
        except FileNotFoundError:
            return -1
        return found.st_size if stat.S_ISREG(found.st_mode) else -1

    @contextlib.contextmanager
    def locked(self, name: str) -> Iterator[None]:
        """With no other process in it; the kernel unlocks it, however this one ends."""
        descriptor = self.file(name)
        try:
            lock(descriptor, fcntl.LOCK_EX, self.path / name)
            yield
        finally:
            os.close(descriptor)


def private_folder(path: Path, *, through_links: bool = True) -> PrivateFolder:
    """The folder, made if need be, with rights for nobody but its owner. Raises OSError.

    through_links: also where a symbolic link is in its place, unless another user can have put it
    there and root would follow it.
    """
    make_folder(path, mode=0o700)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    if not through_links or (os.geteuid() == 0 and path.parent.stat().st_uid != 0):
        flags |= os.O_NOFOLLOW
    descriptor = os.open(path, flags)
    found = os.fstat(descriptor)
    if stat.S_IMODE(found.st_mode) & 0o077 and os.geteuid() in (0, found.st_uid):
        os.fchmod(descriptor, 0o700)
    return PrivateFolder(path=path, descriptor=descriptor)


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make the folder and those above it; root makes them for the owner of what was there.

    Raises OSError.
    """
    missing = []
    while not path.is_dir():
        missing.append(path)
        path = path.parent
    owner = path.stat()
    for number, folder in enumerate(reversed(missing), start=1):
        try:
            folder.mkdir(mode=mode if number == len(missing) else 0o777)
        except FileExistsError:
            if not folder.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(folder)) from None
        else:
            if os.geteuid() == 0 and owner.st_uid != 0:
                os.chown(folder, owner.st_uid, owner.st_gid, follow_symlinks=False)


def name_of(uid: int) -> str:
    """For people: the user's name, where the machine knows one."""
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"
