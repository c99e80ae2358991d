"""What workers will need, imported: for the server that they are forked from, and nobody else.

To import this module is its one effect. All that is there then is frozen: the collectors of workers
would look through it again and again, and copy the memory that they share by that.
"""

import atexit
import gc
import sys

from hpo.import_path import isolate
from hpo.imports import import_all

isolate()  # before anything else is imported, PYTHONPATH's folders being last
import_all(
    [
        "hpo.worker",
        "hpo.cli",
        # what a worker would import by itself, each one anew
        "alembic.config",
        "alembic.migration",
        "numpy.random",
        "optuna.storages._rdb.models",
        "psycopg2.extras",
        "pydantic.type_adapter",  # typer, when it parses
        "sqlalchemy.dialects.postgresql.psycopg2",
        "sqlalchemy.orm",
        "trainer.data.registry",
    ]
)
sys.modules["sqlalchemy.orm"].configure_mappers()
gc.freeze()
atexit.register(gc.unfreeze)  # triton complains of what is left over
