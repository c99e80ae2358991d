"""HPO_HOME: the one folder below which this project keeps its files."""

import contextlib
import os
import stat
from pathlib import Path

import platformdirs

from storage.errors import StorageError


def home() -> Path:
    """HPO_HOME, or the platform's user data folder. It need not exist yet.

    Users without a home, as containers have them, get a folder below /var/tmp. Raises StorageError
    if there is no telling which folder it is.
    """
    named = os.environ.get("HPO_HOME")
    if not named and _is_homeless() and not os.environ.get("XDG_DATA_HOME"):
        return _below_var_tmp()
    try:
        return Path(named or platformdirs.user_data_dir("hpo")).expanduser().absolute()
    except (OSError, RuntimeError) as error:  # a working folder that is gone, ~ of nobody
        raise StorageError(
            f"HPO_HOME names no folder, {named!r}: {error}; set it to a full path"
        ) from error


def _is_homeless() -> bool:
    """No HOME and no entry in /etc/passwd; Docker sets HOME to / for a user without an entry."""
    return os.path.expanduser("~") in ("~", "/") and os.geteuid() != 0


def _below_var_tmp() -> Path:
    folder = Path(f"/var/tmp/hpo-{os.geteuid()}")
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
        raise StorageError(f"{folder} is not ours: set HPO_HOME to a folder that can be written")
    return folder
