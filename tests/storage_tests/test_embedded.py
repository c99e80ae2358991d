import contextlib
import fcntl
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psycopg2
import pytest

from storage import embedded
from storage.embedded import EmbeddedPostgres
from storage.embedded_programs import ServerUser, system_user
from storage.errors import DatabaseUnreachable, StorageError
from storage.folders import private_folder

_USER = """
import sys
from pathlib import Path
from storage import embedded
from storage.embedded import EmbeddedPostgres
EmbeddedPostgres(Path(sys.argv[1])).join()
print("joined", flush=True)
sys.stdin.read()
"""


class User:
    """A process that uses the server until it is told to leave, or killed."""

    def __init__(self, folder: Path, *, by: Sequence[str] = (), **variables: str) -> None:
        self.process = subprocess.Popen(
            [*by, sys.executable, "-c", _USER, str(folder)],
            env={**os.environ, **variables},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def wait_until_joined(self) -> None:
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "joined\n"

    def leave(self) -> None:
        self.process.communicate(timeout=30)


def answers(server: EmbeddedPostgres) -> bool:
    with contextlib.suppress(psycopg2.OperationalError):
        psycopg2.connect(**server.parameters).close()
        return True
    return False


def stops(server: EmbeddedPostgres, *, within: float = 15) -> bool:
    deadline = time.monotonic() + within
    while time.monotonic() < deadline:
        if not (server.data / "postmaster.pid").exists():
            return True
        time.sleep(0.1)
    return False


def runs_as() -> ServerUser:
    """Who runs the server of a folder that is ours."""
    if os.geteuid() == 0:
        return system_user("pgserver")
    return ServerUser(uid=os.geteuid(), gid=os.getegid())


@contextlib.contextmanager
def sleeping(name: str = "sleep", **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A process of this name that does nothing."""
    with subprocess.Popen([name, "1000"], executable=shutil.which("sleep"), **options) as process:
        try:
            yield process
        finally:
            process.kill()


def postmaster_of(server: EmbeddedPostgres) -> int:
    return int((server.data / "postmaster.pid").read_text().split()[0])


def started_and_stopped(folder: Path) -> EmbeddedPostgres:
    """By the server's own signal, sooner than by its guard."""
    server = EmbeddedPostgres(folder)
    user = User(folder)
    user.wait_until_joined()
    assert answers(server)
    os.kill(postmaster_of(server), signal.SIGINT)
    user.leave()
    assert stops(server)
    return server


@pytest.fixture
def folder(short_folder: Path, request: pytest.FixtureRequest) -> Path:
    name = f"e{abs(hash(request.node.name)) % 10_000}"
    (short_folder / name).mkdir()
    return short_folder / name


def test_processes_that_come_at_one_moment_share_a_server_that_stops_with_the_last(
    folder: Path,
) -> None:
    server = EmbeddedPostgres(folder / "pg")
    users = [User(folder / "pg") for _ in range(4)]
    for user in users:
        user.wait_until_joined()
    for user in users[:3]:
        user.leave()
    time.sleep(4)
    assert answers(server)
    users[3].leave()
    assert stops(server)


def test_the_server_stops_when_its_last_user_is_killed(folder: Path) -> None:
    user = User(folder / "pg")
    user.wait_until_joined()
    user.process.kill()
    user.process.communicate()
    assert stops(EmbeddedPostgres(folder / "pg"))


def test_a_killed_server_is_started_again_with_its_data(folder: Path) -> None:
    server = EmbeddedPostgres(folder / "pg")
    user = User(folder / "pg")
    user.wait_until_joined()
    with contextlib.closing(psycopg2.connect(**server.parameters)) as connection:
        connection.cursor().execute("CREATE TABLE kept ()")
        connection.commit()
    pid = int((server.data / "postmaster.pid").read_text().split()[0])
    os.kill(pid, signal.SIGKILL)
    time.sleep(0.5)
    server.ensure()
    with contextlib.closing(psycopg2.connect(**server.parameters)) as connection:
        connection.cursor().execute("SELECT FROM kept")
    user.leave()
    assert stops(server)


@pytest.mark.parametrize("name", ["sleep", "postgres"])
def test_a_pid_file_that_names_another_process_is_no_obstacle(folder: Path, name: str) -> None:
    server = started_and_stopped(folder / "pg")
    nothing = folder / "no programs"
    nothing.mkdir()
    with sleeping(name, **runs_as().demotion) as other:
        for file in ("postmaster.pid", ".s.PGSQL.5432.lock"):
            (server.data / file).write_text(f"{other.pid}\n{server.data}\n1\n5432\n")
        again = User(folder / "pg", PATH=str(nothing))  # no ps, as in slim images
        again.wait_until_joined()
        assert answers(server)
        assert other.poll() is None
    again.leave()
    assert stops(server)


@pytest.mark.parametrize(
    "name",
    [
        "with a space and 'quotes'",
        "Doe, Jane",
        "back\\slash",
        'double"quote',
        "100%",
        "$HOME $(touch planted) `touch planted`",
        "new\nline",
        "pingüino 🐧",
        os.fsdecode(b"latin-1 \xfc"),
        "x" * 120,
    ],
)
def test_any_path_will_do(folder: Path, name: str) -> None:
    started_and_stopped(folder / name / "pg")
    assert not list(folder.rglob("planted"))


def test_no_second_server_starts_on_the_data_of_one_whose_process_is_not_seen(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = EmbeddedPostgres(folder / "pg")
    user = User(folder / "pg")
    user.wait_until_joined()
    pid = postmaster_of(server)
    # as in another container with the same volume: its number means nothing, and it hangs
    monkeypatch.setattr(embedded, "postmaster", lambda _: None)
    monkeypatch.setattr(embedded, "_PASSING_SECONDS", 0.0)
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(DatabaseUnreachable, match="at work on the same data, here or in a co"):
            server.ensure()
        assert postmaster_of(server) == pid
    finally:
        os.kill(pid, signal.SIGCONT)
    assert answers(server)
    user.leave()
    assert stops(server)


def test_the_same_folder_is_the_same_server_whatever_the_temporary_folder(folder: Path) -> None:
    home = folder / ("x" * 120)
    users = [User(home, TMPDIR=str(folder / name)) for name in ("a", "b" * 120)]
    for user in users:
        user.wait_until_joined()
    assert answers(EmbeddedPostgres(home))
    for user in users:
        user.leave()
    assert stops(EmbeddedPostgres(home))


def test_the_cause_of_a_failed_start_is_told_and_it_is_not_tried_again(folder: Path) -> None:
    server = started_and_stopped(folder / "pg")
    with (server.data / "postgresql.conf").open("a") as settings:
        settings.write("no_such_setting = 1\n")
    log = server.folder / "server.log"
    before = log.stat().st_size
    with pytest.raises(DatabaseUnreachable) as unreachable:
        server.ensure()
    assert str(unreachable.value).startswith(
        "the embedded Postgres doesn't start: configuration file "
        '"/proc/self/cwd/postgresql.conf" contains errors; see '
    )
    assert "\n" not in str(unreachable.value)
    assert log.read_text()[before:].count("FATAL") == 1


def test_the_cause_of_a_recovery_that_fails_is_told(folder: Path) -> None:
    server = EmbeddedPostgres(folder / "pg")
    user = User(folder / "pg")
    user.wait_until_joined()
    os.kill(postmaster_of(server), signal.SIGKILL)
    for segment in (server.data / "pg_wal").iterdir():
        if segment.is_file():
            segment.unlink()
    with pytest.raises(DatabaseUnreachable, match=r"start: could not locate a valid checkpoint re"):
        server.ensure()
    user.leave()


def test_the_cause_of_a_failed_initdb_is_told(folder: Path) -> None:
    limit = ["sh", "-c", 'ulimit -f 2000; exec "$@"', "sh"]  # as a full disk, while it makes files
    failed = subprocess.run(
        [*limit, sys.executable, "-c", _USER, str(folder / "pg")],
        capture_output=True,
        text=True,
        check=False,
    )
    told = failed.stderr.splitlines()[-1]
    assert told.startswith("storage.errors.StorageError: can't make the embedded Postgres: ")
    assert "File" in told
    assert f"see {folder / 'pg' / 'initdb.log'}, set HPO_HOME or give --storage" in told
    assert not (folder / "pg" / "data").exists()
    started_and_stopped(folder / "pg")


def test_a_file_in_the_place_of_the_data_is_told(folder: Path) -> None:
    (folder / "pg").mkdir()
    (folder / "pg" / "data").write_text("")
    with pytest.raises(
        StorageError, match=r"can't use .*/pg for .*: Not a directory; set HPO_HOME"
    ):
        EmbeddedPostgres(folder / "pg").ensure()


def test_a_start_that_was_killed_half_way_leaves_no_obstacle(folder: Path) -> None:
    (folder / "pg" / "data.new").mkdir(parents=True)
    (folder / "pg" / "data.new" / "PG_VERSION").write_text("18")
    user = User(folder / "pg")
    user.wait_until_joined()
    user.leave()
    assert stops(EmbeddedPostgres(folder / "pg"))


def test_only_the_owner_enters_the_folder_of_the_socket(folder: Path) -> None:
    user = User(folder / "pg")
    user.wait_until_joined()
    server = EmbeddedPostgres(folder / "pg")
    assert server.socket_folder.stat().st_mode & 0o077 == 0
    user.leave()
    assert stops(server)


def test_a_data_folder_of_an_earlier_version_goes_on_also_where_a_link_leads(folder: Path) -> None:
    server = started_and_stopped(folder / "pg")
    with (server.data / "postgresql.conf").open("a") as settings:
        settings.write("include = 'hpo.conf'\n")
    (server.data / "hpo.conf").write_text(
        "listen_addresses = ''\nunix_socket_directories = '/nowhere'\nmax_connections = 200\n"
    )
    (server.data / "hpo.conf").chmod(0o644)
    server.data.rename(folder / "larger disk")
    server.data.symlink_to(folder / "larger disk")
    (folder / "pg").rename(folder / "moved")
    (folder / "pg").symlink_to(folder / "moved")
    user = User(folder / "pg")
    user.wait_until_joined()
    assert answers(server)
    user.leave()
    assert stops(server)


def test_root_follows_no_link_to_a_folder_that_another_user_can_have_put_there(
    folder: Path,
) -> None:
    theirs = folder / "theirs"
    theirs.mkdir()
    (theirs / "pg").symlink_to(folder)
    (folder / "postgres").mkdir()
    (folder / "postgres" / "data").symlink_to(folder)
    if os.geteuid() != 0:  # the links are one's own
        private_folder(theirs / "pg").close()
        return
    for path in (theirs, folder / "postgres"):
        os.chown(path, runs_as().uid, runs_as().gid)
    for path in (theirs / "pg", folder / "postgres"):
        with pytest.raises(StorageError, match=r"can't use .*: (Not a dir|Too many levels)"):
            EmbeddedPostgres(path).ensure()
    assert not (folder / "start.lock").exists()


def test_the_folder_and_its_locks_are_the_owners_alone(folder: Path) -> None:
    (folder / "pg").mkdir(mode=0o755)
    for name in ("users.lock", "start.lock", "guard.lock", "server.log"):  # of an earlier version
        (folder / "pg" / name).touch(mode=0o644)
    started_and_stopped(folder / "pg")
    assert (folder / "pg").stat().st_mode & 0o077 == 0
    assert not [path for path in (folder / "pg").iterdir() if path.stat().st_mode & 0o077]


def test_no_folder_is_opened_for_the_servers_user(folder: Path) -> None:
    closed = folder / "closed"
    closed.mkdir(mode=0o700)
    (closed / "home").mkdir(mode=0o700)
    started_and_stopped(closed / "home" / "pg")
    assert closed.stat().st_mode & 0o7777 == 0o700
    assert (closed / "home").stat().st_mode & 0o7777 == 0o700
    assert (closed / "home" / "pg" / "data").stat().st_uid == runs_as().uid


def test_nothing_is_written_through_what_the_servers_user_can_plant(folder: Path) -> None:
    server = started_and_stopped(folder / "pg")
    victim = folder / "victim"
    victim.write_text("unharmed")
    before = victim.stat()
    for name in ("hpo.conf", "postmaster.pid", ".s.PGSQL.5432.lock"):
        (server.data / name).unlink(missing_ok=True)
        (server.data / name).symlink_to(victim)
    # the server itself may refuse what it finds
    with contextlib.suppress(DatabaseUnreachable):
        server.ensure()
    assert victim.read_text() == "unharmed"
    assert victim.stat().st_uid == before.st_uid


@pytest.mark.parametrize("name", ["server.log", "users.lock", "start.lock", "initdb.log"])
@pytest.mark.parametrize("link", [Path.symlink_to, Path.hardlink_to, "fifo"])
def test_a_link_in_the_place_of_a_file_is_refused(folder: Path, name: str, link: object) -> None:
    (folder / "pg").mkdir()
    victim = folder / "victim"
    victim.write_text("unharmed")
    if link == "fifo":
        os.mkfifo(folder / "pg" / name)
    else:
        assert callable(link)
        link(folder / "pg" / name, victim)
    if os.geteuid() == 0:
        os.chown(folder / "pg", runs_as().uid, runs_as().gid)
    with pytest.raises(StorageError, match=rf"{name} is no file of ours: remove it"):
        EmbeddedPostgres(folder / "pg").join()
    assert victim.read_text() == "unharmed"
    assert victim.stat().st_uid == os.geteuid()


def test_the_guard_signals_no_process_but_the_server(folder: Path) -> None:
    data = folder / "data"
    data.mkdir(mode=0o700)
    for name in ("guard.lock", "users.lock"):
        (folder / name).touch()
    with (
        sleeping() as victim,
        socket.socket(socket.AF_UNIX) as server,
    ):
        server.bind(str(data / ".s.PGSQL.5432"))
        server.listen()
        (data / "postmaster.pid").write_text(f"{victim.pid}\n{data}\n")
        if os.geteuid() == 0:
            os.chown(data, runs_as().uid, runs_as().gid)
        guard = Path("storage/embedded_guard.py").resolve()
        subprocess.run([sys.executable, str(guard), folder, data], cwd=folder, timeout=100)
        assert victim.poll() is None


def test_what_root_makes_in_a_folder_of_another_user_is_that_users(folder: Path) -> None:
    home = folder / "home"
    home.mkdir()
    if os.geteuid() == 0:
        os.chown(home, 54_321, 54_321)  # without a name, as users of containers are
    server = started_and_stopped(home / "below" / "pg")
    made = [home / "below", *(home / "below").rglob("*")]
    assert server.data in made
    assert {path.lstat().st_uid for path in made} == {home.stat().st_uid}


def test_a_small_dev_shm_is_enough(folder: Path) -> None:
    mount = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    small = ["unshare", "--mount", "sh", "-c", mount, "sh"] if may_mount() else []
    user = User(folder / "pg", by=small)
    user.wait_until_joined()
    server = EmbeddedPostgres(folder / "pg")
    assert answers(server)
    # where no such file system can be mounted: nothing of the server lies in that folder
    assert "/dev/shm/" not in Path(f"/proc/{postmaster_of(server)}/maps").read_text()
    user.leave()
    assert stops(server)


def may_mount() -> bool:
    """Whether this process has CAP_SYS_ADMIN: many containers' root has not."""
    status = Path("/proc/self/status").read_text()
    return bool(int(status.partition("CapEff:")[2].split()[0], 16) & 1 << 21)


def test_whoever_waits_is_told_on_whom(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    server = started_and_stopped(folder / "pg")
    held = subprocess.Popen(
        ["flock", str(server.folder / "start.lock"), "sh", "-c", "echo held; read go; sleep 3"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert held.stdout is not None
    assert held.stdout.readline() == "held\n"
    threading.Timer(0.1, held.communicate, ["go\n"]).start()
    server.ensure()
    held.wait()
    (told,) = [record.getMessage() for record in caplog.records]
    assert told == (
        f"waiting for process {held.pid}, which holds the lock on {server.folder / 'start.lock'}"
    )


def test_a_second_guard_leaves_at_once(folder: Path) -> None:
    (folder / "users.lock").touch()
    with (folder / "guard.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        guard = Path("storage/embedded_guard.py").resolve()
        done = subprocess.run([sys.executable, str(guard)], cwd=folder, timeout=10, check=False)
    assert done.returncode == 0
