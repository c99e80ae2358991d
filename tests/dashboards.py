"""Real parts for the tests of the dashboard: its app, its server, and a browser."""

import contextlib
import http.client
import io
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from wsgiref.types import WSGIApplication
from wsgiref.util import setup_testing_defaults

import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState
from playwright.sync_api import Page, sync_playwright

from hpo.dashboard import make_app, serve

_CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_SERVE = """
import sys
from pathlib import Path
from hpo import dashboard
from storage.database import Database
from storage.schema import optuna_storage

database = Database()
database.open()
dashboard.serve(
    optuna_storage(database),
    host=sys.argv[1],
    port=0,
    token_file=Path(sys.argv[2]) if sys.argv[2:] else None,
    ready=lambda link: print(link, flush=True),
)
"""

HOST = "localhost"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What came back; a header that comes twice has both values, with a comma between."""

    status: int
    headers: dict[str, str]
    body: str


def fill(storage: optuna.storages.RDBStorage) -> None:
    """The study "clothes": three trials COMPLETE, one PRUNED."""
    study = optuna.create_study(storage=storage, study_name="clothes", direction="maximize")
    for number in range(4):
        trial = study.ask(
            {
                "lr": FloatDistribution(1e-5, 1e-2, log=True),
                "backbone": CategoricalDistribution(["resnet8", "smallcnn"]),
            }
        )
        for step in (1, 4, 8):
            trial.report(0.5 + step / 20 + number / 100, step)
        if number < 3:
            study.tell(trial, 0.9 + number / 100)
        else:
            study.tell(trial, state=TrialState.PRUNED)


def ask(
    app: WSGIApplication,
    path: str = "/api/studies",
    *,
    method: str = "GET",
    host: str = HOST,
    body: bytes = b"",
    **environ: str,
) -> Answer:
    """One request without a network. environ: further WSGI variables, such as HTTP_COOKIE."""
    path, _, query = path.partition("?")
    given: dict[str, object] = {
        "REQUEST_METHOD": method,
        "SCRIPT_NAME": "",
        "PATH_INFO": path,
        "QUERY_STRING": query,
        "HTTP_HOST": host,
        "CONTENT_TYPE": "application/json",
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.input": io.BytesIO(body),
        **environ,
    }
    setup_testing_defaults(given)
    heads: list[tuple[str, list[tuple[str, str]]]] = []

    def start(
        status: str, headers: list[tuple[str, str]], _: Any = None, /
    ) -> Callable[[bytes], object]:
        heads.append((status, headers))
        return lambda _: None

    answer = app(given, start)
    text = b"".join(answer).decode(errors="replace")
    close = getattr(answer, "close", None)
    if close is not None:
        close()
    status, pairs = heads[-1]
    headers: dict[str, str] = {}
    for name, value in pairs:
        headers[name] = f"{headers[name]}, {value}" if name in headers else value
    return Answer(status=int(status.split()[0]), headers=headers, body=text)


def open_app(storage: optuna.storages.BaseStorage) -> WSGIApplication:
    """As with --no-token."""
    return make_app(storage, allowed_hosts={"localhost", "127.0.0.1", "::1"}, token=None)


def locked_app(
    storage: optuna.storages.BaseStorage,
    token: str = "open sesame",
    clock: Callable[[], float] = time.monotonic,
) -> WSGIApplication:
    """Behind a token. clock: seconds, for the waits after wrong ones."""
    return make_app(storage, allowed_hosts={HOST, "gpu7"}, token=token, clock=clock)


def cookie_of(app: WSGIApplication, link: str) -> str:
    """What the link gives a browser."""
    return ask(app, link).headers["Set-Cookie"].partition(";")[0]


def link_of(
    storage: optuna.storages.RDBStorage,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token_file: Path | None = None,
    no_token: bool = False,
) -> str:
    """The link of a dashboard that ends as soon as it listens."""

    class Listening(Exception):
        pass

    links: list[str] = []

    def ready(link: str) -> None:
        links.append(link)
        raise Listening

    with contextlib.suppress(Listening):
        serve(storage, host=host, port=port, token_file=token_file, no_token=no_token, ready=ready)
    return links[0]


@contextlib.contextmanager
def chromium_page() -> Iterator[Page]:
    """A page of Debian's Chromium."""
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("the browser is missing: install Debian's package chromium", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=_CHROMIUM_ARGS)
        page = browser.new_page()
        page.set_default_timeout(60_000)
        yield page
        browser.close()


@contextlib.contextmanager
def serving(url: str, *arguments: str) -> Iterator[str]:
    """A dashboard in its own process, ended by Ctrl-C; yields the link that it says."""
    checkout = str(Path(__file__).parents[1])
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HPO_STORAGE": url, "PYTHONPATH": checkout},
    )
    assert process.stdout is not None
    with process:
        try:
            link = process.stdout.readline().strip()
            assert link.startswith("http://")
            yield link
            process.send_signal(signal.SIGINT)
            assert process.wait(30) == 0
        finally:
            process.kill()


def enter(link: str) -> dict[str, str]:
    """The header of a browser that came by the link."""
    parts = urlsplit(link)
    connection = http.client.HTTPConnection(parts.netloc, timeout=30)
    connection.request("GET", f"/?{parts.query}")
    answer = connection.getresponse()
    connection.close()
    assert answer.status == 303
    return {"Cookie": (answer.getheader("Set-Cookie") or "").partition(";")[0]}
