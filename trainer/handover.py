"""A function in a thread of its own, in step with its caller: one of the two runs at a time."""

import threading
from collections.abc import Callable


class Stopped(Exception):
    """Raised in the thread where its caller wants no more of it."""


class Handover:
    """Runs `work` up to each of its calls of pause(), and from there when it is told to.

    What works by the thread that it is called in (signal handlers, torch's grad mode) is so
    kept apart, and what is global (torch's random state) is whose turn it is.
    """

    def __init__(self, work: Callable[[], None], *, name: str) -> None:
        self._work, self._stopping = work, False
        self._ours, self._theirs = threading.Semaphore(0), threading.Semaphore(0)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)
        self._error: BaseException | None = None
        self.ended = False

    def advance(self) -> None:
        """Let it go on until it pauses or has ended. Raises what it raised."""
        if self._thread.ident is None:
            self._thread.start()
        else:
            self._theirs.release()
        self._ours.acquire()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Have it end where it is: its next check() or pause() raises Stopped."""
        self._stopping = True
        if self._thread.ident is not None and not self.ended:
            self._theirs.release()
            self._thread.join()

    def pause(self) -> None:
        """Of the thread: let the caller go on until it says advance(). Raises Stopped."""
        self._ours.release()
        self._theirs.acquire()
        self.check()

    def check(self) -> None:
        """Of the thread. Raises Stopped if the caller has closed it."""
        if self._stopping:
            raise Stopped

    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:  # the caller's to judge
            self._error = error
        finally:
            self.ended = True
            self._ours.release()
