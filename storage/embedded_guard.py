"""The embedded server's guard: waits until nobody uses the server, then stops it.

Run by path in the folder of the server, with Python's standard library alone, so that it stays
small. It may run as root and the server as another user, who can write what he likes into the data
folder: only what /proc shows to be the server is signalled.
"""

import contextlib
import fcntl
import os
import signal
import time

LINGER_SECONDS = 3.0
"""Commands that follow one another share a server."""
_LOCKS = ("guard.lock", "users.lock")
_STOP_SECONDS = 60.0


def main() -> None:
    """Hold guard.lock; when users.lock has been free for a while, stop the server and leave."""
    for received in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(received, signal.SIG_IGN)
    guard, users = (os.open(name, os.O_RDWR | os.O_NOFOLLOW) for name in _LOCKS)
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
            _stop()
            # released before users.lock, so that the next user starts a guard of its own
            fcntl.flock(guard, fcntl.LOCK_UN)
            return


def mark(data: os.stat_result) -> str:
    """The name by which a server of this data folder is known, in its arguments."""
    return f"hpo-{data.st_dev:x}-{data.st_ino:x}"


def postmaster(data: int) -> int | None:
    """The process that serves the data folder of this descriptor, if there is one.

    The pid file alone proves nothing: it stays when the server is killed, another process may have
    its number by then, and whoever runs the server can write any number into it.
    """
    with contextlib.suppress(OSError, ValueError, IndexError):
        pid = int(_pid_file(data).split()[0])
        folder = os.fstat(data)
        if pid <= 0:
            return None
        if not os.path.exists("/proc/self"):
            os.kill(pid, 0)  # macOS
            return pid
        # the user's own processes are all that writing a number there can bring into play
        if os.stat(f"/proc/{pid}").st_uid == folder.st_uid and _serves(pid, folder):
            return pid
    return None


def _pid_file(data: int) -> bytes:
    flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
    descriptor = os.open("postmaster.pid", flags, dir_fd=data)
    try:
        return os.read(descriptor, 32)
    finally:
        os.close(descriptor)


def _serves(pid: int, folder: os.stat_result) -> bool:
    """Whether this is Postgres on this folder; a zombie has no arguments."""
    with open(f"/proc/{pid}/cmdline", "rb") as shown:
        program, *arguments = shown.read(65_536).split(b"\0")
    if os.path.basename(program) != b"postgres":
        return False
    if f"cluster_name={mark(folder)}".encode() in arguments:
        return True
    # a server that an earlier version started; root in a container may not look
    with contextlib.suppress(OSError):
        return os.path.samestat(os.stat(f"/proc/{pid}/cwd"), folder)
    return False


def _stop() -> None:
    flags = os.O_RDONLY | os.O_DIRECTORY
    if os.stat(".").st_uid != os.geteuid():
        flags |= os.O_NOFOLLOW  # its owner can have put a link there
    try:
        data = os.open("data", flags)
    except OSError:
        return  # no server was ever made: nothing to stop
    pid = postmaster(data)
    if pid is None:
        return
    # a descriptor is of the process that has the number now: it is asked once more who that is
    try:
        process = os.pidfd_open(pid)
    except (AttributeError, OSError):  # gone, or no Linux of these years
        process = None
    if postmaster(data) != pid:
        return
    if process is None:
        os.kill(pid, signal.SIGINT)
    else:
        signal.pidfd_send_signal(process, signal.SIGINT)  # Postgres's fast shutdown
    deadline = time.monotonic() + _STOP_SECONDS
    while postmaster(data) == pid and time.monotonic() < deadline:
        time.sleep(0.02)


if __name__ == "__main__":
    main()
