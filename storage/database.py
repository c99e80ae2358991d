"""URL -> engine. The one place that knows drivers, pools, time-outs and retries."""

import contextlib
import logging
import os
import random
import re
import select
import threading
import time
from collections.abc import Callable
from typing import Any, TypeVar

import psycopg2
import psycopg2.errors
import psycopg2.extensions
import sqlalchemy
from sqlalchemy import pool as sqlalchemy_pool

from storage.embedded import EmbeddedPostgres
from storage.errors import DatabaseUnreachable, StorageError
from storage.home import home
from storage.libpq import is_parameter, service_of_the_environment

logger = logging.getLogger(__name__)
Result = TypeVar("Result")

FIRST_ANSWER_SECONDS = 10.0
"""How long a command tries for its first connection."""
OUTAGE_SECONDS = 900.0
"""How long running workers and launchers wait for a database that has gone."""
_SAY_AGAIN_SECONDS = 60.0
_CONNECT_SECONDS = 5.0
_STATEMENT_SECONDS = 15
_ANSWER_SECONDS = 20.0
"""Of silence until a connection counts as dead, also one whose server is stopped."""
_IDLE_SECONDS = 20.0
"""In a transaction: a client that vanished or was stopped must not keep its locks for longer."""
_NO_OPTIONS = "unsupported startup parameter"
_NO_ROOM = "No space left on device"
_DRIVER = "postgresql+psycopg2"
_INVALID_VALUE = re.compile(r'invalid \w+ value: "')
"""libpq's words for a parameter, of the URL or the environment, that can't be so."""
_OUTAGES = (
    psycopg2.OperationalError,
    psycopg2.InterfaceError,
    psycopg2.errors.IdleInTransactionSessionTimeout,
)


def normalise_url(url: str) -> sqlalchemy.URL:
    """The URL with our driver. Raises StorageError, without the password, if it isn't Postgres."""
    try:
        if "%00" in url or "\0" in url:
            raise ValueError("NUL, which no part of a URL may hold")
        parsed = sqlalchemy.make_url(url)
        name = parsed.drivername.split("+")[0]
    except (sqlalchemy.exc.ArgumentError, ValueError) as error:
        raise StorageError(
            "the storage is no database URL: give postgresql://USER@HOST:PORT/DATABASE"
        ) from error
    if name not in ("postgres", "postgresql"):
        raise StorageError(
            f"{name} can't hold a study: give a Postgres, postgresql://USER@HOST:PORT/DATABASE, "
            "or leave --storage out for the embedded one"
        )
    for key, value in parsed.query.items():
        if not is_parameter(key):
            raise StorageError(
                f"the storage's URL has a parameter that Postgres doesn't know, {key[:40]!r}: "
                "leave it out (a schema is given by ?options=-csearch_path%3DNAME)"
            )
        if not isinstance(value, str):
            raise StorageError(
                f"the storage's URL gives {key} more than once: give it once (hosts as A,B)"
            )
    return parsed.set(drivername=_DRIVER)


