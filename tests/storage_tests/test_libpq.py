"""Which variables of the environment reach which database."""

import contextlib
import os
import re
import subprocess
import sys
from pathlib import Path

import psycopg2
import pytest
from sqlalchemy import text

from storage.database import Database
from storage.embedded import EmbeddedPostgres
from storage.errors import StorageError
from tests.parts import PASSWORD, TcpPostgres

HOSTILE = {
    "PGAPPNAME": "other",
    "PGCHANNELBINDING": "require",
    "PGCLIENTENCODING": "wrong",
    "PGCONNECT_TIMEOUT": "wrong",
    "PGDATABASE": "wrong",
    "PGDATESTYLE": "wrong",
    "PGGEQO": "wrong",
    "PGGSSDELEGATION": "wrong",
    "PGGSSENCMODE": "require",
    "PGGSSLIB": "wrong",
    "PGHOST": "nowhere.invalid",
    "PGHOSTADDR": "127.0.0.1",
    "PGKRBSRVNAME": "wrong",
    "PGLOADBALANCEHOSTS": "wrong",
    "PGOPTIONS": "-c wrong.wrong -c statement_timeout=1",
    "PGPASSFILE": "/dev/null",
    "PGPASSWORD": "wrong",
    "PGPORT": "1",
    "PGREQUIREAUTH": "scram-sha-256",
    "PGREQUIREPEER": "nobody",
    "PGREQUIRESSL": "1",
    "PGSERVICE": "missing",
    "PGSERVICEFILE": "/nowhere",
    "PGSSLCERT": "/nowhere",
    "PGSSLCERTMODE": "wrong",
    "PGSSLCOMPRESSION": "wrong",
    "PGSSLCRL": "/nowhere",
    "PGSSLCRLDIR": "/nowhere",
    "PGSSLKEY": "/nowhere",
    "PGSSLMAXPROTOCOLVERSION": "wrong",
    "PGSSLMINPROTOCOLVERSION": "wrong",
    "PGSSLMODE": "verify-full",
    "PGSSLNEGOTIATION": "direct",
    "PGSSLROOTCERT": "system",
    "PGSSLSNI": "wrong",
    "PGSYSCONFDIR": "/nowhere",
    "PGTARGETSESSIONATTRS": "standby",
    "PGTZ": "wrong",
    "PGUSER": "wrong",
}
"""Each variable that libpq reads, with a value by which a connection fails or is another one."""
SERVERS = {"PGDATA": "/nowhere", "PG_COLOR": "always", "PGCTLTIMEOUT": "0"}
"""Those that Postgres's programs read besides."""


def test_each_variable_that_libpq_reads_is_tried_here() -> None:
    maps = Path("/proc/self/maps").read_text()
    (library,) = set(re.findall(r"\S*/libpq\S*\.so\S*", maps))
    names = re.findall(rb"(?<=\0)PG[A-Z_]+(?=\0)", Path(library).read_bytes())
    assert {name.decode() for name in names if not name.startswith(b"PGRES_")} == set(HOSTILE)


@pytest.mark.parametrize("variable", HOSTILE)
def test_no_variable_reaches_a_connection_to_the_embedded_server(
    variable: str, postgres: EmbeddedPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    calm = session(postgres)
    monkeypatch.setenv(variable, HOSTILE[variable])
    assert session(postgres) == calm


def session(server: EmbeddedPostgres) -> list[object]:
    """What a connection is: its parameters, where it went, and what the server was told."""
    with contextlib.closing(psycopg2.connect(**server.parameters)) as connection:
        with connection.cursor() as cursor:
            cursor.execute("SELECT name, setting FROM pg_settings WHERE source = 'client'")
            settings = sorted(cursor.fetchall())
        return [connection.info.dsn_parameters, connection.info.host, settings]


def test_the_embedded_server_starts_and_stops_whatever_the_variables_are(tmp_path: Path) -> None:
    user = subprocess.Popen(
        [sys.executable, "-c", _USER, str(tmp_path / "pg")],
        env={**os.environ, **HOSTILE, **SERVERS, "AWS_SECRET_ACCESS_KEY": PASSWORD},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert user.stdout is not None
    assert user.stdout.readline() == "15s\n"
    pid_file = tmp_path / "pg" / "data" / "postmaster.pid"
    pid = int(pid_file.read_text().split()[0])
    seen = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    assert {name.partition(b"=")[0] for name in seen if name} <= _OF_THE_SERVER
    user.communicate(timeout=30)
    assert user.returncode == 0
    waits = ["sh", "-c", 'while [ -e "$1" ]; do sleep 0.1; done', "sh", str(pid_file)]
    subprocess.run(waits, timeout=30, check=True)


_OF_THE_SERVER = {b"PATH", b"LC_ALL", b"TZ", b"PWD", b"OLDPWD", b"SHLVL", b"_"} | {
    # what the server sets for itself
    b"PGLOCALEDIR",
    b"PGSYSCONFDIR",
    *(f"LC_{part}".encode() for part in ("COLLATE", "CTYPE", "MESSAGES", "MONETARY")),
    *(f"LC_{part}".encode() for part in ("NUMERIC", "TIME")),
}
_USER = """
import os, sys
from pathlib import Path
from sqlalchemy import text
from storage.database import Database
from storage.embedded import EmbeddedPostgres
database = Database()
database.embedded = EmbeddedPostgres(Path(sys.argv[1]))
database.open()
with database.engine.connect() as connection:
    print(connection.execute(text("SHOW statement_timeout")).scalar(), flush=True)
assert os.environ["PGSERVICE"] == "missing"
sys.stdin.read()
"""


def test_a_database_of_the_users_is_reached_by_libpqs_variables(
    tcp_postgres: TcpPostgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PGHOST", "127.0.0.1")
    monkeypatch.setenv("PGPORT", str(tcp_postgres.port))
    monkeypatch.setenv("PGUSER", "postgres")
    monkeypatch.setenv("PGPASSWORD", PASSWORD)
    monkeypatch.setenv("PGOPTIONS", "-c geqo_seed=0.5")
    monkeypatch.setenv("PGAPPNAME", "mine")
    assert shown("postgresql:///postgres") == ("0.5", "15s", "mine")


def test_a_service_of_the_users_is_used_also_after_the_embedded_server_was(
    postgres: EmbeddedPostgres,
    tcp_postgres: TcpPostgres,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    services = tmp_path / "services"
    services.write_text(
        f"[mine]\nhost=127.0.0.1\nport={tcp_postgres.port}\nuser=postgres\n"
        f"dbname=postgres\npassword={PASSWORD}\n"
    )
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    monkeypatch.setenv("PGSERVICE", "mine")
    psycopg2.connect(**postgres.parameters).close()
    assert shown("postgresql://")[1:] == ("15s", "hpo")


def shown(url: str) -> tuple[object, ...]:
    database = Database(url)
    database.open()
    with database.engine.connect() as connection:
        found = [
            connection.execute(text(f"SHOW {name}")).scalar()
            for name in ("geqo_seed", "statement_timeout", "application_name")
        ]
    database.engine.dispose()
    return tuple(found)


@pytest.mark.parametrize(("variable", "value"), [("PGSERVICE", "missing"), ("PGSSLMODE", "wrong")])
def test_a_variable_that_can_not_be_is_told_at_once_and_by_its_words(
    variable: str, value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    database = Database("postgresql://me@127.0.0.1:1/x")
    with pytest.raises(StorageError, match=rf'refuses: .*"{value}"'):
        database.open()
