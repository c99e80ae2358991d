"""Wrong tokens slow their client down, and nobody else."""

import hmac
import ipaddress
import math
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass

_FREE_GUESSES = 5
_LONGEST_WAIT_SECONDS = 60.0
_FORGOTTEN_AFTER_SECONDS = 600.0
_MOST_CLIENTS = 1000
_SHORT = 32
"""Characters. A token that hpo makes has 43, with 256 bits: no number of guesses finds it."""


def client_of(address: str) -> str:
    """Whom an address counts for: all of an IPv6 /64 belongs to one client, which may change in it.

    address: as in REMOTE_ADDR; what is no address counts for itself.
    """
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv4Address):
        return str(found)
    if found.ipv4_mapped is not None:
        return str(found.ipv4_mapped)
    return str(ipaddress.ip_network((found, 64), strict=False))


@dataclass
class _Record:
    """One client's wrong guesses in a row."""

    num_wrong: int = 0
    until: float = 0.0
    """By the clock: the client waits until then."""


class Guesses:
    """Compares tokens with the right one; after five wrong ones a client waits after each.

    The wait doubles from one second up to a minute. While a client waits, its guesses at a short
    token, which somebody may have chosen, are not compared. A long one is compared always: it can't
    be guessed, and so a neighbour who guesses from the same address can't keep its owner out.
    """

    def __init__(self, token: str, *, clock: Callable[[], float]) -> None:
        """clock: seconds, as of time.monotonic."""
        self._token, self._clock = token, clock
        self._records: OrderedDict[str, _Record] = OrderedDict()
        self._lock = threading.Lock()

    def judge(self, address: str, given: str) -> tuple[bool, int]:
        """Whether the token is right; if not, for how many seconds its client is yet to wait."""
        client = client_of(address)
        with self._lock:
            now = self._clock()
            record = self._records.pop(client, _Record())
            if now > record.until + _FORGOTTEN_AFTER_SECONDS:
                record = _Record()
            waiting = now < record.until
            if (not waiting or len(self._token) >= _SHORT) and same(given, self._token):
                return True, 0
            seconds_left = math.ceil(record.until - now) if waiting else 0
            if not waiting:
                record.num_wrong += 1
                record.until = now + _wait_seconds(record.num_wrong)
            self._records[client] = record
            while len(self._records) > _MOST_CLIENTS:
                self._records.popitem(last=False)
            return False, seconds_left


def same(given: str, expected: str) -> bool:
    """Whether the two are equal, in a time that doesn't depend on where they differ."""
    return hmac.compare_digest(
        given.encode("utf-8", "surrogateescape"), expected.encode("utf-8", "surrogateescape")
    )


def _wait_seconds(num_wrong: int) -> float:
    beyond = num_wrong - _FREE_GUESSES
    return 0.0 if beyond < 0 else min(2.0 ** min(beyond, 30), _LONGEST_WAIT_SECONDS)
