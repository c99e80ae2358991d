"""Ctrl-C and SIGTERM in each part of a command's life.

While a command works, both raise KeyboardInterrupt, which it answers. Before that, while Python
imports the command line, and after it, while the process ends, nobody would catch it, and the user
would see a traceback: there the process leaves at once.
"""

import os
import signal
from types import FrameType

_INTERRUPTED = 130
"""ExitCode.INTERRUPTED, which takes an import; this module comes before all others."""


def leave_at_once() -> None:
    """From now on a signal ends the process, without a word."""
    _answer_by(_leave)


def interrupt_by_exception() -> None:
    """From now on a signal raises KeyboardInterrupt."""
    _answer_by(signal.default_int_handler)


def _answer_by(handler: "signal._HANDLER") -> None:
    if signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:  # a shell's background job
        signal.signal(signal.SIGINT, handler)
    signal.signal(signal.SIGTERM, handler)


def _leave(_number: int, _frame: FrameType | None) -> None:
    os._exit(_INTERRUPTED)
