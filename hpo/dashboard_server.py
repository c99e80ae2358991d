"""waitress, with bounds that one client can't use up for all others.

waitress stops accepting at its limit of connections and closes idle ones after minutes: a hundred
connections that say nothing shut everybody out. Here there is always room for one more.
"""

import re
import time
from collections import defaultdict
from typing import Any
from wsgiref.types import WSGIApplication

import waitress.adjustments
import waitress.channel
import waitress.parser
import waitress.server
import waitress.task

from hpo.guesses import client_of

MOST_CONNECTIONS = 100
MOST_OF_A_CLIENT = 40
"""Connections at once: a browser opens six. Behind a proxy all browsers are one client."""
_LARGEST_REQUEST_BYTES = 1 << 20
_LARGEST_HEADER_BYTES = 1 << 16
_IDLE_SECONDS = 30
_SWEEP_SECONDS = 5
_FOLDED = re.compile(rb"\n[ \t]")
_ENCODING = re.compile(rb"^transfer-encoding:[ \t]*(.*?)[ \t]*\r?$", re.IGNORECASE | re.MULTILINE)


class _Parser(waitress.parser.HTTPRequestParser):  # type: ignore[misc]  # it has no types
    """Refuses what a proxy in front may have divided into requests at another place."""

    def parse_header(self, header_plus: bytes) -> None:
        """Raises ParsingError, which waitress answers by 400 and the end of the connection."""
        super().parse_header(header_plus)
        if _FOLDED.search(header_plus):
            raise waitress.parser.ParsingError("a header is one line")
        encodings = [words.lower() for words in _ENCODING.findall(header_plus)]
        if encodings and (
            encodings != [b"chunked"] or "CONTENT_LENGTH" in self.headers or self.version != "1.1"
        ):
            raise waitress.parser.ParsingError("a body has one length, or comes in chunks once")


class _Channel(waitress.channel.HTTPChannel):  # type: ignore[misc]
    """One connection."""

    parser_class = _Parser

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.used_at = time.monotonic()
        """When it was opened, or got its last answer; single bytes of a request don't count."""
        super().__init__(*args, **kwargs)

    def service(self) -> None:
        """In a thread of its own: answer one request."""
        super().service()
        self.used_at = time.monotonic()


class DashboardServer(waitress.server.TcpWSGIServer):  # type: ignore[misc]
    """Serves until Ctrl-C, by `run`."""

    channel_class = _Channel

    def __init__(self, app: WSGIApplication, listener: Any) -> None:
        """listener: a listening socket."""
        dispatcher = waitress.task.ThreadedTaskDispatcher()
        adjustments = waitress.adjustments.Adjustments(
            sockets=[listener],
            ident=None,
            max_request_body_size=_LARGEST_REQUEST_BYTES,
            max_request_header_size=_LARGEST_HEADER_BYTES,
            # never reached: there is room before
            connection_limit=2 * MOST_CONNECTIONS,
            channel_timeout=_IDLE_SECONDS,
            cleanup_interval=_SWEEP_SECONDS,
            log_socket_errors=False,
        )
        dispatcher.set_thread_count(adjustments.threads)
        super().__init__(
            app,
            {},
            True,
            listener,
            dispatcher=dispatcher,
            adj=adjustments,
            bind_socket=False,
            sockinfo=(listener.family, listener.type, listener.proto, listener.getsockname()),
        )

    def handle_accept(self) -> None:
        """Take a connection, and close another one if there are too many."""
        super().handle_accept()
        by_client: dict[str, list[_Channel]] = defaultdict(list)
        for channel in self.active_channels.values():
            if not channel.will_close:
                by_client[client_of(channel.addr[0])].append(channel)
        largest = max(by_client.values(), key=len, default=[])
        total = sum(map(len, by_client.values()))
        if len(largest) > MOST_OF_A_CLIENT or total > MOST_CONNECTIONS:
            _close_one(largest)


def _close_one(channels: list[_Channel]) -> None:
    """Close the one that has gone longest without a request, if not all of them have one."""
    idle = [channel for channel in channels if not channel.requests]
    if idle:
        min(idle, key=lambda channel: channel.used_at).will_close = True
