"""The log files of processes without a terminal: not through symbolic links, not without end."""

import os
from pathlib import Path

from hpo.errors import UsageError
from storage.home import home

LARGEST_BYTES = 16 * 2**20
"""A log that has grown beyond this is put aside, in place of the one put aside before it."""


def check_log_folder() -> None:
    """Raises UsageError if no log can be written below HPO_HOME; makes nothing."""
    folder = home() / "logs"
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        raise UsageError(f"can't write logs below {folder}: set HPO_HOME to a folder of yours")


def open_log(path: Path) -> int:
    """A descriptor that appends to the log, whose folder is made if need be.

    Raises UsageError if the file or its folder is a symbolic link or can't be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.parent.is_symlink():
            raise UsageError(f"{path.parent} is a symbolic link: remove it, or set HPO_HOME")
        if not path.is_symlink() and path.exists() and path.stat().st_size > LARGEST_BYTES:
            path.replace(path.with_suffix(".log.1"))
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW
        return os.open(path, flags, 0o644)
    except OSError as error:
        raise UsageError(f"can't write the log {path}: {error.strerror}; set HPO_HOME") from error
