"""The dashboard's server under clients that hold connections, or hide requests in requests."""

import http.client
import json
import re
import socket
from collections.abc import Iterator
from contextlib import ExitStack
from urllib.parse import urlsplit

import pytest

from hpo.dashboard_server import MOST_CONNECTIONS, MOST_OF_A_CLIENT
from tests.dashboards import enter, serving

PATIENCE_SECONDS = 60.0
"""For an answer; a server that is shut stays so for longer."""


@pytest.fixture(scope="module")
def link(clothes: object, clothes_url: str) -> Iterator[str]:
    """Of a dashboard of this file's own."""
    del clothes
    with serving(clothes_url, "127.0.0.1") as found:
        yield found


@pytest.fixture(scope="module")
def cookie(link: str) -> dict[str, str]:
    return enter(link)


def place(link: str) -> tuple[str, int]:
    parts = urlsplit(link)
    assert parts.hostname is not None
    assert parts.port is not None
    return parts.hostname, parts.port


def connect(link: str, source: str = "127.0.0.1") -> socket.socket:
    return socket.create_connection(
        place(link), timeout=PATIENCE_SECONDS, source_address=(source, 0)
    )


def status_of(
    link: str, cookie: dict[str, str], connection: http.client.HTTPConnection | None = None
) -> int:
    asked = connection or http.client.HTTPConnection(*place(link), timeout=PATIENCE_SECONDS)
    asked.request("GET", "/api/studies", headers=cookie)
    answer = asked.getresponse()
    answer.read()
    if connection is None:
        asked.close()
    return answer.status


HOLDERS = {
    "says nothing": b"",
    "never ends its headers": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ",
    "never sends its body": b"PUT / HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 9\r\n\r\nx",
    "had an answer": b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n",
}


@pytest.mark.parametrize("sent", HOLDERS.values(), ids=HOLDERS.keys())
def test_a_client_that_holds_connections_shuts_nobody_out(
    link: str, cookie: dict[str, str], sent: bytes
) -> None:
    with ExitStack() as held:
        for _ in range(3 * MOST_CONNECTIONS):
            holder = held.enter_context(connect(link))
            holder.sendall(sent)
            if sent.endswith(b"\r\n\r\n"):
                assert holder.recv(12) == b"HTTP/1.1 401"
        for _ in range(3):
            assert status_of(link, cookie) == 200


def test_a_client_s_connections_are_counted_apart_from_others(
    link: str, cookie: dict[str, str]
) -> None:
    other = http.client.HTTPConnection(
        *place(link), timeout=PATIENCE_SECONDS, source_address=("127.0.0.2", 0)
    )
    assert status_of(link, cookie, other) == 200
    kept = other.sock
    with ExitStack() as held:
        holders = [held.enter_context(connect(link)) for _ in range(2 * MOST_CONNECTIONS)]
        assert status_of(link, cookie, other) == 200
        assert other.sock is kept
        # the oldest ones were closed, the newest were not
        for holder in holders[: -MOST_OF_A_CLIENT - 1]:
            assert holder.recv(1) == b""
        holders[-1].sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        assert holders[-1].recv(12) == b"HTTP/1.1 401"
    other.close()


def test_many_clients_make_room_for_one_more(link: str, cookie: dict[str, str]) -> None:
    with ExitStack() as held:
        for number in range(2, 12):
            for _ in range(30):
                held.enter_context(connect(link, f"127.0.0.{number}"))
        assert status_of(link, cookie) == 200


SMUGGLED = (
    "PUT /api/studies/1/note HTTP/1.1\r\nHost: {host}\r\nCookie: {cookie}\r\n"
    "Content-Type: application/json\r\nContent-Length: 32\r\n\r\n"
    '{{"version": 1, "body": "hidden"}}'
)
FRAMINGS = {
    "both": "Content-Length: {length}\r\nTransfer-Encoding: chunked",
    "both, the other way": "Transfer-Encoding: chunked\r\nContent-Length: {length}",
    "both, in other letters": "Content-Length: {length}\r\ntransfer-encoding: CHUNKED",
    "both, with a tab": "Content-Length: {length}\r\nTransfer-Encoding:\tchunked",
    "two lengths": "Content-Length: 5\r\nContent-Length: {length}",
    "two lengths that are one": "Content-Length: {length}\r\nContent-Length: {length}",
    "a list of lengths": "Content-Length: {length}, {length}",
    "a length with a sign": "Content-Length: +{length}",
    "a length below zero": "Content-Length: -1",
    "a length in hex": "Content-Length: 0x10",
    "a length with an underscore": "Content-Length: 1_0",
    "no encoding": "Transfer-Encoding: identity",
    "an unknown encoding": "Transfer-Encoding: xchunked",
    "chunks in chunks": "Transfer-Encoding: chunked, chunked",
    "an encoding after chunks": "Transfer-Encoding: chunked, identity",
    "an encoding that is quoted": 'Transfer-Encoding: "chunked"',
    "a space before the colon": "Transfer-Encoding : chunked",
    "a folded line": "X: y\r\n Transfer-Encoding: chunked",
    "a lone line feed": "X: y\nTransfer-Encoding: chunked",
    "a lone carriage return": "X: y\rTransfer-Encoding: chunked",
}


