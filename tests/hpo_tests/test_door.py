"""Who comes in by the dashboard's door, and what every answer bears."""

import re
from wsgiref.validate import validator

import optuna
import optuna_dashboard
import pytest

from hpo.guesses import client_of
from tests.dashboards import HOST, ask, cookie_of, locked_app, open_app


@pytest.mark.parametrize("host", ["localhost", "localhost:8080", "127.0.0.1:8080", "[::1]:8080"])
def test_without_a_token_this_machine_comes_in(
    clothes: optuna.storages.RDBStorage, host: str
) -> None:
    answer = ask(open_app(clothes), host=host)
    assert answer.status == 200
    assert "clothes" in answer.body


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:8080",
        "localhost.evil.example",
        "localhost.",
        "localhost:8080:8080",
        "localhost:port",
        "me@localhost",
        "localhost@evil.example",
        "localhost, evil.example",
        "localhost evil.example",
        "localhost/",
        "localhost\t",
        "10.0.0.5",
        "0x7f000001",
        "127.1",
        "[::1",
        "[::ffff:127.0.0.1]",
        "127.0.0.1.nip.io",
        "\xb2localhost",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/", "/dashboard", "/api/studies", "/static/bundle.js"])
def test_a_foreign_host_is_refused(
    clothes: optuna.storages.RDBStorage, host: str, path: str
) -> None:
    answer = ask(open_app(clothes), path, host=host)
    assert answer.status == 403
    assert "clothes" not in answer.body


def test_a_foreign_host_is_refused_with_the_token_too(
    clothes: optuna.storages.RDBStorage,
) -> None:
    app = locked_app(clothes)
    cookie = cookie_of(app, "/?token=open+sesame")
    assert ask(app, host="evil.example", HTTP_COOKIE=cookie).status == 403
    assert ask(app, "/?token=open+sesame", host="evil.example").status == 403
    assert ask(app, host="gpu7:8080", HTTP_COOKIE=cookie).status == 200
    # whoever rebinds a name needs a name
    assert ask(app, host="10.0.0.5:8080", HTTP_COOKIE=cookie).status == 200


def test_without_the_token_every_route_answers_401(clothes: optuna.storages.RDBStorage) -> None:
    app = locked_app(clothes)
    routes = optuna_dashboard.wsgi(optuna.storages.get_storage(clothes)).routes
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
    names = [study.study_name for study in optuna.get_all_study_summaries(clothes)]
    assert names == ["clothes"]


def test_the_link_sets_a_cookie_that_opens_the_pages(clothes: optuna.storages.RDBStorage) -> None:
    app = locked_app(clothes)
    answer = ask(app, "/?token=open+sesame")
    assert answer.status == 303
    assert answer.headers["Location"] == "/"
    cookie, *attributes = answer.headers["Set-Cookie"].split("; ")
    assert {"HttpOnly", "SameSite=Strict", "Path=/"} == set(attributes)
    assert "sesame" not in cookie
    assert ask(app, HTTP_COOKIE=f"theme=dark; {cookie}").status == 200
    assert ask(locked_app(clothes, "another"), HTTP_COOKIE=cookie).status == 401


@pytest.mark.parametrize("path", ["/", "/dashboard", "/api/studies", "/static/nothing"])
def test_every_answer_forbids_sniffing_and_framing(
    clothes: optuna.storages.RDBStorage, path: str
) -> None:
    for app in (open_app(clothes), locked_app(clothes)):
        for host in (HOST, "evil.example"):
            headers = ask(app, path, host=host).headers
            assert headers["X-Content-Type-Options"] == "nosniff"
            assert headers["X-Frame-Options"] == "DENY"
            assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
            assert headers["Cross-Origin-Opener-Policy"] == "same-origin"
            for words in ("frame-ancestors 'none'", "base-uri 'none'", "object-src 'none'"):
                assert words in headers["Content-Security-Policy"]


def test_artifacts_come_as_attachments(clothes: optuna.storages.RDBStorage) -> None:
    headers = ask(open_app(clothes), "/artifacts/1/1/abc").headers
    assert headers["Content-Disposition"] == "attachment"
    assert headers["Content-Security-Policy"] == "sandbox"
    assert "Access-Control-Allow-Origin" not in headers


def test_a_change_from_another_sites_page_is_refused(clothes: optuna.storages.RDBStorage) -> None:
    app = open_app(clothes)
    note = b'{"version": 1, "body": "a note"}'

    def change(**environ: str) -> int:
        return ask(app, "/api/studies/1/note", method="PUT", body=note, **environ).status

    for origin in ("http://evil.example", "null", "", f"http://{HOST}:81", f"ftp://{HOST}"):
        assert change(HTTP_ORIGIN=origin) == 403, origin
        assert change(HTTP_ORIGIN=origin, HTTP_REFERER=f"http://{HOST}/") == 403, origin
    for site in ("cross-site", "same-site", "", "nonsense"):
        assert change(HTTP_SEC_FETCH_SITE=site) == 403, site
        assert change(HTTP_SEC_FETCH_SITE=site, HTTP_ORIGIN=f"http://{HOST}") == 403, site
    assert change(HTTP_ORIGIN=f"http://{HOST}", HTTP_SEC_FETCH_SITE="same-origin") == 204


