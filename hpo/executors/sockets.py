"""multiprocessing's sockets in a folder with a path that is short enough for them."""

import multiprocessing.util
import os
import tempfile

from hpo.errors import UsageError

_LONGEST_BYTES = 60
"""A socket's path has 103 bytes on macOS, and multiprocessing adds 33 to the folder's."""
_SHORT = ("/tmp", "/var/tmp", "/dev/shm")


def short_folder_for_sockets() -> None:
    """Where TMPDIR's path is too long (jobs of a cluster), choose another folder for the sockets.

    Processes that multiprocessing starts inherit it. Raises UsageError if there is none.
    """
    if len(os.fsencode(tempfile.gettempdir())) <= _LONGEST_BYTES:
        return
    named = tempfile.tempdir
    for folder in _SHORT:
        tempfile.tempdir = folder
        try:
            multiprocessing.util.get_temp_dir()  # makes it once and keeps it
        except OSError:
            continue
        finally:
            tempfile.tempdir = named
        return
    raise UsageError(
        f"the path of the temporary folder {named} is too long for a socket, and none of "
        f"{', '.join(_SHORT)} can be written: set TMPDIR to a folder with a short path"
    )
