"""The dashboard as it is served, and its pages in a real browser."""

import http.client
import logging
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit

import optuna
import pytest

from storage.database import Database, normalise_url
from storage.schema import optuna_storage
from tests.dashboards import ask, chromium_page, enter, link_of, open_app, serving
from tests.parts import free_port
from trainer.config import ConfigError


@pytest.mark.usefixtures("clothes")
def test_a_database_that_is_away_is_one_line_in_the_log(
    clothes_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    database = Database(clothes_url)
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


def test_it_is_served_behind_a_token_that_stands_in_the_link(
    clothes: optuna.storages.RDBStorage,
) -> None:
    for host, shown in {
        "127.0.0.1": "127.0.0.1",
        "localhost": "localhost",
        "::1": "[::1]",
        "0.0.0.0": socket.gethostname(),
    }.items():
        links = [link_of(clothes, host=host) for _ in range(2)]
        tokens = [link.partition("/?token=")[2] for link in links]
        assert min(map(len, tokens)) > 40
        assert tokens[0] != tokens[1]
        assert all(link.startswith(f"http://{shown}:") for link in links)


def test_no_token_is_a_choice_for_this_machine_alone(
    clothes: optuna.storages.RDBStorage, tmp_path: Path
) -> None:
    for host in ("127.0.0.1", "localhost"):
        link = link_of(clothes, host=host, no_token=True)
        assert re.fullmatch(rf"http://{host}:[0-9]+/", link)
    for host in ("0.0.0.0", "::", "192.0.2.7", ""):
        with pytest.raises(ConfigError, match="--no-token is for this machine alone"):
            link_of(clothes, host=host, no_token=True)
    with pytest.raises(ConfigError, match="give one of them"):
        link_of(clothes, token_file=tmp_path / "token", no_token=True)


def test_the_token_file_holds_one_word(
    clothes: optuna.storages.RDBStorage, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    file = tmp_path / "token"
    with pytest.raises(ConfigError, match=r"can't read the token file .*: No such file"):
        link_of(clothes, token_file=file)
    for words in ("", "two words", "\n"):
        file.write_text(words)
        with pytest.raises(ConfigError, match="must hold one word"):
            link_of(clothes, token_file=file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="not text"):
        link_of(clothes, token_file=file)
    file.write_text("sesame\n")
    file.chmod(0o644)
    assert link_of(clothes, token_file=file).endswith(f"/?token=(the word in {file})")
    assert "chmod 600" in caplog.text
    assert "sesame" not in caplog.text
    caplog.clear()
    file.chmod(0o600)
    assert "sesame" not in link_of(clothes, host="0.0.0.0", token_file=file)
    assert not caplog.records


def test_an_address_that_cannot_be_listened_on_is_one_line(
    clothes: optuna.storages.RDBStorage,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"can't listen on localhost, port {port}: .*in use"):
            link_of(clothes, host="localhost", port=port)
    for port in (-1, 65536):
        with pytest.raises(ConfigError, match=rf"port must be in 0\.\.65535, got {port}"):
            link_of(clothes, port=port)
    with pytest.raises(ConfigError, match=r"can't listen on nowhere\.invalid"):
        link_of(clothes, host="nowhere.invalid")


@pytest.mark.usefixtures("clothes")
def test_the_server_bounds_requests_and_ends_by_ctrl_c(clothes_url: str) -> None:
    with serving(clothes_url, "127.0.0.1") as link:
        connection = http.client.HTTPConnection(urlsplit(link).netloc, timeout=30)
        cookie = enter(link)
        connection.request("GET", "/api/studies")
        answer = connection.getresponse()
        assert answer.status == 401
        assert b"clothes" not in answer.read()
        connection.request("GET", "/api/studies", headers=cookie)
        answer = connection.getresponse()
        assert answer.status == 200
        assert b"clothes" in answer.read()
        assert answer.getheader("Server") is None
        connection.putrequest("POST", "/api/studies")
        connection.putheader("Content-Length", str(2 << 20))
        connection.endheaders()
        assert connection.getresponse().status == 413
        connection.close()


@pytest.mark.usefixtures("clothes")
def test_the_browser_shows_the_study_its_trials_and_their_curves(clothes_url: str) -> None:
    with serving(clothes_url, "127.0.0.1") as link, chromium_page() as page:
        here = link.partition("?")[0]
        refused = page.goto(here)
        assert refused is not None
        assert refused.status == 401
        page.goto(link)
        page.get_by_text("clothes").first.click()
        page.wait_for_url("**/studies/1**")
        curves = page.locator("#graph-intermediate-values")
        curves.locator(".scatterlayer .trace").nth(3).wait_for()
        assert "trial #0" in curves.inner_text()
        assert "trial #3" in curves.inner_text()
        page.goto(f"{here}dashboard/studies/1/trials")
        page.get_by_text("Trial 0 (trial_id=").wait_for()
        text = page.locator("body").inner_text()
        assert "4 Trials" in text
        assert "Pruned" in text
        assert re.search(r"Intermediate Values\s+1 0.55\s+4 0.7\s+8 0.9", text)


@pytest.mark.usefixtures("clothes")
def test_the_browser_writes_a_note_and_nothing_of_a_trial(clothes_url: str) -> None:
    with serving(clothes_url, "127.0.0.1") as link, chromium_page() as page:
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.goto(link)
        page.get_by_text("clothes").first.wait_for()
        here = link.partition("?")[0]
        page.goto(f"{here}dashboard/studies/1/note")
        page.get_by_text("Note").nth(1).wait_for()
        page.locator("main button, button").last.click()
        page.locator("textarea").first.fill("Sunday's run")
        with page.expect_response("**/api/studies/1/note") as note:
            page.get_by_role("button", name="Save").click()
        assert note.value.status == 204
        page.reload()
        page.get_by_text("Sunday's run").wait_for()
        # as the page's own script would ask, with all headers of a browser
        told = page.evaluate(
            """async () => {
                const answer = await fetch("/api/trials/1/tell", {
                    method: "POST",
                    headers: {"Content-Type": "application/json"},
                    body: JSON.stringify({state: "Fail"}),
                });
                return [answer.status, (await answer.json()).reason];
            }"""
        )
        assert told[0] == 403
        assert "changed by hpo's commands" in told[1]
        # the policies that all answers bear let the pages do what they do
        assert not [line for line in said if "Content Security Policy" in line]


@pytest.mark.usefixtures("clothes")
def test_a_page_of_another_site_gets_nothing_from_the_browser_that_is_in(clothes_url: str) -> None:
    with (
        serving(clothes_url, "127.0.0.1") as link,
        serving(clothes_url, "127.0.0.1") as other,
        chromium_page() as page,
    ):
        page.goto(link)
        page.get_by_text("clothes").first.wait_for()
        # another port of this machine is the same site, so cookies of SameSite=Strict are sent
        page.goto(other)
        page.get_by_text("clothes").first.wait_for()
        here = link.partition("?")[0]
        asked = page.evaluate(
            """async (here) => {
                const kinds = [];
                for (const method of ["GET", "PUT", "DELETE", "POST"]) {
                    try {
                        const answer = await fetch(`${here}api/studies/1`, {
                            method, mode: method == "POST" ? "no-cors" : "cors",
                            credentials: "include", body: method == "GET" ? undefined : "{}",
                        });
                        kinds.push(answer.type);
                    } catch { kinds.push("refused"); }
                }
                return kinds;
            }""",
            here,
        )
        assert asked == ["refused"] * 4
        page.goto(f"{here}dashboard/studies/1")
        page.locator("#graph-intermediate-values .scatterlayer .trace").first.wait_for()


@pytest.mark.usefixtures("clothes")
def test_the_browser_comes_in_by_the_link_with_the_token(clothes_url: str, tmp_path: Path) -> None:
    token_file = tmp_path / "token"
    token_file.touch(mode=0o600)
    token_file.write_text("a/b&c=d")
    with serving(clothes_url, "0.0.0.0", str(token_file)) as link, chromium_page() as page:
        here = f"http://127.0.0.1:{urlsplit(link).port}/"
        refused = page.goto(here)
        assert refused is not None
        assert refused.status == 401
        page.goto(f"{here}?token=a%2Fb%26c%3Dd")
        page.get_by_text("clothes").first.wait_for()
        assert "token" not in page.url
        page.goto(f"{here}dashboard/studies/1")
        page.locator("#graph-intermediate-values .scatterlayer .trace").first.wait_for()
