import subprocess
import sys

import pytest
from sqlalchemy import text

from storage.database import Database
from storage.errors import StorageError
from storage.schema import VERSION, ensure_tables

_ARRIVE = """
import sys
from storage.database import Database
from storage.schema import ensure_tables
database = Database(sys.argv[1])
database.open()
ensure_tables(database)
"""


def test_sixteen_processes_that_find_an_empty_database_make_one_schema(empty_url: str) -> None:
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", _ARRIVE, empty_url], stderr=subprocess.PIPE, text=True
        )
        for _ in range(16)
    ]
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0] * 16, errors
    database = Database(empty_url)
    with database.engine.connect() as connection:
        assert connection.execute(text("SELECT version FROM hpo_schema")).all() == [(VERSION,)]
    database.engine.dispose()


def test_tables_of_another_version_are_refused(database: Database) -> None:
    with database.engine.begin() as connection:
        connection.execute(text("UPDATE hpo_schema SET version = 99"))
    with pytest.raises(StorageError, match=f"version 99, this program writes {VERSION}"):
        ensure_tables(database)
