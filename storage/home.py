"""HPO_HOME: the one folder below which this project keeps its files."""

import os
from pathlib import Path

import platformdirs

from storage.errors import StorageError


def home() -> Path:
    """HPO_HOME, or the platform's user data folder. It need not exist yet.

    Raises StorageError if there is no telling which folder that is.
    """
    named = os.environ.get("HPO_HOME")
    try:
        return Path(named or platformdirs.user_data_dir("hpo")).expanduser().absolute()
    except (OSError, RuntimeError) as error:  # a working folder that is gone, no HOME
        raise StorageError(
            f"there is no folder {named or 'of the user'} ({error}): set HPO_HOME to one"
        ) from error