@pytest.mark.parametrize(
    "referer",
    [
        "http://evil.example/",
        f"http://evil.example/http://{HOST}/",
        f"http://{HOST}.evil.example/",
        f"http://{HOST}@evil.example/",
        f"http://me@{HOST}/",
        f"http://{HOST}:81/",
        f"ftp://{HOST}/",
        "http://[",
        "about:blank",
        HOST,
        "",
    ],
)
def test_a_change_without_origin_is_refused_by_its_referer(
    clothes: optuna.storages.RDBStorage, referer: str
) -> None:
    app = open_app(clothes)
    # a body that is refused by 400 where the request comes in
    path = "/api/studies/1/note"
    assert ask(app, path, method="PUT", HTTP_REFERER=referer).status == 403
    for own in ("", "dashboard/studies/1?x=http://evil.example/"):
        assert ask(app, path, method="PUT", HTTP_REFERER=f"http://{HOST}/{own}").status == 400
    assert ask(app, path, method="PUT").status == 400


def test_the_door_keeps_to_the_wsgi_specification(clothes: optuna.storages.RDBStorage) -> None:
    for app in (open_app(clothes), locked_app(clothes)):
        answer = ask(validator(app), "/api/studies", CONTENT_TYPE="text/plain", CONTENT_LENGTH="0")
        assert answer.status in (200, 401)


def test_a_request_without_accept_encoding_gets_its_file(
    clothes: optuna.storages.RDBStorage,
) -> None:
    assert ask(open_app(clothes), "/favicon.ico").status == 200


def test_wrong_tokens_are_waited_for_longer_and_longer(clothes: optuna.storages.RDBStorage) -> None:
    now = [1000.0]
    app = locked_app(clothes, clock=lambda: now[0])

    def status(token: str, address: str = "192.0.2.7") -> tuple[int, str | None]:
        answer = ask(app, f"/?token={token}", REMOTE_ADDR=address)
        return answer.status, answer.headers.get("Retry-After")

    assert [status("wrong") for _ in range(5)] == [(401, None)] * 5
    assert status("wrong") == (429, "1")
    for seconds in (1, 2, 4, 8, 16, 32, 60, 60):
        assert status("wrong") == (429, f"{seconds}")
        assert status("open+sesame") == (429, f"{seconds}")
        now[0] += seconds
        assert status("wrong") == (401, None)
    assert status("open+sesame", "192.0.2.8") == (303, None)
    now[0] += 60
    assert status("open+sesame") == (303, None)
    assert [status("wrong") for _ in range(5)] == [(401, None)] * 5


def test_wrong_tokens_are_forgotten_after_ten_minutes(clothes: optuna.storages.RDBStorage) -> None:
    now = [1000.0]
    app = locked_app(clothes, clock=lambda: now[0])
    for _ in range(2):
        statuses = [ask(app, "/?token=wrong", REMOTE_ADDR="192.0.2.7").status for _ in range(6)]
        assert statuses == [401] * 5 + [429]
        now[0] += 602


def test_a_browser_that_is_in_stays_in_while_its_neighbour_guesses(
    clothes: optuna.storages.RDBStorage,
) -> None:
    app = locked_app(clothes)
    cookie = cookie_of(app, "/?token=open+sesame")
    assert {ask(app, "/?token=wrong").status for _ in range(50)} == {401, 429}
    assert ask(app, HTTP_COOKIE=cookie).status == 200


def test_a_token_that_nobody_can_guess_lets_in_whoever_has_it_at_any_time(
    clothes: optuna.storages.RDBStorage,
) -> None:
    token = "x" * 43
    app = locked_app(clothes, token)
    assert {ask(app, "/?token=wrong").status for _ in range(50)} == {401, 429}
    assert ask(app, f"/?token={token}").status == 303


def test_a_cookie_does_not_follow_from_the_token(clothes: optuna.storages.RDBStorage) -> None:
    cookies = {cookie_of(locked_app(clothes), "/?token=open+sesame") for _ in range(3)}
    assert len(cookies) == 3
    assert len({cookie.partition("=")[0] for cookie in cookies}) == 3
    for cookie in cookies:
        assert ask(locked_app(clothes), HTTP_COOKIE=cookie).status == 401


def test_old_cookies_and_pages_are_no_guesses(clothes: optuna.storages.RDBStorage) -> None:
    app = locked_app(clothes)
    old = cookie_of(locked_app(clothes), "/?token=open+sesame")
    assert {ask(app, HTTP_COOKIE=old).status for _ in range(50)} == {401}
    assert {ask(app, "/").status for _ in range(50)} == {401}
    assert ask(app, "/?token=open+sesame").status == 303


@pytest.mark.parametrize(
    ("one", "other", "are_one"),
    [
        ("192.0.2.7", "192.0.2.8", False),
        ("192.0.2.7", "::ffff:192.0.2.7", True),
        ("2001:db8::1", "2001:db8::ffff:1", True),
        ("2001:db8::1", "2001:db8:0:1::1", False),
        ("fe80::1%eth0", "fe80::2%eth1", True),
        ("", "192.0.2.7", False),
    ],
)
def test_a_client_is_an_address_or_a_network_of_ipv6(one: str, other: str, are_one: bool) -> None:
    assert (client_of(one) == client_of(other)) is are_one


def test_a_link_of_many_fields_is_no_link(clothes: optuna.storages.RDBStorage) -> None:
    for query in ("&".join(["token=x"] * 20_000), "token", "=", "%", "token=%ff%fe%00"):
        assert ask(locked_app(clothes), f"/?{query}").status == 401


def test_the_app_s_own_policy_for_scripts_stays(clothes: optuna.storages.RDBStorage) -> None:
    policies = ask(open_app(clothes), "/dashboard").headers["Content-Security-Policy"]
    assert "script-src 'self' 'unsafe-eval'" in policies
    assert "frame-ancestors 'none'" in policies
