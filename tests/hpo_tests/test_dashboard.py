"""The dashboard's door, and the pages behind it in a real browser."""

import contextlib
import http.client
import io
import logging
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from wsgiref.types import WSGIApplication
from wsgiref.util import setup_testing_defaults
from wsgiref.validate import validator

import optuna
import optuna_dashboard
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState
from playwright.sync_api import Page, sync_playwright

from hpo.dashboard import make_app, serve
from storage.database import Database, normalise_url
from storage.embedded import EmbeddedPostgres
from storage.schema import optuna_storage
from tests.parts import execute, free_port, url_of
from trainer.config import ConfigError

CHROMIUM_ARGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
SERVE = """
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
    status: int
    headers: dict[str, str]
    body: str


@pytest.fixture(scope="module")
def url(postgres: EmbeddedPostgres) -> str:
    """Of a database for this file alone."""
    execute(postgres, "CREATE DATABASE dashboard TEMPLATE template_hpo")
    return url_of(postgres, "dashboard")


@pytest.fixture(scope="module")
def storage(url: str) -> Iterator[optuna.storages.RDBStorage]:
    """Holds the study "clothes": three trials COMPLETE, one PRUNED."""
    database = Database(url)
    storage = optuna_storage(database)
    fill(storage)
    yield storage
    storage.scoped_session.remove()
    database.engine.dispose()


def fill(storage: optuna.storages.RDBStorage) -> None:
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
    heads: list[tuple[str, dict[str, str]]] = []

    def start(
        status: str, headers: list[tuple[str, str]], _: Any = None, /
    ) -> Callable[[bytes], object]:
        heads.append((status, dict(headers)))
        return lambda _: None

    answer = app(given, start)
    text = b"".join(answer).decode(errors="replace")
    close = getattr(answer, "close", None)
    if close is not None:
        close()
    status, headers = heads[-1]
    return Answer(status=int(status.split()[0]), headers=headers, body=text)


def open_app(storage: optuna.storages.BaseStorage) -> WSGIApplication:
    return make_app(storage, allowed_hosts={"localhost", "127.0.0.1", "::1"}, token=None)


def locked_app(storage: optuna.storages.BaseStorage, token: str = "open sesame") -> WSGIApplication:
    return make_app(storage, allowed_hosts={HOST, "gpu7"}, token=token)


def cookie_of(app: WSGIApplication, link: str) -> str:
    return ask(app, link).headers["Set-Cookie"].partition(";")[0]


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1:8080", "[::1]:8080"])
def test_this_machine_comes_in_without_a_token(
    storage: optuna.storages.RDBStorage, host: str
) -> None:
    answer = ask(open_app(storage), host=host)
    assert answer.status == 200
    assert "clothes" in answer.body


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "me@localhost",
        "localhost, evil.example",
        "localhost/",
        "10.0.0.5",
        "[::1",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/", "/dashboard", "/api/studies", "/static/bundle.js"])
def test_a_foreign_host_is_refused(
    storage: optuna.storages.RDBStorage, host: str, path: str
) -> None:
    answer = ask(open_app(storage), path, host=host)
    assert answer.status == 403
    assert "clothes" not in answer.body


def test_a_foreign_host_is_refused_with_the_token_too(
    storage: optuna.storages.RDBStorage,
) -> None:
    app = locked_app(storage)
    cookie = cookie_of(app, "/?token=open+sesame")
    assert ask(app, host="evil.example", HTTP_COOKIE=cookie).status == 403
    assert ask(app, "/?token=open+sesame", host="evil.example").status == 403
    assert ask(app, host="gpu7:8080", HTTP_COOKIE=cookie).status == 200
    # whoever rebinds a name needs a name
    assert ask(app, host="10.0.0.5:8080", HTTP_COOKIE=cookie).status == 200


def test_without_the_token_every_route_answers_401(storage: optuna.storages.RDBStorage) -> None:
    app = locked_app(storage)
    routes = optuna_dashboard.wsgi(optuna.storages.get_storage(storage)).routes
    assert len(routes) > 20
    for route in routes:
        path = re.sub(r"<[^<>]*(\(.*\))?[^<>]*>", "1", route.rule)
        for cookie in ("", "hpo_dashboard=1", cookie_of(app, "/?token=open+sesame")[:-1]):
            answer = ask(app, path, method=route.method, HTTP_COOKIE=cookie)
            assert answer.status == 401, (route.method, path)
    for guess in ("", "open", "open+sesame+", "%00", "%ff%fe"):
        assert ask(app, f"/?token={guess}").status == 401
    assert ask(app, "/dashboard?token=open+sesame").status == 401
    assert ask(app, "/?token=open+sesame", method="POST").status == 401
    names = [study.study_name for study in optuna.get_all_study_summaries(storage)]
    assert names == ["clothes"]


def test_the_link_sets_a_cookie_that_opens_the_pages(storage: optuna.storages.RDBStorage) -> None:
    app = locked_app(storage)
    answer = ask(app, "/?token=open+sesame")
    assert answer.status == 303
    assert answer.headers["Location"] == "/"
    cookie, *attributes = answer.headers["Set-Cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} == set(attributes)
    assert "sesame" not in cookie
    assert ask(app, HTTP_COOKIE=f"theme=dark; {cookie}").status == 200
    assert ask(locked_app(storage, "another"), HTTP_COOKIE=cookie).status == 401


@pytest.mark.parametrize("path", ["/", "/dashboard", "/api/studies", "/static/nothing"])
def test_every_answer_forbids_sniffing_and_framing(
    storage: optuna.storages.RDBStorage, path: str
) -> None:
    for app in (open_app(storage), locked_app(storage)):
        for host in (HOST, "evil.example"):
            headers = ask(app, path, host=host).headers
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["X-Frame-Options"] == "DENY"


def test_artifacts_come_as_attachments(storage: optuna.storages.RDBStorage) -> None:
    headers = ask(open_app(storage), "/artifacts/1/1/abc").headers
    assert headers["Content-Disposition"] == "attachment"
    assert headers["Content-Security-Policy"] == "sandbox"
    assert "Access-Control-Allow-Origin" not in headers


def test_a_change_from_another_sites_page_is_refused(storage: optuna.storages.RDBStorage) -> None:
    app = open_app(storage)
    note = b'{"version": 1, "body": "a note"}'

    def change(**environ: str) -> int:
        return ask(app, "/api/studies/1/note", method="PUT", body=note, **environ).status

    assert change(HTTP_ORIGIN="http://evil.example") == 403
    assert change(HTTP_ORIGIN="null") == 403
    assert change(HTTP_SEC_FETCH_SITE="cross-site") == 403
    assert change(HTTP_ORIGIN=f"http://{HOST}", HTTP_SEC_FETCH_SITE="same-origin") == 204


def test_the_door_keeps_to_the_wsgi_specification(storage: optuna.storages.RDBStorage) -> None:
    for app in (open_app(storage), locked_app(storage)):
        answer = ask(validator(app), "/api/studies", CONTENT_TYPE="text/plain", CONTENT_LENGTH="0")
        assert answer.status in (200, 401)


def test_a_request_without_accept_encoding_gets_its_file(
    storage: optuna.storages.RDBStorage,
) -> None:
    assert ask(open_app(storage), "/favicon.ico").status == 200


@pytest.mark.usefixtures("storage")
def test_a_database_that_is_away_is_one_line_in_the_log(
    url: str, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database(url)
    app = open_app(optuna_storage(database))
    assert ask(app).status == 200
    database.engine.dispose()
    database.url = normalise_url(f"postgresql://127.0.0.1:{free_port()}/")
    for path in ("/api/studies", "/csv/1"):
        caplog.clear()
        answer = ask(app, path)
        assert answer.status == 500
        assert "Traceback" not in answer.body
        said = [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR]
        assert len(said) == 1
        assert "refused" in said[0]
        assert "\n" not in said[0]
    database.engine.dispose()


def test_off_this_machine_it_is_never_served_without_a_token(
    storage: optuna.storages.RDBStorage,
) -> None:
    first, second = link_of(storage, host="0.0.0.0"), link_of(storage, host="0.0.0.0")
    assert first.startswith(f"http://{socket.gethostname()}:")
    tokens = [link.partition("/?token=")[2] for link in (first, second)]
    assert min(map(len, tokens)) > 40
    assert tokens[0] != tokens[1]
    for host in ("127.0.0.1", "localhost"):
        assert re.fullmatch(rf"http://{host}:[0-9]+/", link_of(storage, host=host))


def test_the_token_file_holds_one_word(
    storage: optuna.storages.RDBStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "token"
    with pytest.raises(ConfigError, match=r"can't read the token file .*: No such file"):
        link_of(storage, token_file=file)
    for words in ("", "two words", "\n"):
        file.write_text(words)
        with pytest.raises(ConfigError, match="must hold one word"):
            link_of(storage, token_file=file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not text"):
        link_of(storage, token_file=file)
    file.write_text("sesame\n")
    file.chmod(0o644)
    assert link_of(storage, token_file=file).endswith(f"/?token=(the word in {file})")
    assert "chmod 600" in caplog.text
    assert "sesame" not in caplog.text
    caplog.clear()
    file.chmod(0o600)
    assert "sesame" not in link_of(storage, host="0.0.0.0", token_file=file)
    assert not caplog.records


def test_an_address_that_cannot_be_listened_on_is_one_line(
    storage: optuna.storages.RDBStorage,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"can't listen on localhost, port {port}: .*in use"):
            link_of(storage, host="localhost", port=port)
    for port in (-1, 65536):
        with pytest.raises(ConfigError, match=rf"port must be in 0\.\.65535, got {port}"):
            link_of(storage, port=port)
    with pytest.raises(ConfigError, match=r"can't listen on nowhere\.invalid"):
        link_of(storage, host="nowhere.invalid")


@pytest.mark.usefixtures("storage")
def test_the_server_bounds_requests_and_ends_by_ctrl_c(url: str) -> None:
    with serving(url, "127.0.0.1") as link:
        connection = http.client.HTTPConnection(urlsplit(link).netloc, timeout=30)
        connection.request("GET", "/api/studies")
        answer = connection.getresponse()
        assert answer.status == 200
        assert b"clothes" in answer.read()
        assert answer.getheader("Server") is None
        connection.putrequest("POST", "/api/studies")
        connection.putheader("Content-Length", str(2 << 20))
        connection.endheaders()
        assert connection.getresponse().status == 413
        connection.close()


@pytest.mark.usefixtures("storage")
def test_the_browser_shows_the_study_its_trials_and_their_curves(url: str) -> None:
    with serving(url, "127.0.0.1") as link, chromium_page() as page:
        assert "token" not in link
        page.goto(link)
        page.get_by_text("clothes").first.click()
        page.wait_for_url("**/studies/1**")
        curves = page.locator("#graph-intermediate-values")
        curves.locator(".scatterlayer .trace").nth(3).wait_for()
        assert "trial #0" in curves.inner_text()
        assert "trial #3" in curves.inner_text()
        page.goto(f"{link}dashboard/studies/1/trials")
        page.get_by_text("Trial 0 (trial_id=").wait_for()
        text = page.locator("body").inner_text()
        assert "4 Trials" in text
        assert "Pruned" in text
        assert re.search(r"Intermediate Values\s+1 0.55\s+4 0.7\s+8 0.9", text)


@pytest.mark.usefixtures("storage")
def test_the_browser_comes_in_by_the_link_with_the_token(url: str, tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.touch(mode=0o600)
    token_file.write_text("a/b&c=d")
    with serving(url, "0.0.0.0", str(token_file)) as link, chromium_page() as page:
        here = f"http://127.0.0.1:{urlsplit(link).port}/"
        refused = page.goto(here)
        assert refused is not None
        assert refused.status == 401
        page.goto(f"{here}?token=a%2Fb%26c%3Dd")
        page.get_by_text("clothes").first.wait_for()
        assert "token" not in page.url
        page.goto(f"{here}dashboard/studies/1")
        page.locator("#graph-intermediate-values .scatterlayer .trace").first.wait_for()


def link_of(
    storage: optuna.storages.RDBStorage,
    *,
    host: str = "127.0.0.1",
    port: int = 0,
    token_file: Path | None = None,
) -> str:
    """The link of a dashboard that ends as soon as it listens."""

    class Listening(Exception):
        pass

    links: list[str] = []

    def ready(link: str) -> None:
        links.append(link)
        raise Listening

    with contextlib.suppress(Listening):
        serve(storage, host=host, port=port, token_file=token_file, ready=ready)
    return links[0]


@contextlib.contextmanager
def chromium_page() -> Iterator[Page]:
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.fail("the browser is missing: install Debian's package chromium", pytrace=False)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=CHROMIUM_ARGS)
        page = browser.new_page()
        page.set_default_timeout(60_000)
        yield page
        browser.close()


@contextlib.contextmanager
def serving(url: str, *arguments: str) -> Iterator[str]:
    """A dashboard in its own process, ended by Ctrl-C; yields the link that it says."""
    checkout = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE, *arguments],
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
