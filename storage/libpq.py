"""Connections that nothing of the environment reaches.

libpq fills in what a connection isn't told from variables (PGPORT, PGREQUIREAUTH, ...), from the
service that PGSERVICE names and from ~/.pgpass. A parameter that is given wins over all of these,
also an empty one. Four variables have no parameter that wins over them.
"""

import functools
import os

import psycopg2
import psycopg2.extensions

_NEUTRAL = {
    "application_name": "hpo",
    "channel_binding": "disable",
    "client_encoding": "UTF8",
    "connect_timeout": "5",
    "gssdelegation": "0",
    "gssencmode": "disable",
    "gsslib": "",
    "hostaddr": "",
    "krbsrvname": "postgres",
    "load_balance_hosts": "disable",
    "max_protocol_version": "3.0",
    "min_protocol_version": "3.0",
    "options": "",
    "passfile": "",
    # asked for by nobody, but with it libpq doesn't look into ~/.pgpass and complain of its mode
    "password": "unused",
    "port": "5432",
    "require_auth": "",
    "requirepeer": "",
    "ssl_max_protocol_version": "",
    "ssl_min_protocol_version": "",
    "sslcert": "",
    "sslcertmode": "disable",
    "sslcompression": "0",
    "sslcrl": "",
    "sslcrldir": "",
    "sslkey": "",
    "sslmode": "disable",
    "sslnegotiation": "postgres",
    "sslrootcert": "",
    "sslsni": "1",
    "target_session_attrs": "any",
}
_WITHOUT_PARAMETER = ("PGDATESTYLE", "PGGEQO", "PGSERVICE", "PGTZ")


def sealed(parameters: dict[str, str]) -> dict[str, str]:
    """These parameters, and a neutral value for all others that the environment could set."""
    # The C library's copy alone forgets them, and for good: putting one back would move the table
    # that other threads read. os.environ keeps them, for `service_of_the_environment`.
    for name in _WITHOUT_PARAMETER:
        if name in os.environ:
            os.unsetenv(name)
    known = {name: value for name, value in _NEUTRAL.items() if is_parameter(name)}
    return {**known, **parameters}


def service_of_the_environment() -> str | None:
    """PGSERVICE, for connections of the user's, also once `sealed` has taken it from libpq."""
    return os.environ.get("PGSERVICE") or None


@functools.cache
def is_parameter(name: str) -> bool:
    """Whether this libpq has a parameter of this name: versions differ."""
    if not name.isidentifier():
        return False
    try:
        psycopg2.extensions.parse_dsn(f"{name}=''")
    except psycopg2.ProgrammingError:
        return False
    return True
