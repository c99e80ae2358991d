"""The three standard streams of a process: each is there, and a lost message ends no work."""

import io
import os
import sys
from typing import Any


class _Results(io.FileIO):
    """Standard output: an error says what it is that can't be written."""

    def write(self, data: Any) -> int:
        """Raises OSError, its file being called standard output."""
        try:
            return super().write(data)
        except OSError as error:
            error.filename = "standard output"
            raise


class _Messages(io.FileIO):
    """Standard error: what can't be written, to a full disk or a closed terminal, is left out."""

    def write(self, data: Any) -> int:
        """As much as can be written; it says that all was."""
        try:
            return super().write(data)
        except OSError:
            return memoryview(data).nbytes


def open_streams() -> None:
    """Open the streams that are closed, on nothing; see to it that messages never fail.

    With a closed stream, the next file that is opened would get its number, and the output with it.
    What is written to standard error are messages: neither a search nor an export ends by them.
    """
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            nothing = os.open(os.devnull, os.O_RDWR)
            if nothing != number:
                os.dup2(nothing, number)
                os.close(nothing)
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = io.TextIOWrapper(io.BufferedReader(io.FileIO(0, closefd=False)))
    out, err = sys.stdout, sys.stderr
    for stream in (out, err):
        if stream is not None:
            stream.flush()
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(_Results(1, "w", closefd=False)),
        encoding=None if out is None else out.encoding,
        errors=None if out is None else out.errors,
        line_buffering=os.isatty(1),
    )
    sys.stderr = io.TextIOWrapper(
        io.BufferedWriter(_Messages(2, "w", closefd=False)),
        encoding=None if err is None else err.encoding,
        errors="backslashreplace",
        line_buffering=True,
    )
