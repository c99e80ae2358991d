"""The database's credentials and roles, with a real server behind a password."""

import contextlib
import os
import re
import signal
import time
import urllib.parse
from pathlib import Path

import psycopg2
import pytest
import sqlalchemy

from storage.database import Database
from storage.schema import ensure_tables
from tests.parts import PASSWORD, Hpo, TcpPostgres

DOCUMENT = Path(__file__).parents[2] / "docs" / "security.md"
QUICK = ("--backbone", "smallcnn", "--epochs", "1", "--trials", "2", "--workers", "1")


def execute(server: TcpPostgres, statement: str) -> None:
    with contextlib.closing(psycopg2.connect(server.url)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)


def url_without_password(server: TcpPostgres, user: str) -> str:
    return f"postgresql://{user}@127.0.0.1:{server.port}/postgres"


def test_a_role_with_the_documents_grants_runs_a_study_that_it_could_not_make_tables_for(
    tcp_postgres: TcpPostgres, tmp_path: Path
) -> None:
    before, after = re.findall(r"```sql\n(.*?)```", DOCUMENT.read_text(), re.DOTALL)
    execute(tcp_postgres, before)
    execute(tcp_postgres, f"ALTER ROLE hpo_worker PASSWORD '{PASSWORD}'")
    worker_url = url_without_password(tcp_postgres, "hpo_worker")
    worker = Hpo(tmp_path, {"HPO_STORAGE": worker_url, "PGPASSWORD": PASSWORD})
    refused = worker.run("studies")
    assert refused.returncode == 3
    assert re.fullmatch(r"hpo: .*permission denied.*\n", refused.stderr)
    owner = Database(tcp_postgres.url)
    owner.open()
    ensure_tables(owner)
    owner.engine.dispose()
    execute(tcp_postgres, after)
    done = worker.run("launch", *QUICK)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("digits: 2/2 trials")


def shown_by_the_kernel() -> bytes:
    """The arguments of all processes."""
    found = b""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += path.read_bytes()
    return found


def kill_a_worker(server: TcpPostgres) -> bool:
    """Whether there was one. The tables are asked: `hpo status` starts too slowly to find it."""
    with (
        contextlib.closing(psycopg2.connect(server.url)) as connection,
        connection.cursor() as cursor,
        contextlib.suppress(psycopg2.errors.UndefinedTable),
    ):
        cursor.execute("SELECT pid FROM hpo_workers")
        for (pid,) in cursor.fetchall():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                return True
    return False


def test_the_password_stands_in_no_argument_output_or_file(
    tcp_postgres: TcpPostgres, tmp_path: Path
) -> None:
    home = tmp_path / "home"
    home.mkdir()
    passwords = tmp_path / "passwords"
    quoted = PASSWORD.replace("\\", "\\\\").replace(":", "\\:")
    passwords.write_text(f"127.0.0.1:{tcp_postgres.port}:*:postgres:{quoted}\n")
    passwords.chmod(0o600)
    url = url_without_password(tcp_postgres, "postgres")
    by_file = Hpo(home, {"HPO_STORAGE": url, "PGPASSFILE": str(passwords)})
    by_url = Hpo(home, {"HPO_STORAGE": tcp_postgres.url})
    said = ""
    seen = b""
    for hpo, arguments in ((by_file, QUICK), (by_url, ("--trials", "4"))):
        launcher = hpo.start("launch", *arguments)
        killed = False
        while launcher.poll() is None:
            seen += shown_by_the_kernel()
            killed = killed or kill_a_worker(tcp_postgres)
        out, err = launcher.communicate()
        assert killed
        assert launcher.returncode == 0, err
        said += out + err
    exported = by_url.run("best", "--export", "--out", str(home / "export"))
    assert exported.returncode == 0, exported.stderr
    wrong = Hpo(home, {"HPO_STORAGE": url, "PGPASSWORD": PASSWORD + "x"}).run("status")
    nobody = tcp_postgres.url.replace(f":{tcp_postgres.port}/", ":9/")
    away = Hpo(home, {"HPO_STORAGE": nobody}).run("status")
    assert (wrong.returncode, away.returncode) == (3, 3)
    for done in (exported, wrong, away):
        said += done.stdout + done.stderr
    forms = {PASSWORD, urllib.parse.quote(PASSWORD), urllib.parse.quote(PASSWORD, safe="")}
    places = {"output": said.encode(), "arguments": seen}
    places |= {str(path): path.read_bytes() for path in home.rglob("*") if path.is_file()}
    assert b"hpo.cli" in seen
    assert len(places) > 5
    for place, content in places.items():
        assert not [form for form in forms if form.encode() in content], place


def test_a_statement_that_takes_too_long_is_ended_by_the_server(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("storage.database._STATEMENT_SECONDS", 1)
    database = Database(database_url)
    database.open()
    started = time.monotonic()
    with (
        pytest.raises(sqlalchemy.exc.OperationalError, match="statement timeout"),
        database.engine.connect() as connection,
    ):
        connection.exec_driver_sql("SELECT pg_sleep(30)")
    assert time.monotonic() - started < 10
    database.engine.dispose()
