"""Our tables beside Optuna's: made once, whatever number of processes arrive at once."""

import optuna
import sqlalchemy
from sqlalchemy import Connection, text

from storage.database import Database
from storage.errors import StorageError

VERSION = 3
_LOCK = 0x68706F  # "hpo", for pg_advisory_xact_lock

_TABLES = """
CREATE SEQUENCE hpo_tokens;

CREATE TABLE hpo_studies (
    study_id integer PRIMARY KEY REFERENCES studies ON DELETE CASCADE,
    -- the study whose best trials this one runs again; null: a study of the user's
    parent_id integer REFERENCES hpo_studies ON DELETE CASCADE,
    spec jsonb NOT NULL,
    budget integer NOT NULL CHECK (budget > 0),
    -- names the study's folder of checkpoints, so that two databases can share one root
    checkpoint_key bigint NOT NULL,
    launched_at timestamptz NOT NULL DEFAULT now(),
    stop_requested boolean NOT NULL DEFAULT false,
    deadline timestamptz,
    test_openings integer NOT NULL DEFAULT 0,
    -- what was measured for the study, by what it is: its trials all go by the same
    remembered jsonb NOT NULL DEFAULT '{}'
);

-- one row a trial, kept after its end: attempts and times are read from it
CREATE TABLE hpo_leases (
    lease_id bigserial PRIMARY KEY,
    study_id integer NOT NULL REFERENCES hpo_studies ON DELETE CASCADE,
    trial_id integer UNIQUE REFERENCES trials ON DELETE CASCADE,
    token bigint NOT NULL,
    worker_id text,
    -- null: nobody holds it
    expires_at timestamptz,
    attempts integer NOT NULL DEFAULT 1,
    -- in a row, none of which came further than the ones before
    fruitless_attempts integer NOT NULL DEFAULT 1,
    -- images that the furthest checkpoint within an epoch had seen
    position bigint NOT NULL DEFAULT 0,
    -- attempts that ended by an error which may be the trial's own
    errors integer NOT NULL DEFAULT 0,
    -- how the newest attempt ended that did not end well
    last_error text,
    -- places (hpo_workers) that gave the trial back after an error: others go before them
    refused_by text[] NOT NULL DEFAULT '{}',
    claimed_at timestamptz NOT NULL DEFAULT now(),
    reported_at timestamptz,
    images_per_second real,
    ended_at timestamptz
);
CREATE INDEX hpo_leases_open ON hpo_leases (study_id) WHERE ended_at IS NULL;

CREATE TABLE hpo_workers (
    worker_id text PRIMARY KEY,
    study_id integer NOT NULL REFERENCES hpo_studies ON DELETE CASCADE,
    host text NOT NULL,
    pid integer NOT NULL,
    device text NOT NULL,
    seen_at timestamptz NOT NULL DEFAULT now(),
    -- the launcher and the device: what workers that replace one another share
    place text NOT NULL DEFAULT '',
    -- starting, working, or sick: it has left for a reason of its own
    state text NOT NULL DEFAULT 'working' CHECK (state IN ('starting', 'working', 'sick')),
    reason text
);

-- objects that there may be in an object store, where checkpoints are kept in one
CREATE TABLE hpo_checkpoints (
    trial_id integer NOT NULL REFERENCES trials ON DELETE CASCADE,
    token bigint NOT NULL,
    step integer NOT NULL,
    num_bytes bigint NOT NULL,
    -- false: never read again, and to be removed
    is_kept boolean NOT NULL DEFAULT true,
    PRIMARY KEY (trial_id, token, step)
);

-- "which values were reported at this step": the rungs' question at each report
CREATE INDEX hpo_values_by_step ON trial_intermediate_values (step, trial_id);

CREATE TABLE hpo_schema (
    version integer NOT NULL,
    -- tells this database from others that keep files in the same folders
    database_id uuid NOT NULL DEFAULT gen_random_uuid()
);
"""