def exchange(link: str, sent: str) -> list[str]:
    """The status of each answer that comes before the server closes."""
    with connect(link) as connection:
        connection.sendall(sent.encode())
        got = b""
        while True:
            try:
                more = connection.recv(65536)
            except ConnectionResetError:  # closed before it had read all
                more = b""
            if not more:
                break
            got += more
    return re.findall(r"HTTP/1\.[01] ([0-9]{3}) ", got.decode())


@pytest.mark.parametrize("version", ["1.1", "1.0"])
@pytest.mark.parametrize("framing", FRAMINGS.values(), ids=FRAMINGS.keys())
def test_no_request_is_hidden_in_another(
    link: str, cookie: dict[str, str], framing: str, version: str
) -> None:
    hidden = SMUGGLED.format(host="127.0.0.1", cookie=cookie["Cookie"])
    body = f"0\r\n\r\n{hidden}"
    head = (
        f"POST / HTTP/{version}\r\nHost: 127.0.0.1\r\nCookie: {cookie['Cookie']}\r\n"
        f"Connection: keep-alive\r\n{framing.format(length=len(body))}\r\n\r\n"
    )
    statuses = exchange(link, head + body)
    assert len(statuses) == 1
    assert statuses[0] in ("400", "501")
    assert note(link, cookie) == ""


def test_the_hidden_request_would_have_changed_the_study(link: str, cookie: dict[str, str]) -> None:
    """Else the tests above prove nothing."""
    asked = SMUGGLED.format(host="127.0.0.1", cookie=cookie["Cookie"])
    asked = asked.replace("Host:", "Connection: close\r\nHost:")
    assert exchange(link, asked) == ["204"]
    assert note(link, cookie) == "hidden"


def test_a_body_in_chunks_is_one_body(link: str, cookie: dict[str, str]) -> None:
    version = json.loads(study(link, cookie))["note"]["version"] + 1
    body = json.dumps({"version": version, "body": "in chunks"})
    connection = http.client.HTTPConnection(*place(link), timeout=PATIENCE_SECONDS)
    headers = {**cookie, "Content-Type": "application/json", "Transfer-Encoding": "chunked"}
    parts = (body[start : start + 5].encode() for start in range(0, len(body), 5))
    connection.request("PUT", "/api/studies/1/note", parts, headers, encode_chunked=True)
    assert connection.getresponse().status == 204
    connection.close()
    assert note(link, cookie) == "in chunks"


@pytest.mark.parametrize(
    "target",
    [
        "/static/../_app.py",
        "/static/%2e%2e/_app.py",
        "/static/..%2f_app.py",
        "/static/..%5c_app.py",
        "/static/%252e%252e/_app.py",
        "/static/%00../_app.py",
        "/static//etc/passwd",
        "//etc/passwd",
        "http://127.0.0.1/static/../_app.py",
        "/dashboard/../static/../_app.py",
    ],
)
def test_no_address_leads_to_a_file_that_is_not_the_app_s(
    link: str, cookie: dict[str, str], target: str
) -> None:
    connection = http.client.HTTPConnection(*place(link), timeout=PATIENCE_SECONDS)
    connection.putrequest("GET", target)
    connection.putheader("Cookie", cookie["Cookie"])
    connection.endheaders()
    answer = connection.getresponse()
    text = answer.read().decode(errors="replace")
    connection.close()
    assert answer.status in (200, 403, 404)
    assert "import annotations" not in text
    assert "root:" not in text
    if answer.status == 200:  # the page that shows whatever its own script makes of the address
        assert text.startswith("<!DOCTYPE html>")


def study(link: str, cookie: dict[str, str]) -> str:
    connection = http.client.HTTPConnection(*place(link), timeout=PATIENCE_SECONDS)
    connection.request("GET", "/api/studies/1", headers=cookie)
    text = connection.getresponse().read().decode()
    connection.close()
    return text


def note(link: str, cookie: dict[str, str]) -> str:
    """The text at the study, as it is now."""
    found: str = json.loads(study(link, cookie))["note"]["body"]
    return found
