"""optuna-dashboard on the study's database, behind a door of ours.

The app itself has no login and answers under any host name, so a web page that rebinds its own name
to this machine could delete a study. The door lets in requests for hosts that it knows, changes
only from its own pages, and, beyond this machine, only browsers that came by the link with the
token. waitress serves it: its threads, open connections and request sizes are bounded, those of the
standard library's server are not.
"""

import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import socket
import sys
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

import optuna
import optuna_dashboard
import waitress.server

from storage.database import outage
from trainer.config import ConfigError

logger = logging.getLogger(__name__)

THIS_MACHINE = frozenset({"localhost", "127.0.0.1", "::1"})
_EVERY_ADDRESS = ("", "0.0.0.0", "::")
_CHANGELESS = ("GET", "HEAD", "OPTIONS")
_LARGEST_REQUEST_BYTES = 1 << 20
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
}
_ARTIFACT_HEADERS = {"Content-Disposition": "attachment", "Content-Security-Policy": "sandbox"}


def serve(
    storage: optuna.storages.BaseStorage,
    *,
    host: str = "127.0.0.1",
    port: int = 8080,
    token_file: Path | None = None,
    ready: Callable[[str], None],
) -> None:
    """Serve the dashboard until Ctrl-C (or SystemExit in this thread).

    host: an address or name to listen on. port: 0 takes a free one. token_file: holds the token;
    None: a new one is made beyond this machine. ready: called with the link for the browser once
    the port is open; a new token stands in it, one from a file does not. Raises ConfigError if the
    file can't be used or the address can't be listened on.
    """
    token = _choose_token(host, token_file)
    shown = socket.gethostname() if host in _EVERY_ADDRESS else host
    app = make_app(storage, allowed_hosts={*THIS_MACHINE, shown}, token=token)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)
    with _listen(host, port) as listener:
        server = waitress.server.create_server(
            app, sockets=[listener], ident=None, max_request_body_size=_LARGEST_REQUEST_BYTES
        )
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
    storage: optuna.storages.BaseStorage, *, allowed_hosts: Collection[str], token: str | None
) -> WSGIApplication:
    """The dashboard as a WSGI app behind the door.

    allowed_hosts: names of this server, without a port; with a token any address will do as well,
    since an address can't be rebound. token: None lets everybody in who asks for such a host.
    """
    # without Optuna's cache each poll of the page would read every trial again
    app = optuna_dashboard.wsgi(optuna.storages.get_storage(storage))
    app.catchall = False
    logging.getLogger("optuna_dashboard._bottle_util").addFilter(_say_it_in_one_line)
    return _Door(app, allowed_hosts=allowed_hosts, token=token)


class _Door:
    """WSGI middleware: refuses, lets in by the link, and puts our headers on every answer."""

    def __init__(
        self, app: WSGIApplication, *, allowed_hosts: Collection[str], token: str | None
    ) -> None:
        self._app = app
        self._allowed_hosts = {host.lower() for host in allowed_hosts}
        self._token = token
        # made from the token, which may hold what a cookie can't; the name as well, because cookies
        # know no ports, and two dashboards of one machine would overwrite each other's
        value = hashlib.sha256(b"hpo dashboard " + (token or "").encode()).hexdigest()
        self._cookie = f"hpo_{hashlib.sha256(value.encode()).hexdigest()[:8]}={value}"

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start = _with_headers(environ, start_response)
        if not self._knows_host(environ):
            return _answer(
                start, "403 Forbidden", "unknown host: open it as localhost or by address"
            )
        if self._token is not None and not self._has_cookie(environ):
            return self._let_in(environ, start)
        if environ["REQUEST_METHOD"] not in _CHANGELESS and not _from_own_page(environ):
            return _answer(start, "403 Forbidden", "changes come from the dashboard's own pages")
        # the app looks it up without asking whether it is there
        environ.setdefault("HTTP_ACCEPT_ENCODING", "identity")
        try:
            return self._app(environ, start)
        except Exception as error:
            logger.error("%s: %s", environ.get("PATH_INFO"), _reason(error))
            return _answer(start, "500 Internal Server Error", "no answer from the database")

    def _let_in(self, environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        if not self._came_by_the_link(environ):
            return _answer(start, "401 Unauthorized", "open the link with the token: /?token=...")
        cookie = f"{self._cookie}; Path=/; HttpOnly; SameSite=Strict"
        headers = [("Location", "/"), ("Set-Cookie", cookie), ("Cache-Control", "no-store")]
        return _answer(start, "303 See Other", "welcome", headers)

    def _knows_host(self, environ: WSGIEnvironment) -> bool:
        host = _host_name(environ.get("HTTP_HOST", ""))
        return host in self._allowed_hosts or (self._token is not None and _is_address(host))

    def _has_cookie(self, environ: WSGIEnvironment) -> bool:
        cookies = environ.get("HTTP_COOKIE", "").split(";")
        return any(_same(cookie.strip(), self._cookie) for cookie in cookies)

    def _came_by_the_link(self, environ: WSGIEnvironment) -> bool:
        if environ["REQUEST_METHOD"] != "GET" or environ.get("PATH_INFO") != "/":
            return False
        given = parse_qs(environ.get("QUERY_STRING", "")).get("token", [""])[-1]
        return self._token is not None and _same(given, self._token)


def _same(given: str, expected: str) -> bool:
    return hmac.compare_digest(
        given.encode("utf-8", "surrogateescape"), expected.encode("utf-8", "surrogateescape")
    )


def _host_name(header: str) -> str:
    """The Host header without its port and brackets; "" if it is none."""
    found = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([A-Za-z0-9._-]+))(?::[0-9]+)?", header)
    return (found[1] or found[2]).lower() if found else ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _from_own_page(environ: WSGIEnvironment) -> bool:
    """Browsers say on whose page a changing request was made; scripts say nothing."""
    if environ.get("HTTP_SEC_FETCH_SITE", "same-origin") not in ("same-origin", "none"):
        return False
    host, origin = environ["HTTP_HOST"], environ.get("HTTP_ORIGIN")
    return origin in (None, f"http://{host}", f"https://{host}")


def _with_headers(environ: WSGIEnvironment, start_response: StartResponse) -> StartResponse:
    added = dict(_HEADERS)
    if environ.get("PATH_INFO", "").startswith("/artifacts/"):
        added |= _ARTIFACT_HEADERS
    dropped = {name.lower() for name in added} | {"access-control-allow-origin"}

    def start(
        status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        kept = [(name, value) for name, value in headers if name.lower() not in dropped]
        return start_response(status, kept + list(added.items()), exc_info)

    return start


def _answer(
    start: StartResponse, status: str, line: str, headers: Iterable[tuple[str, str]] = ()
) -> list[bytes]:
    body = f"{line}\n".encode()
    always = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))]
    start(status, [*always, *headers])
    return [body]


def _choose_token(host: str, token_file: Path | None) -> str | None:
    if token_file is None:
        return None if host in THIS_MACHINE else secrets.token_urlsafe(32)
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


def _reason(error: BaseException) -> str:
    return outage(error) or str(error).partition("\n")[0] or type(error).__name__


def _say_it_in_one_line(record: logging.LogRecord) -> bool:
    """The app logs a stack trace with each failed call; a database that is away is no bug."""
    error = sys.exc_info()[1]
    if error is not None:
        record.msg, record.args = _reason(error), ()
    return True
