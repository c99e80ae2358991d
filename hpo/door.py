"""The door before the dashboard: who comes in, and with which headers answers leave.

The app behind it has no login and answers under any host name, so a web page that rebinds its own
name to this machine could delete a study. The door lets in requests for hosts that it knows, from
browsers that came by the link with the token, and changes only from the dashboard's own pages.
"""

import ipaddress
import logging
import re
import secrets
import time
from collections.abc import Callable, Collection, Iterable
from typing import Any
from urllib.parse import parse_qs, urlsplit
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from hpo.guesses import Guesses, same
from storage.database import outage

logger = logging.getLogger(__name__)

READING = ("GET", "HEAD", "OPTIONS")
"""Methods that change nothing."""
_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}
# the app's own policy for its pages says where scripts and images come from: both hold
_POLICY = "object-src 'none'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
_ARTIFACT_HEADERS = {"Content-Disposition": "attachment"}


class Door:
    """WSGI middleware: refuses, lets in by the link, and puts our headers on every answer."""

    def __init__(
        self,
        app: WSGIApplication,
        *,
        allowed_hosts: Collection[str],
        token: str | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """allowed_hosts: names of this server, without a port; with a token any address will do as
        well, since an address can't be rebound. token: None lets everybody in who asks for such a
        host.
        """
        self._app = app
        self._allowed_hosts = {host.lower() for host in allowed_hosts}
        self._guesses = None if token is None else Guesses(token, clock=clock)
        # random, so that guessing a cookie is no way around the wait for wrong tokens; the name as
        # well, since cookies know no ports: two dashboards would overwrite each other's
        self._cookie = f"hpo_{secrets.token_hex(4)}={secrets.token_urlsafe(32)}"

    def __call__(self, environ: WSGIEnvironment, start_response: StartResponse) -> Iterable[bytes]:
        start = _with_headers(environ, start_response)
        if not self._knows_host(environ):
            return _answer(
                start, "403 Forbidden", "unknown host: open it as localhost or by address"
            )
        if self._guesses is not None and not self._has_cookie(environ):
            return _let_in(environ, start, self._guesses, self._cookie)
        if environ["REQUEST_METHOD"] not in READING and not _from_own_page(environ):
            return _answer(start, "403 Forbidden", "changes come from the dashboard's own pages")
        # the app looks it up without asking whether it is there
        environ.setdefault("HTTP_ACCEPT_ENCODING", "identity")
        try:
            return self._app(environ, start)
        except Exception as error:
            logger.error("%s: %s", environ.get("PATH_INFO"), reason_of(error))
            return _answer(start, "500 Internal Server Error", "no answer from the database")

    def _knows_host(self, environ: WSGIEnvironment) -> bool:
        host = _host_name(environ.get("HTTP_HOST", ""))
        return host in self._allowed_hosts or (self._guesses is not None and _is_address(host))

    def _has_cookie(self, environ: WSGIEnvironment) -> bool:
        cookies = environ.get("HTTP_COOKIE", "").split(";")
        return any(same(cookie.strip(), self._cookie) for cookie in cookies)


def reason_of(error: BaseException) -> str:
    """What went wrong, in one line for the log."""
    return outage(error) or str(error).partition("\n")[0] or type(error).__name__


def _let_in(
    environ: WSGIEnvironment, start: StartResponse, guesses: Guesses, cookie: str
) -> Iterable[bytes]:
    """The answer to a browser without the cookie, which it gets by the link with the token."""
    given = _token_of_link(environ)
    is_right, seconds = False, 0
    if given is not None:
        is_right, seconds = guesses.judge(environ.get("REMOTE_ADDR", ""), given)
    if is_right:
        words = f"{cookie}; Path=/; HttpOnly; SameSite=Strict"
        headers = [("Location", "/"), ("Set-Cookie", words), ("Cache-Control", "no-store")]
        return _answer(start, "303 See Other", "welcome", headers)
    if seconds:
        line = f"too many wrong tokens: try again in {seconds} s"
        return _answer(start, "429 Too Many Requests", line, [("Retry-After", str(seconds))])
    return _answer(start, "401 Unauthorized", "open the link with the token: /?token=...")


def _token_of_link(environ: WSGIEnvironment) -> str | None:
    """The token that the request brings, None if it is none for the link."""
    if environ["REQUEST_METHOD"] != "GET" or environ.get("PATH_INFO") != "/":
        return None
    try:
        tokens = parse_qs(environ.get("QUERY_STRING", "")).get("token")
    except ValueError:  # more fields than anybody needs
        return None
    return tokens[-1] if tokens else None


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
    """Browsers tell on whose page a changing request was made; scripts tell nothing."""
    if environ.get("HTTP_SEC_FETCH_SITE", "same-origin") not in ("same-origin", "none"):
        return False
    own = [f"{scheme}://{environ['HTTP_HOST']}" for scheme in ("http", "https")]
    origin, referer = environ.get("HTTP_ORIGIN"), environ.get("HTTP_REFERER")
    if origin is None and referer is not None:
        origin = _origin_of(referer)
    return origin is None or origin in own


def _origin_of(page: str) -> str:
    try:
        found = urlsplit(page)
    except ValueError:
        return "null"
    return f"{found.scheme}://{found.netloc}"


def _with_headers(environ: WSGIEnvironment, start_response: StartResponse) -> StartResponse:
    replaced, policy = dict(_HEADERS), _POLICY
    if environ.get("PATH_INFO", "").startswith("/artifacts/"):
        # an HTML file would run on the dashboard's own origin
        replaced |= _ARTIFACT_HEADERS
        policy = "sandbox"
    dropped = {name.lower() for name in replaced} | {"access-control-allow-origin"}
    added = [*replaced.items(), ("Content-Security-Policy", policy)]

    def start(
        status: str, headers: list[tuple[str, str]], exc_info: Any = None, /
    ) -> Callable[[bytes], object]:
        kept = [(name, value) for name, value in headers if name.lower() not in dropped]
        return start_response(status, kept + added, exc_info)

    return start


def _answer(
    start: StartResponse, status: str, line: str, headers: Iterable[tuple[str, str]] = ()
) -> list[bytes]:
    body = f"{line}\n".encode()
    always = [("Content-Type", "text/plain; charset=utf-8"), ("Content-Length", str(len(body)))]
    start(status, [*always, *headers])
    return [body]
