"""Fixtures of hpo's tests: studies that the dashboard shows."""

import re
from collections.abc import Iterator

import optuna
import pytest

from storage.database import Database
from storage.embedded import EmbeddedPostgres
from storage.schema import optuna_storage
from tests.dashboards import fill
from tests.parts import execute, url_of


@pytest.fixture(scope="module")
def clothes_url(postgres: EmbeddedPostgres, request: pytest.FixtureRequest) -> str:
    """Of a database for one file of tests alone."""
    name = "clothes_" + re.sub(r"\W", "_", request.path.stem)
    execute(postgres, f"CREATE DATABASE {name} TEMPLATE template_hpo")
    return url_of(postgres, name)


@pytest.fixture(scope="module")
def clothes(clothes_url: str) -> Iterator[optuna.storages.RDBStorage]:
    """Holds the study "clothes": three trials COMPLETE, one PRUNED."""
    database = Database(clothes_url)
    storage = optuna_storage(database)
    fill(storage)
    yield storage
    storage.scoped_session.remove()
    database.engine.dispose()
