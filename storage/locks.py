"""File locks that say on whom they wait."""

import fcntl
import logging
import os
import time
from pathlib import Path

logger = logging.getLogger(__name__)
_SILENT_SECONDS = 2.0
"""Others hold a lock for moments: only a longer wait is worth a line."""


def lock(descriptor: int, operation: int, path: Path) -> None:
    """flock: waits for the lock and, when that takes a while, logs once which process holds it."""
    deadline = time.monotonic() + _SILENT_SECONDS
    while time.monotonic() < deadline:
        try:
            fcntl.flock(descriptor, operation | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            time.sleep(0.02)
    logger.warning("waiting for %s, which holds the lock on %s", holder(descriptor), path)
    fcntl.flock(descriptor, operation)


def holder(descriptor: int) -> str:
    """For people: the process that holds a lock on this file, as far as the kernel shows it."""
    there = os.fstat(descriptor)
    inode = f"{os.major(there.st_dev):02x}:{os.minor(there.st_dev):02x}:{there.st_ino}"
    try:
        # "1: FLOCK  ADVISORY  WRITE 4711 08:01:1234 0 EOF"; a line with "->" is one that waits
        lines = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:  # not Linux
        lines = []
    pids = [line[4] for line in lines if line[1] == "FLOCK" and line[5] == inode]
    # 0: a process of another container
    return f"process {pids[0]}" if pids and pids[0] != "0" else "another process"
