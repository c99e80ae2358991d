"""Real parts for the tests: a Postgres over TCP, the commands as processes, and helpers."""

import contextlib
import os
import secrets
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psycopg2
import sqlalchemy

from storage.database import Database
from storage.embedded import EmbeddedPostgres
from storage.embedded_programs import ServerUser, programs, system_user
from storage.nameless import with_a_name
from storage.studies import StudyRecord, create_study

PASSWORD = "s3cret{}%40-" + secrets.token_hex(4)
"""Stands in no log, error, argument or file: tests search for it."""


def make_study(
    database: Database, *, budget: int = 5, lease_seconds: float = 30.0, name: str = "study"
) -> StudyRecord:
    """A study whose spec says no more than what storage/ reads of it."""
    return create_study(database, name, spec={"lease_seconds": lease_seconds}, budget=budget)


def execute(server: EmbeddedPostgres, statement: str) -> None:
    """Run a statement that can't be in a transaction."""
    with contextlib.closing(psycopg2.connect(**server.parameters)) as connection:
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)


def url_of(server: EmbeddedPostgres, name: str) -> str:
    """The URL of a database of the embedded server."""
    url = sqlalchemy.URL.create(
        "postgresql",
        username="postgres",
        database=name,
        query={"host": server.parameters["host"]},
    )
    return url.render_as_string(hide_password=False)


@dataclass
class TcpPostgres:
    """A Postgres over TCP behind a password, which tests start, stop and kill."""

    folder: Path
    port: int

    @property
    def url(self) -> str:
        """With the password in it."""
        return sqlalchemy.URL.create(
            "postgres",
            username="postgres",
            password=PASSWORD,
            host="127.0.0.1",
            port=self.port,
            database="postgres",
        ).render_as_string(hide_password=False)

    def make(self) -> None:
        """initdb."""
        data, password_file = self.folder / "data", self.folder / "password"
        data.mkdir(mode=0o700)
        password_file.write_text(PASSWORD)
        for path in (self.folder, data, password_file):
            os.chown(path, self._user.uid, self._user.gid)
        self._run("initdb", "-A", "scram-sha-256", "-U", "postgres", "--pwfile=../password")
        password_file.unlink()

    def start(self) -> None:
        """Returns when the server answers."""
        self._run(
            "pg_ctl", "start", "-w", "-o", f"-h 127.0.0.1 -p {self.port} -k .", "-l", "../log"
        )

    def stop(self, mode: str) -> None:
        """mode: fast or immediate."""
        self._run("pg_ctl", "stop", "-w", "-m", mode)

    @property
    def _user(self) -> ServerUser:
        if os.geteuid() == 0:
            return system_user("pgserver")
        return ServerUser(uid=os.geteuid(), gid=os.getegid())

    def _run(self, program: str, *args: str) -> None:
        user = self._user
        with with_a_name(user.uid, user.gid) as (variables, descriptors):
            subprocess.run(
                [str(programs(user) / program), *args, "-D", "/proc/self/cwd"],
                check=True,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env={**os.environ, **variables},
                pass_fds=descriptors,
                # the folders above may be closed to that user
                cwd=self.folder / "data",
                **user.demotion,
            )


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass(frozen=True)
class Hpo:
    """The commands, as a user runs them, with a home of their own."""

    home: Path
    variables: Mapping[str, str] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        """Of each command."""
        return {**os.environ, "HPO_HOME": str(self.home), **self.variables}

    def start(self, *args: str, own_session: bool = False) -> subprocess.Popen[str]:
        """The command, running. own_session: as in a terminal of its own."""
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "hpo.cli", *args],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment,
            cwd=self.home,
            start_new_session=own_session,
        )

    def run(self, *args: str, timeout: float = 300) -> subprocess.CompletedProcess[str]:
        """The command, ended."""
        process = self.start(*args)
        try:
            out, err = process.communicate(timeout=timeout)
        finally:
            process.kill()
        return subprocess.CompletedProcess(args, process.returncode, out, err)


def documented_module() -> str:
    """The module of docs/lightning.md, as it stands there."""
    text = (Path(__file__).parents[1] / "docs" / "lightning.md").read_text(encoding="utf-8")
    return text.partition("```python\n")[2].partition("```")[0]
