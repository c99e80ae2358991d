"""Pieces of Markdown in which nothing that a user named is markup."""

import math
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

_LONGEST = 80
_PLAIN = frozenset(" -")


def safe(text: Any, *, longest: int = _LONGEST) -> str:
    """The text in one line, as Markdown and HTML show it, at most so many characters of it.

    Whatever is no letter or digit becomes a character reference, which is never markup (CommonMark,
    2.5); invisible characters become U+FFFD, for some of them turn the direction of writing.
    """
    line = " ".join(str(text).split())
    if len(line) > longest:
        line = line[: longest - 1] + "…"
    return "".join(_reference(character) for character in line)


def _reference(character: str) -> str:
    if character.isalnum() or character in _PLAIN:
        return character
    if unicodedata.category(character).startswith("C"):
        return "\N{REPLACEMENT CHARACTER}"
    return f"&#{ord(character)};"


def number(value: Any) -> str:
    """A parameter or a count, short."""
    if isinstance(value, float):
        return f"{value:.4g}" if math.isfinite(value) else "unknown"
    return "unknown" if value is None else safe(value)


def share(value: Any) -> str:
    """A share with four digits."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return f"{value:.4f}" if known else "unknown"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A Markdown table; its cells are Markdown already."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
