"""The embedded server's guard: waits until nobody uses the server, then stops it.

Run by path, with Python's standard library alone, so that it stays small: python embedded_guard.py
FOLDER SOCKET_FOLDER.
"""

import contextlib
import fcntl
import os
import signal
import socket
import sys
import time
from pathlib import Path

LINGER_SECONDS = 3.0
"""Commands that follow one another share a server."""
_STOP_SECONDS = 60.0


def main(folder: Path, socket_folder: Path) -> None:
    """Hold guard.lock; when users.lock has been free for a while, stop the server and leave."""
    for received in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(received, signal.SIG_IGN)
    with (folder / "guard.lock").open("ab") as guard, (folder / "users.lock").open("ab") as users:
        try:
            fcntl.flock(guard, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return
        while True:
            fcntl.flock(users, fcntl.LOCK_EX)
            fcntl.flock(users, fcntl.LOCK_UN)
            time.sleep(LINGER_SECONDS)
            with contextlib.suppress(BlockingIOError):
                # whoever comes from here on waits for this lock until the server has stopped
                fcntl.flock(users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _stop(folder / "data" / "postmaster.pid", socket_folder)
                # released before users.lock, so that the next user starts a guard of its own
                fcntl.flock(guard, fcntl.LOCK_UN)
                return


def _stop(pid_file: Path, socket_folder: Path) -> None:
    try:
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(5)
            probe.connect(str(socket_folder / ".s.PGSQL.5432"))
        pid = int(pid_file.read_text().split()[0])
        os.kill(pid, signal.SIGINT)  # Postgres's fast shutdown
    except (OSError, ValueError, IndexError):
        return  # no server: nothing to stop
    deadline = time.monotonic() + _STOP_SECONDS
    while pid_file.exists() and time.monotonic() < deadline:
        time.sleep(0.02)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
