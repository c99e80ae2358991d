import contextlib
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psycopg2
import pytest

from storage.embedded import EmbeddedPostgres

_USER = """
import sys
from pathlib import Path
from storage.embedded import EmbeddedPostgres
EmbeddedPostgres(Path(sys.argv[1])).join()
print("joined", flush=True)
sys.stdin.read()
"""


class User:
    """A process that uses the server until it is told to leave, or killed."""

    def __init__(self, folder: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", _USER, str(folder)],
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


def test_a_pid_file_that_names_another_process_is_no_obstacle(folder: Path) -> None:
    server = EmbeddedPostgres(folder / "pg")
    user = User(folder / "pg")
    user.wait_until_joined()
    user.leave()
    assert stops(server)
    (server.data / "postmaster.pid").write_text(f"{os.getpid()}\n{server.data}\n1\n5432\n")
    again = User(folder / "pg")
    again.wait_until_joined()
    assert answers(server)
    again.leave()
    assert stops(server)


@pytest.mark.parametrize("name", ["with a space and 'quotes'", "x" * 120])
def test_any_path_will_do(folder: Path, name: str) -> None:
    server = EmbeddedPostgres(folder / name / "pg")
    user = User(folder / name / "pg")
    user.wait_until_joined()
    assert answers(server)
    user.leave()
    assert stops(server)


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


def test_a_second_guard_leaves_at_once(folder: Path) -> None:
    with (folder / "guard.lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        guard = Path("storage/embedded_guard.py").resolve()
        done = subprocess.run(
            [sys.executable, str(guard), str(folder), str(folder)], timeout=10, check=False
        )
    assert done.returncode == 0
