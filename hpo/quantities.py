"""Times and sizes as users write them."""

import re

from hpo.errors import UsageError


def parse_duration(option: str, text: str) -> float:
    """Seconds of '90s', '30m', '2h' or '90'. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if seconds <= 0:
        raise UsageError(f"{option} takes a time above 0, like 90s, 30m or 2h, got {text!r}")
    return seconds


def parse_bytes(option: str, text: str) -> int:
    """Bytes of '500M', '2G' or '2000000000', in powers of 1024. Raises UsageError."""
    match = re.fullmatch(r"(\d{1,15})([KMGT]?)", text.strip())
    if match is None:
        raise UsageError(f"{option} takes a size like 500M or 2G, got {text!r}")
    return int(match[1]) << 10 * " KMGT".index(match[2] or " ")