_MIGRATIONS: dict[int, str] = {
    2: """
        ALTER TABLE hpo_leases RENAME COLUMN barren_attempts TO fruitless_attempts;
        ALTER TABLE hpo_leases ADD COLUMN position bigint NOT NULL DEFAULT 0,
            ADD COLUMN errors integer NOT NULL DEFAULT 0, ADD COLUMN last_error text,
            ADD COLUMN refused_by text[] NOT NULL DEFAULT '{}';
        ALTER TABLE hpo_workers ADD COLUMN place text NOT NULL DEFAULT '',
            ADD COLUMN state text NOT NULL DEFAULT 'working'
                CHECK (state IN ('starting', 'working', 'sick')),
            ADD COLUMN reason text;
        ALTER TABLE hpo_studies ADD COLUMN remembered jsonb NOT NULL DEFAULT '{}';
        ALTER TABLE hpo_schema ADD COLUMN database_id uuid NOT NULL DEFAULT gen_random_uuid();
    """,
}
"""What turns the tables of a version into those of the next one; studies and trials stay."""


def ensure_tables(database: Database) -> None:
    """Make Optuna's and our tables unless they are there; bring older ones up to date.

    Raises StorageError if they are those of a version that this program can't use, or if workers
    of the older version still run.
    """
    database.patiently(lambda: _ensure_tables(database))


def _ensure_tables(database: Database) -> None:
    if _version(database) != VERSION:
        with database.engine.begin() as connection:
            # held while Optuna makes its tables over a second connection of this process
            connection.execute(text("SELECT pg_advisory_xact_lock(:lock)"), {"lock": _LOCK})
            try:
                found = _version(database)
                if found is None:
                    _make_tables(database, connection)
                elif found in _MIGRATIONS:
                    _migrate(connection, found)
            except sqlalchemy.exc.ProgrammingError as error:
                reason = str(error.orig).splitlines()[0]
                raise StorageError(f"can't make the tables: {reason}") from error
    version = _version(database)
    if version != VERSION:
        raise StorageError(
            f"the database holds tables of version {version}, this program writes {VERSION}: "
            "use the version of hpo that made them, or another database"
        )


def _make_tables(database: Database, connection: Connection) -> None:
    optuna_storage(database, make_tables=True)
    connection.exec_driver_sql(_TABLES)
    connection.execute(text("INSERT INTO hpo_schema VALUES (:version)"), {"version": VERSION})


def _migrate(connection: Connection, version: int) -> None:
    """In the caller's transaction: all of it or nothing."""
    if connection.execute(_LIVE_WORKERS).scalar():
        raise StorageError(
            f"workers of an earlier hpo use these tables (version {version}): stop them, wait a "
            "minute, and give the command again, which brings the tables up to date"
        )
    while version in _MIGRATIONS:
        connection.exec_driver_sql(_MIGRATIONS[version])
        version += 1
    connection.execute(text("UPDATE hpo_schema SET version = :version"), {"version": version})


_LIVE_WORKERS = text("""
    SELECT count(*) FROM hpo_workers JOIN hpo_studies s USING (study_id)
    WHERE seen_at > now() - make_interval(secs => (s.spec->>'lease_seconds')::float)
""")


def _version(database: Database) -> int | None:
    with database.engine.connect() as connection:
        if connection.execute(text("SELECT to_regclass('hpo_schema')")).scalar() is None:
            return None
        return connection.execute(text("SELECT version FROM hpo_schema")).scalar()


def optuna_storage(database: Database, *, make_tables: bool = False) -> optuna.storages.RDBStorage:
    """Optuna's own storage on our connections, of which it needs one at a time.

    Raises StorageError if its tables don't fit.
    """
    storage = optuna.storages.RDBStorage(
        "postgresql+psycopg2://",
        engine_kwargs={"pool": database.pool},
        skip_table_creation=not make_tables,
        skip_compatibility_check=True,  # it asks over two connections, one inside the other
    )
    found, wanted = storage.get_current_version(), storage.get_head_version()
    if found != wanted:
        raise StorageError(
            f"Optuna {optuna.__version__} can't use the tables of this database, which are of "
            f"version {found}, not {wanted}: use the Optuna that made them, or another database"
        )
    return storage