class Database:
    """A Postgres and how this process talks to it: few connections, each call bounded in time.

    One connection is kept, a second one is opened while two threads need one.
    """

    def __init__(self, url: str | None = None) -> None:
        """url: any Postgres URL; None: HPO_STORAGE, or else the embedded server of HPO_HOME."""
        url = url or os.environ.get("HPO_STORAGE")
        self.embedded = None if url else EmbeddedPostgres(home() / "postgres")
        self.url = normalise_url(url) if url else None
        self.patience_seconds = FIRST_ANSWER_SECONDS
        self.cancelled = threading.Event()
        """Set: no more waiting, what fails now has failed."""
        self.while_waiting: Callable[[], None] = lambda: None
        """Called about once a second by whoever waits for the database."""
        self.pool: sqlalchemy_pool.Pool = sqlalchemy_pool.QueuePool(
            self._connect, pool_size=1, max_overflow=2, pre_ping=True, timeout=60, use_lifo=True
        )
        self.engine = sqlalchemy.create_engine(f"{_DRIVER}://", pool=self.pool)
        self._takes_options = True
        """Whether settings may stand in a connection's first packet."""

    @property
    def name(self) -> str:
        """For people: where the database is, never the password."""
        if self.url is None:
            return "the embedded Postgres"
        return f"Postgres at {self.url.host or 'the local socket'}:{self.url.port or 5432}"

    def open(self) -> None:
        """Make sure that the database answers. Raises DatabaseUnreachable or StorageError."""
        if self.embedded is not None:
            self.embedded.join()

        def first_answer() -> None:
            with self.engine.connect() as connection:
                connection.exec_driver_sql("SELECT 1")

        self.patiently(first_answer)

    def patiently(self, call: Callable[[], Result]) -> Result:
        """The result of `call`, tried again with growing pauses while the database is away.

        `call` must be safe to run again when it is not known whether its COMMIT went through.
        Raises DatabaseUnreachable when `patience_seconds` are over, StorageError for what waiting
        doesn't mend (a wrong password, missing rights).
        """
        started = time.monotonic()
        deadline = started + self.patience_seconds
        pause = 0.05
        say_at = started + 1.0
        while True:
            try:
                return call()
            except Exception as error:
                reason = outage(error)
                if reason is None:
                    raise
                if _NO_OPTIONS in reason:
                    reason += (
                        ": take options out of the URL and PGOPTIONS, or let pgbouncer ignore them"
                    )
                if _NO_ROOM in reason:
                    reason += ": make room on the disk of its data"
                if hopeless(reason):
                    raise StorageError(f"{self.name} refuses: {reason}") from None
                if time.monotonic() + pause > deadline or self.cancelled.is_set():
                    raise DatabaseUnreachable(f"{self.name} gives no answer: {reason}") from None
                waited = time.monotonic() - started
                if time.monotonic() >= say_at:
                    say_at += _SAY_AGAIN_SECONDS
                    logger.warning("waiting for the database (%.0f s so far): %s", waited, reason)
                self._pause(pause * random.uniform(0.5, 1.0))
                pause = min(2 * pause, 5.0)
                if self.embedded is not None:
                    with contextlib.suppress(DatabaseUnreachable):
                        self.embedded.ensure()

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self.while_waiting()
        while (left := deadline - time.monotonic()) > 0 and not self.cancelled.is_set():
            self.cancelled.wait(min(left, 1.0))
            self.while_waiting()

    def _connect(self) -> psycopg2.extensions.connection:
        psycopg2.extensions.set_wait_callback(_wait)
        given: dict[str, Any]
        if self.embedded is not None:
            given = dict(self.embedded.parameters)
        else:
            assert self.url is not None
            given = {"host": self.url.host, "port": self.url.port, "dbname": self.url.database,
                     "user": self.url.username, "password": self.url.password}  # fmt: skip
            given["service"] = service_of_the_environment()
            given |= dict(self.url.query)
        given.setdefault("application_name", os.environ.get("PGAPPNAME") or "hpo")
        given.setdefault("keepalives_idle", 5)
        given.setdefault("keepalives_interval", 5)
        given.setdefault("keepalives_count", 3)
        given.setdefault("tcp_user_timeout", int(_ANSWER_SECONDS * 1000))
        given = {key: value for key, value in given.items() if value is not None}
        if self._takes_options:
            try:
                return psycopg2.connect(**{**given, "options": _with_settings(given)})
            except psycopg2.OperationalError as error:
                if _NO_OPTIONS not in str(error):
                    raise
                self._takes_options = False  # pgbouncer, as it comes
        connection = psycopg2.connect(**given)
        try:
            with connection.cursor() as cursor:
                cursor.execute(";".join(f"SET {name}='{to}'" for name, to in _settings().items()))
            connection.commit()
        except BaseException:
            connection.close()
            raise
        return connection


def _settings() -> dict[str, str]:
    """Of each connection: told in its first packet, or else by a statement."""
    return {
        "statement_timeout": f"{_STATEMENT_SECONDS}s",
        "lock_timeout": "10s",
        "timezone": "UTC",
        "idle_in_transaction_session_timeout": f"{int(_IDLE_SECONDS * 1000)}ms",
    }


def _with_settings(given: dict[str, Any]) -> str:
    options = given.get("options", os.environ.get("PGOPTIONS", ""))
    return " ".join([options, *(f"-c {name}={to}" for name, to in _settings().items())])


def outage(error: BaseException) -> str | None:
    """Why the database could not be asked, in one line; None if this is another kind of error.

    Optuna wraps what SQLAlchemy raises, SQLAlchemy what psycopg2 raises.
    """
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, _OUTAGES):
            return " ".join(str(cause).split()) or type(cause).__name__
        if isinstance(cause, sqlalchemy.exc.TimeoutError):
            return "all connections of this process are busy"
        if isinstance(cause, sqlalchemy.exc.PendingRollbackError):
            cause = cause.__context__  # Optuna's sampler had gone on after the first error
        else:
            cause = getattr(cause, "orig", None) or cause.__cause__
    return None


def hopeless(reason: str) -> bool:
    """Whether waiting won't help."""
    signs = (
        "authentication failed", "no password supplied", "no pg_hba.conf entry",
        "does not exist", "invalid connection option", "root certificate file",
        "invalid integer value", "invalid port number", "definition of service", "service file",
        _NO_OPTIONS,
    )  # fmt: skip
    return any(sign in reason for sign in signs) or bool(_INVALID_VALUE.search(reason))


def _wait(connection: psycopg2.extensions.connection) -> None:
    """Wait for the server, but not for ever: libpq has no client-side time-out of its own.

    A server that is stopped or behind a black hole neither answers nor closes.
    """
    connecting = connection.status == psycopg2.extensions.STATUS_SETUP
    patience_seconds = _CONNECT_SECONDS if connecting else _ANSWER_SECONDS
    deadline = time.monotonic() + patience_seconds
    while True:
        state = connection.poll()
        if state == psycopg2.extensions.POLL_OK:
            return
        left = deadline - time.monotonic()
        if left <= 0:
            # the words by which SQLAlchemy knows a dead connection
            raise psycopg2.OperationalError(
                f"server closed the connection unexpectedly: no answer in {patience_seconds:.0f} s"
            )
        reads = [connection] if state == psycopg2.extensions.POLL_READ else []
        writes = [connection] if state == psycopg2.extensions.POLL_WRITE else []
        select.select(reads, writes, [], left)
