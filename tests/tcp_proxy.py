"""A TCP proxy in front of a Postgres: it forwards, delays, holds or cuts what passes."""

import contextlib
import enum
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

_PROTOCOL_3 = 3 << 16


class Fault(enum.Enum):
    """What happens to a statement, and to the connection that carries it."""

    CUT_BEFORE = "the server never gets it"
    CUT_MEANWHILE = "the server gets it while its client has lost the connection"
    CUT_AFTER = "the server has done it, its answer is lost"
    HOLD = "it waits in the network like all else, until the proxy is told to go on"


class TcpProxy:
    """Listens on `port` and forwards to `target`: (host, port), or the path of a Unix socket.

    What happens to the statements that pass can be changed at any moment.
    """

    def __init__(self, target: tuple[str, int] | str) -> None:
        self._target = target
        self.delay_seconds = 0.0
        """In each direction."""
        self.num_statements = 0
        """That clients have sent."""
        self._flowing = threading.Event()
        self._flowing.set()
        self._lock = threading.Lock()
        self._strike: Strike | None = None
        self._links: list[_Link] = []
        self._server = socket.create_server(("127.0.0.1", 0))
        self.port = int(self._server.getsockname()[1])
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._acceptor.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown(socket.SHUT_RDWR)
        self._acceptor.join(5)
        self._server.close()
        self.go_on()
        self.cut()

    def arm(self, strike: "Strike | None") -> None:
        """From now on, instead of the one before."""
        with self._lock:
            self._strike = strike

    def hold(self) -> None:
        """A black hole: nothing passes, nothing is closed."""
        self._flowing.clear()

    def go_on(self) -> None:
        """What was held arrives now."""
        self._flowing.set()

    def cut(self) -> None:
        """Close all connections there are."""
        with self._lock:
            links, self._links = self._links, []
        for link in links:
            link.cut()
            link.join()

    def _accept(self) -> None:
        while True:
            try:
                client = self._server.accept()[0]
            except OSError:
                return
            with self._lock:
                self._links.append(_Link(self, client, self._connect()))

    def _connect(self) -> socket.socket:
        if isinstance(self._target, tuple):
            return socket.create_connection(self._target)
        server = socket.socket(socket.AF_UNIX)
        server.connect(self._target)
        return server

    def pass_through(self) -> None:
        """Takes as long as the network does."""
        if self.delay_seconds:
            time.sleep(self.delay_seconds)
        self._flowing.wait()

    def fault_of(self, statement: bytes, transaction: bytes) -> Fault | None:
        """What is to happen to this statement of a client, and what was said before it."""
        with self._lock:
            self.num_statements += 1
            if self._strike is None or not self._strike.hits(statement, transaction):
                return None
            strike, self._strike = self._strike, None
        strike.happened.set()
        return strike.fault


class Strike:
    """A fault that happens once, in its `with`: at the nth statement, from 0, that begins so.

    within: what the transaction up to there must hold.
    """

    def __init__(
        self, proxy: TcpProxy, fault: Fault, *, statement: str = "", nth: int = 0, within: str = ""
    ) -> None:
        self._proxy, self.fault = proxy, fault
        self._statement, self._left = statement.encode(), nth
        self._within = within.encode()
        self.happened = threading.Event()

    def __enter__(self) -> None:
        self._proxy.arm(self)

    def __exit__(self, *_: object) -> None:
        self._proxy.arm(None)

    def hits(self, statement: bytes, transaction: bytes) -> bool:
        """Whether this is the one."""
        if not statement.lstrip().startswith(self._statement) or self._within not in transaction:
            return False
        self._left -= 1
        return self._left < 0


class _Link:
    """One connection of a client, and ours to the server on its behalf."""

    def __init__(self, proxy: TcpProxy, client: socket.socket, server: socket.socket) -> None:
        self._proxy, self._client, self._server = proxy, client, server
        self._drops_answer = False
        self._ended = threading.Barrier(2, action=self._close)
        for end in (client, server):
            if end.family == socket.AF_INET:
                end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._threads = [
            threading.Thread(target=self._run, args=[pump], daemon=True)
            for pump in (self._to_server, self._to_client)
        ]
        for thread in self._threads:
            thread.start()

    def cut(self) -> None:
        """Both ends see the connection close."""
        for end in (self._client, self._server):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def join(self) -> None:
        """Wait for the threads."""
        for thread in self._threads:
            thread.join(5)

    def _close(self) -> None:
        self._client.close()
        self._server.close()

    def _run(self, pump: Callable[[], None]) -> None:
        with contextlib.suppress(OSError):
            pump()
        self.cut()
        self._ended.wait()

    def _to_server(self) -> None:
        transaction = b""
        for message in _messages(self._client):
            fault = None
            if message[:1] == b"Q":
                transaction = b"" if message[5:10] == b"BEGIN" else transaction + message[5:]
                fault = self._proxy.fault_of(message[5:], transaction)
            if fault is Fault.CUT_BEFORE:
                return
            if fault is Fault.HOLD:
                self._proxy.hold()
            self._drops_answer = fault is Fault.CUT_AFTER
            self._proxy.pass_through()
            self._server.sendall(message)
            if fault is Fault.CUT_MEANWHILE:
                return

    def _to_client(self) -> None:
        while answer := self._server.recv(1 << 16):
            if self._drops_answer:
                return
            self._proxy.pass_through()
            self._client.sendall(answer)


def _messages(client: socket.socket) -> Iterator[bytes]:
    """The messages of Postgres's protocol; those before a session begins bear no type."""
    begun = False
    while True:
        head = _receive(client, 5 if begun else 4)
        if not head:
            return
        (length,) = struct.unpack("!I", head[-4:])
        body = _receive(client, length - 4)
        if not begun:
            begun = struct.unpack("!I", body[:4])[0] == _PROTOCOL_3
        yield head + body


def _receive(client: socket.socket, count: int) -> bytes:
    """So many bytes, or none if the connection ends before."""
    received = b""
    while len(received) < count:
        more = client.recv(count - len(received))
        if not more:
            return b""
        received += more
    return received
