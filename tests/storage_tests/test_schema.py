import subprocess
import sys

import pytest
from optuna.trial import TrialState
from sqlalchemy import event, text

from storage.database import Database
from storage.errors import StorageError
from storage.leases import Lease, claim, register_worker
from storage.schema import VERSION, ensure_tables, optuna_storage
from storage.studies import OpenStudy, find_study
from tests.parts import make_study

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


_AS_VERSION_2 = """
    ALTER TABLE hpo_leases RENAME COLUMN fruitless_attempts TO barren_attempts;
    ALTER TABLE hpo_leases DROP COLUMN position, DROP COLUMN errors, DROP COLUMN last_error,
        DROP COLUMN refused_by;
    ALTER TABLE hpo_workers DROP COLUMN place, DROP COLUMN state, DROP COLUMN reason;
    ALTER TABLE hpo_studies DROP COLUMN remembered;
    ALTER TABLE hpo_schema DROP COLUMN database_id;
    UPDATE hpo_schema SET version = 2;
"""


def columns(database: Database) -> list[tuple[str, ...]]:
    with database.engine.connect() as connection:
        rows = connection.execute(
            text(
                "SELECT table_name, column_name, data_type, column_default, is_nullable"
                " FROM information_schema.columns WHERE table_name LIKE 'hpo_%' ORDER BY 1, 2"
            )
        )
        return [tuple(row) for row in rows]


def test_tables_of_version_2_are_brought_up_to_date_with_their_studies(database: Database) -> None:
    new = columns(database)
    record = make_study(database, name="old")
    with database.engine.begin() as connection:
        connection.exec_driver_sql(_AS_VERSION_2)
    ensure_tables(database)
    assert columns(database) == new
    assert find_study(database, "old") == record


def test_tables_are_left_alone_while_workers_of_the_earlier_version_run(
    database: Database,
) -> None:
    record = make_study(database)
    register_worker(database, record.study_id, "w", host="h", pid=1, device="cpu")
    with database.engine.begin() as connection:
        connection.exec_driver_sql(_AS_VERSION_2)
    with pytest.raises(StorageError, match="workers of an earlier hpo use these tables"):
        ensure_tables(database)


def test_tables_of_another_optuna_are_refused_in_one_line(database: Database) -> None:
    with database.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'v1.3.0.a'"))
    with pytest.raises(StorageError, match=r"version v1\.3\.0\.a, not v[^\n]*$"):
        optuna_storage(database)


def test_a_study_is_opened_and_worked_on_over_one_connection_at_a_time(database: Database) -> None:
    record = make_study(database)
    out, most = 0, 0

    def checked_out(*_: object) -> None:
        nonlocal out, most
        out += 1
        most = max(most, out)

    def checked_in(*_: object) -> None:
        nonlocal out
        out -= 1

    event.listen(database.pool, "checkout", checked_out)
    event.listen(database.pool, "checkin", checked_in)
    study = OpenStudy(database, record)
    lease = claim(database, record.study_id, "w", lease_seconds=30)
    assert isinstance(lease, Lease)
    trial_id = study.bind(lease)
    study.write(lease, lambda: study.trial(trial_id).suggest_float("lr", 0.0, 1.0))
    study.report(lease, 1, 0.5, images_per_second=1.0)
    study.end(lease, TrialState.COMPLETE, value=0.5, reason="whole")
    assert (out, most) == (0, 1)
