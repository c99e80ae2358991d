"""Fixtures: databases and commands, each test with its own."""

import contextlib
import itertools
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import optuna
import pytest

from storage.database import Database
from storage.embedded import EmbeddedPostgres
from storage.schema import ensure_tables
from tests.parts import Hpo, TcpPostgres, execute, free_port, url_of

optuna.logging.set_verbosity(optuna.logging.WARNING)
# a shell's background job ignores Ctrl-C, and so would all that the tests start
signal.signal(signal.SIGINT, signal.default_int_handler)
_numbers = itertools.count()


@pytest.fixture(scope="session", autouse=True)
def home_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """So that nothing is kept among the user's own files."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HPO_HOME", str(tmp_path_factory.mktemp("home")))
        yield


@pytest.fixture(scope="session")
def short_folder() -> Iterator[Path]:
    """A folder with a path short enough for sockets, which other users may pass."""
    with tempfile.TemporaryDirectory(prefix="hpo-t") as folder:
        Path(folder).chmod(0o711)
        yield Path(folder)


@pytest.fixture(scope="session")
def postgres(short_folder: Path) -> EmbeddedPostgres:
    """The embedded server that most tests share, with a template that has the tables."""
    server = EmbeddedPostgres(short_folder / "pg")
    server.join()
    execute(server, "CREATE DATABASE template_hpo")
    database = Database(url_of(server, "template_hpo"))
    database.open()
    ensure_tables(database)
    database.engine.dispose()
    return server


@pytest.fixture
def empty_url(postgres: EmbeddedPostgres) -> Iterator[str]:
    """The URL of a database without any table."""
    yield from _new_database(postgres, "template1")


@pytest.fixture
def database_url(postgres: EmbeddedPostgres) -> Iterator[str]:
    """The URL of a database with tables and no study."""
    yield from _new_database(postgres, "template_hpo")


def _new_database(server: EmbeddedPostgres, template: str) -> Iterator[str]:
    name = f"test_{next(_numbers)}"
    execute(server, f"CREATE DATABASE {name} TEMPLATE {template}")
    yield url_of(server, name)
    execute(server, f"DROP DATABASE {name} WITH (FORCE)")


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    """A connection to a database with tables and no study."""
    opened = Database(database_url)
    opened.open()
    yield opened
    opened.engine.dispose()


@pytest.fixture
def tcp_postgres(short_folder: Path) -> Iterator[TcpPostgres]:
    """A running Postgres on a port of its own, with nothing in it."""
    folder = short_folder / f"tcp{next(_numbers)}"
    folder.mkdir()
    server = TcpPostgres(folder, free_port())
    server.make()
    server.start()
    yield server
    with contextlib.suppress(subprocess.CalledProcessError):
        server.stop("immediate")


@pytest.fixture
def hpo(database_url: str, tmp_path: Path) -> Hpo:
    """The commands on a database of their own."""
    home = tmp_path / "home"
    home.mkdir()
    return Hpo(home, {"HPO_STORAGE": database_url})
