import contextlib
import itertools
import socket
import threading
import time
from collections.abc import Iterator

import psycopg2
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
    database = Database(f"postgresql://me@127.0.0.1:{free_port()}/x")
    database.patience_seconds = 7.0  # the pauses between tries have grown to seconds by then
    heard = [time.monotonic()]
    database.while_waiting = lambda: heard.append(time.monotonic())
    with pytest.raises(DatabaseUnreachable):
        database.open()
    assert len(heard) > 5
    assert max(after - before for before, after in itertools.pairwise(heard)) < 1.6


def test_a_disk_of_the_database_that_is_full_is_told_with_the_way_out() -> None:
    database = Database("postgresql://me@127.0.0.1/x")
    database.patience_seconds = 0.0

    def refused() -> None:
        raise psycopg2.OperationalError("FATAL: could not write init file: No space left on device")

    with pytest.raises(DatabaseUnreachable, match="No space left on device: make room on the disk"):
        database.patiently(refused)


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


@pytest.mark.parametrize(
    "parameters",
    ["schema=public", "pgbouncer=true", "a%20b=c", "%C3%BC=1", "sslmode=disable&sslmode=require"],
)
def test_a_parameter_that_postgres_does_not_know_is_refused_in_one_line(parameters: str) -> None:
    with pytest.raises(StorageError, match=r"the storage's URL (has|gives)") as refused:
        Database(f"postgresql://me:{PASSWORD}@127.0.0.1:1/x?{parameters}")
    assert PASSWORD not in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "parameters", ["sslmode=wrong", "keepalives_idle=wrong", "port=99999", "service=missing"]
)
def test_a_parameter_with_a_value_that_can_not_be_is_told_at_once(
    parameters: str, tcp_postgres: TcpPostgres
) -> None:
    database = Database(f"{tcp_postgres.url}?{parameters}")
    database.while_waiting = lambda: pytest.fail("it is tried again")
    with pytest.raises(StorageError, match=r"refuses: .*(invalid|not found)"):
        database.open()


class Bouncer:
    """Passes connections on, but refuses startup parameters as pgbouncer does in its defaults.

    pgbouncer's documentation, ignore_startup_parameters: it allows only parameters that it can keep
    track of (client_encoding, datestyle, timezone, standard_conforming_strings and, of late,
    application_name), and options only with these; all others raise an error.
    """

    def __init__(self, behind: int) -> None:
        self._behind = behind
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client = self._listener.accept()[0]
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, contextlib.suppress(OSError):
            packet = self._packet(client)
            while int.from_bytes(packet[4:8], "big") in (80877103, 80877104):  # SSL, GSSAPI
                client.sendall(b"N")
                packet = self._packet(client)
            if b"\0options\0" in packet:
                text = b"unsupported startup parameter in options: statement_timeout"
                fields = b"SFATAL\0C08P01\0M" + text + b"\0\0"
                client.sendall(b"E" + (len(fields) + 4).to_bytes(4, "big") + fields)
                return
            with socket.create_connection(("127.0.0.1", self._behind)) as server:
                server.sendall(packet)
                back = threading.Thread(target=self._copy, args=(server, client), daemon=True)
                back.start()
                self._copy(client, server)
                back.join(10)

    @staticmethod
    def _packet(client: socket.socket) -> bytes:
        head = client.recv(4, socket.MSG_WAITALL)
        return head + client.recv(int.from_bytes(head, "big") - 4, socket.MSG_WAITALL)

    @staticmethod
    def _copy(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65_536):
                target.sendall(data)
            target.shutdown(socket.SHUT_WR)


@pytest.fixture
def bouncer(tcp_postgres: TcpPostgres) -> Iterator[str]:
    """The URL of a database behind it."""
    passing = Bouncer(tcp_postgres.port)
    yield tcp_postgres.url.replace(f":{tcp_postgres.port}/", f":{passing.port}/")
    passing.close()


def test_behind_pgbouncer_a_connection_has_the_same_settings(bouncer: str) -> None:
    database = Database(bouncer)
    database.open()
    with database.engine.connect() as connection:
        shown = [
            connection.execute(text(f"SHOW {name}")).scalar()
            for name in (
                "statement_timeout",
                "lock_timeout",
                "idle_in_transaction_session_timeout",
                "timezone",
            )
        ]
    assert shown == ["15s", "10s", "20s", "UTC"]
    database.engine.dispose()


def test_what_pgbouncer_refuses_of_the_users_own_is_told_in_one_line(bouncer: str) -> None:
    database = Database(f"{bouncer}?options=-cgeqo%3Doff")
    with pytest.raises(
        StorageError, match=r"unsupported startup parameter in options.*take options"
    ):
        database.open()
