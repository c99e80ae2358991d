import itertools
import socket
import threading
import time
from collections.abc import Iterator

import pytest
from sqlalchemy import text

from storage import database as database_module
from storage.database import Database, normalise_url
from storage.errors import DatabaseUnreachable, StorageError
from tests.parts import PASSWORD, TcpPostgres, free_port


@pytest.mark.parametrize("scheme", ["postgres", "postgresql", "postgresql+psycopg2"])
def test_any_postgres_url_gets_our_driver(scheme: str) -> None:
    assert normalise_url(f"{scheme}://me@host:1/db").drivername == "postgresql+psycopg2"


@pytest.mark.parametrize(
    "url",
    ["mysql://root@localhost/x", "sqlite:///x.db", "nonsense", "", "://", "postgresql://h/a%00b"],
)
def test_any_other_database_is_refused_in_one_line(url: str) -> None:
    with pytest.raises(StorageError) as refused:
        normalise_url(url)
    assert "postgresql://" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_password_stands_in_no_refusal() -> None:
    with pytest.raises(StorageError) as refused:
        normalise_url(f"mysql://root:{PASSWORD}@localhost/x")
    assert PASSWORD not in str(refused.value)


def test_a_wrong_port_is_told_within_the_time_for_a_first_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(database_module, "FIRST_ANSWER_SECONDS", 1.0)
    port = free_port()
    started = time.monotonic()
    with pytest.raises(DatabaseUnreachable, match=str(port)) as unreachable:
        Database(f"postgresql://me:{PASSWORD}@127.0.0.1:{port}/x").open()
    assert time.monotonic() - started < 5
    assert PASSWORD not in str(unreachable.value)


def test_a_wrong_password_is_told_at_once_and_not_shown(tcp_postgres: TcpPostgres) -> None:
    wrong = f"postgresql://postgres:wrong{{}}%25pass@127.0.0.1:{tcp_postgres.port}/postgres"
    started = time.monotonic()
    with pytest.raises(StorageError, match="password authentication failed") as refused:
        Database(wrong).open()
    assert time.monotonic() - started < 5
    assert "wrong" not in str(refused.value)


def test_a_password_with_braces_and_percent_signs_works(tcp_postgres: TcpPostgres) -> None:
    database = Database(tcp_postgres.url)
    database.open()
    assert PASSWORD not in repr(database.engine) + str(database.engine.url) + database.name
    database.engine.dispose()


@pytest.fixture
def black_hole() -> Iterator[int]:
    """A port that accepts connections and never says a word."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []

        def accept() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join(5)
        for connection in held:
            connection.close()


def test_a_server_that_accepts_and_never_answers_is_given_up(
    black_hole: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "FIRST_ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(database_module, "_CONNECT_SECONDS", 1.0)
    started = time.monotonic()
    with pytest.raises(DatabaseUnreachable, match="no answer in 1 s"):
        Database(f"postgresql://me@127.0.0.1:{black_hole}/x").open()
    assert time.monotonic() - started < 5


def test_a_call_is_tried_again_after_a_restart(tcp_postgres: TcpPostgres) -> None:
    database = Database(tcp_postgres.url)
    database.open()
    database.patience_seconds = 60
    tcp_postgres.stop("immediate")
    threading.Timer(1.0, tcp_postgres.start).start()

    def ask() -> object:
        with database.engine.connect() as connection:
            return connection.execute(text("SELECT 42")).scalar()

    assert database.patiently(ask) == 42
    database.engine.dispose()


def test_whoever_waits_for_the_database_is_heard_of_each_second() -> None:
    database = Database(f"postgresql://127.0.0.1:{free_port()}/x")
    database.patience_seconds = 7.0  # the pauses between tries have grown to seconds by then
    heard = [time.monotonic()]
    database.while_waiting = lambda: heard.append(time.monotonic())
    with pytest.raises(DatabaseUnreachable):
        database.open()
    assert len(heard) > 5
    assert max(after - before for before, after in itertools.pairwise(heard)) < 1.6


def test_an_error_of_our_own_is_not_tried_again(database: Database) -> None:
    calls = []

    def broken() -> None:
        calls.append(1)
        with database.engine.connect() as connection:
            connection.execute(text("SELECT nonsense"))

    with pytest.raises(Exception, match="nonsense"):
        database.patiently(broken)
    assert len(calls) == 1


def test_statements_end_in_time(database: Database) -> None:
    with database.engine.connect() as connection:
        assert connection.execute(text("SHOW statement_timeout")).scalar() == "15s"


def test_a_process_keeps_one_connection(database: Database) -> None:
    for _ in range(5):
        with database.engine.connect() as connection:
            found = connection.execute(
                text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
            ).scalar()
    assert found == 1
