"""What deleted studies have left among the files: their logs and checkpoints.

A study may be deleted with Optuna's own tools or the dashboard, which know nothing of files. So
each folder of a study says which database its study is in, and whoever launches a study there
removes the folders of those that are gone. Folders of other databases, which may share the place,
and folders that don't say whose they are stay. Objects in a store stay, too.
"""

import contextlib
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from sqlalchemy import text

from storage.checkpoints import checkpoint_root, checkpoint_url
from storage.database import Database
from storage.home import home

_MARK = "database"


def logs_of(study_key: int) -> Path:
    """The folder of the logs of a study's workers on this machine."""
    return home() / "logs" / f"{study_key:d}"


def mark(database: Database, folder: Path) -> None:
    """Have a study's folder say which database its study is in. Raises OSError."""
    identity = _identity(database)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    try:
        with open(os.open(_MARK, flags, 0o600, dir_fd=descriptor), "w") as file:
            file.write(identity)
    except FileExistsError:
        pass  # it says so already
    finally:
        os.close(descriptor)


def remove_leftovers(database: Database) -> list[Path]:
    """Remove the folders of studies that are not in this database any more; returns them."""
    identity = _identity(database)
    known = _keys(database)
    places = [home() / "logs"] + ([checkpoint_root()] if checkpoint_url() is None else [])
    removed = []
    for folder in (each for place in places for each in _folders(place)):
        if folder.name not in known and _read_mark(folder) == identity:
            shutil.rmtree(folder, ignore_errors=True)
            removed.append(folder)
    return removed


def _folders(place: Path) -> Iterable[Path]:
    with contextlib.suppress(OSError):
        for folder in place.iterdir():
            if folder.name.isdigit() and folder.is_dir() and not folder.is_symlink():
                yield folder


def _read_mark(folder: Path) -> str | None:
    try:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
        with open(os.open(folder / _MARK, flags)) as file:
            return file.read(100)
    except (OSError, UnicodeDecodeError):
        return None


def _identity(database: Database) -> str:
    def query() -> str:
        with database.engine.connect() as connection:
            return str(connection.execute(text("SELECT database_id FROM hpo_schema")).scalar_one())

    return database.patiently(query)


def _keys(database: Database) -> set[str]:
    def query() -> set[str]:
        with database.engine.connect() as connection:
            found = connection.execute(text("SELECT checkpoint_key FROM hpo_studies")).scalars()
            return {str(key) for key in found}

    return database.patiently(query)
