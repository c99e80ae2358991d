"""What may reach a terminal: words, never what a terminal obeys.

Names come from strangers' folders, files and databases. One with an escape sequence could clear the
screen, write lines that look like ours, or type for the user; one with a line break makes two lines
of one. `say` is how hpo prints a line. Everything else that a process writes, be it of a library, a
warning or a traceback, passes the guard that `guard_output` puts before the streams.
"""

import io
import logging
import re
import sys
import unicodedata
from collections.abc import Iterable
from typing import TextIO

_KINDS = ("Cc", "Cf", "Cs", "Zl", "Zp")
"""Control, format (turns the direction of text, or is not seen), lone surrogates, line breaks."""
_JOINERS = "\u200c\u200d"
"""Of the kind Cf, and letters of Persian and Hindi (and of emoji)."""
_PLAIN = re.compile(r"[ -~]*")


def escaped(words: str, *, keep: str = "") -> str:
    """The words, with what a terminal obeys as Python would write it: `\\x1b`, `\\n`, `\\u202e`.

    keep: characters to leave as they are. A byte of a file's name that is no text is `\\xff`.
    """
    if _PLAIN.fullmatch(words):
        return words
    return "".join(
        character if _is_harmless(character) or character in keep else _written(character)
        for character in words
    )


def say(words: str, *, err: bool = False) -> None:
    """Print one line: to stdout, or to stderr."""
    say_lines([words], err=err)


def say_lines(lines: Iterable[str], *, err: bool = False) -> None:
    """Print lines, each of which stays one."""
    stream = sys.stderr if err else sys.stdout
    if stream is not None:  # closed by whoever started us
        stream.write("".join(f"{escaped(line)}\n" for line in lines))
        stream.flush()


def guard_output() -> None:
    """From now on this process writes nothing that a terminal obeys, and no character is an error.

    A character that the output's encoding lacks is written escaped.
    """
    for name in ("stdout", "stderr"):
        stream: TextIO | None = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Guard):
            if isinstance(stream, io.TextIOWrapper):
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Guard(stream))


def unguarded(stream: TextIO) -> TextIO:
    """The stream below the guard, for rich, which moves the cursor (see hpo/progress.py)."""
    return stream.stream if isinstance(stream, _Guard) else stream


class LineFormatter(logging.Formatter):
    """A record's message stays one line; a traceback below it keeps its own."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802  # logging's name
        """The first line of the record."""
        return escaped(super().formatMessage(record))


class _Guard(io.TextIOBase):
    """A text stream that passes on words, ends of lines, and tabs.

    A carriage return passes at the start of what is written: so progress bars of libraries begin.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, words: str, /) -> int:
        start = words[: len(words) - len(words.lstrip("\r"))]
        self.stream.write(start + escaped(words[len(start) :], keep="\n\t"))
        return len(words)

    def flush(self) -> None:
        self.stream.flush()

    def isatty(self) -> bool:
        return self.stream.isatty()

    def fileno(self) -> int:
        return self.stream.fileno()

    def writable(self) -> bool:
        return True

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return self.stream.encoding

    @property
    def errors(self) -> str | None:  # type: ignore[override]
        return self.stream.errors

    # there is no `buffer`: who finds one writes to it, past the guard


def _is_harmless(character: str) -> bool:
    return character in _JOINERS or unicodedata.category(character) not in _KINDS


def _written(character: str) -> str:
    if "\udc80" <= character <= "\udcff":
        return f"\\x{ord(character) - 0xDC00:02x}"
    return character.encode("unicode_escape").decode("ascii")
