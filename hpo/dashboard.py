"""optuna-dashboard on the study's database: behind a door, its routes under rules, bounded."""

import logging
import secrets
import socket
import sys
import time
from collections.abc import Callable, Collection
from pathlib import Path
from wsgiref.types import WSGIApplication

import optuna
import optuna_dashboard

from hpo.dashboard_routes import Rules
from hpo.dashboard_server import DashboardServer
from hpo.door import Door, reason_of
from trainer.config import ConfigError

logger = logging.getLogger(__name__)

THIS_MACHINE = frozenset({"localhost", "127.0.0.1", "::1"})
_EVERY_ADDRESS = ("", "0.0.0.0", "::")


def serve(
    storage: optuna.storages.BaseStorage,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    token_file: Path | None = None,
    no_token: bool = False,
    ready: Callable[[str], None],
) -> None:
    """Serve the dashboard until Ctrl-C (or SystemExit in this thread).

    host: an address or name to listen on. port: 0 takes a free one. token_file: holds the token;
    None: a new one is made. no_token: let in whoever can reach the port, on this machine only.
    ready: called with the link for the browser once the port is open; a new token stands in it, one
    from a file does not. Raises ConfigError if the file can't be used, the address can't be
    listened on, or is not to be listened on without a token.
    """
    token = _choose_token(host, token_file, no_token=no_token)
    shown = socket.gethostname() if host in _EVERY_ADDRESS else host
    app = make_app(storage, allowed_hosts={*THIS_MACHINE, shown}, token=token)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    with _listen(host, port) as listener:
        server = DashboardServer(app, listener)
        try:
            address = f"[{shown}]" if ":" in shown else shown
            link = f"http://{address}:{listener.getsockname()[1]}/"
            if token_file is not None:
                link += f"?token=(the word in {token_file})"
            elif token is not None:
                link += f"?token={token}"
            ready(link)
            server.run()
        finally:
            server.close()


def make_app(
    storage: optuna.storages.BaseStorage,
    *,
    allowed_hosts: Collection[str],
    token: str | None,
    clock: Callable[[], float] = time.monotonic,
) -> WSGIApplication:
    """The dashboard as a WSGI app behind the door, which the other arguments are for."""
    # without Optuna's cache each poll of the page would read every trial again
    cached = optuna.storages.get_storage(storage)
    app = optuna_dashboard.wsgi(cached)
    app.catchall = False
    app.install(Rules(cached))
    logging.getLogger("optuna_dashboard._bottle_util").addFilter(_say_it_in_one_line)
    return Door(app, allowed_hosts=allowed_hosts, token=token, clock=clock)


def _choose_token(host: str, token_file: Path | None, *, no_token: bool) -> str | None:
    if no_token:
        if host not in THIS_MACHINE:
            raise ConfigError(f"--no-token is for this machine alone: {host} needs a token")
        if token_file is not None:
            raise ConfigError("--no-token and --token-file exclude each other: give one of them")
        return None
    if token_file is None:
        return secrets.token_urlsafe(32)
    try:
        token = token_file.read_text(encoding="utf-8").strip()
        if token_file.stat().st_mode & 0o077:
            logger.warning("others can read %s: chmod 600 it", token_file)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"can't read the token file {token_file}: {reason}") from error
    if len(token.split()) != 1:
        raise ConfigError(f"the token file {token_file} must hold one word")
    return token


def _listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise ConfigError(f"port must be in 0..65535, got {port}")
    address = "127.0.0.1" if host == "localhost" else host
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family)
    except OSError as error:
        raise ConfigError(f"can't listen on {host}, port {port}: {error.strerror}") from error


def _say_it_in_one_line(record: logging.LogRecord) -> bool:
    """The app logs a stack trace with each failed call; a database that is away is no bug."""
    error = sys.exc_info()[1]
    if error is not None:
        record.msg, record.args = reason_of(error), ()
    return True
