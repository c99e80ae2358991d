"""The log files of processes without a terminal: not through links, not without end."""

import contextlib
import os
from pathlib import Path

from hpo.errors import UsageError
from storage.errors import StorageError
from storage.folders import private_folder
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
    """A descriptor that appends to the log, whose folder is made if need be; both are private.

    Raises UsageError if the file or its folder is a link, or another user's, or can't be written.
    """
    if path.parent.is_symlink():
        raise UsageError(f"{path.parent} is a symbolic link: remove it, or set HPO_HOME")
    try:
        folder = private_folder(path.parent, through_links=False)
        try:
            if folder.size(path.name) > LARGEST_BYTES:
                folder.rename(path.name, path.with_suffix(".log.1").name)
            return folder.file(path.name)
        finally:
            folder.close()
    except StorageError as error:
        raise UsageError(str(error)) from error
    except OSError as error:
        raise UsageError(f"can't write the log {path}: {error.strerror}; set HPO_HOME") from error


def touch_log() -> None:
    """Set the time of this process's log, which its output goes to, to now."""
    with contextlib.suppress(OSError):
        os.utime(1)
