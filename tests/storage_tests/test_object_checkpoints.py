"""Both places for checkpoints under one contract, and an object store that fails."""

import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from storage import leases
from storage.checkpoints import Checkpoints, TrialCheckpoints
from storage.database import Database
from storage.errors import LeaseLost, StorageError
from storage.leases import Lease
from storage.object_checkpoints import ObjectCheckpoints
from storage.object_store import ObjectStore, ObjectStoreError
from storage.studies import OpenStudy, check_checkpoint_place
from tests.object_server import (
    BUCKET,
    SECRET_KEY,
    ObjectServer,
    forget_clients,
    refusing_server,
    running_server,
    variables,
)
from tests.parts import free_port, make_study
from tests.storage_tests.checkpoints_contract import CheckpointsContract, Place

URL = f"s3://{BUCKET}/some/prefix"


class FolderPlace(Place):
    """Files below a folder."""

    def __init__(self, root: Path) -> None:
        self._root, self._token = root, 0

    def attempt(self, trial: int) -> Checkpoints:
        self._token += 1
        return TrialCheckpoints(self._root, study_key=7, trial_number=trial, token=self._token)

    def names(self) -> list[str]:
        return [str(path) for path in self._root.rglob("*.ckpt")]

    def read(self, name: str) -> bytes:
        return Path(name).read_bytes()

    def put(self, name: str, content: bytes | None) -> None:
        if content is None:
            Path(name).unlink()
        else:
            Path(name).write_bytes(content)


class ObjectPlace(Place):
    """Objects of an S3 server, with real leases."""

    def __init__(self, database: Database, server: ObjectServer) -> None:
        self._database, self._server = database, server
        self.record = make_study(database, budget=50)
        self._study = OpenStudy(database, self.record)
        self._leases: dict[int, Lease] = {}
        self._ids: dict[int, int] = {}

    def attempt(self, trial: int) -> ObjectCheckpoints:
        if trial not in self._leases:
            claimed = leases.claim(self._database, self.record.study_id, "w", lease_seconds=60)
            assert isinstance(claimed, Lease)
            self._ids[trial] = self._study.bind(claimed)
            self.execute(trial, "UPDATE trials SET number = :n WHERE trial_id = :t")
        else:
            self.execute(trial, "UPDATE hpo_leases SET expires_at = NULL WHERE trial_id = :t")
            taken = leases.claim(self._database, self.record.study_id, "w", lease_seconds=60)
            assert isinstance(taken, Lease)
            claimed = taken
        self._leases[trial] = claimed
        return ObjectCheckpoints(
            ObjectStore.of(URL),
            self._database,
            claimed,
            trial_id=self._ids[trial],
            study_key=self.record.checkpoint_key,
        )

    def execute(self, trial: int, statement: str) -> None:
        """With :t the trial's id and :n its number."""
        with self._database.engine.begin() as connection:
            connection.execute(text(statement), {"t": self._ids[trial], "n": trial})

    def end(self, trial: int, state: str) -> None:
        self.execute(
            trial,
            f"UPDATE trials SET state = '{state}', datetime_complete = clock_timestamp() "
            "WHERE trial_id = :t",
        )
        self.execute(
            trial, "UPDATE hpo_leases SET ended_at = now(), expires_at = NULL WHERE trial_id = :t"
        )

    def names(self) -> list[str]:
        return self._server.names()

    def read(self, name: str) -> bytes:
        return self._server.read(name)

    def put(self, name: str, content: bytes | None) -> None:
        if content is None:
            self._server.delete(name)
        else:
            self._server.write(name, content)

    def num_rows(self) -> int:
        """Of the table beside the objects."""
        with self._database.engine.connect() as connection:
            return int(
                connection.execute(text("SELECT count(*) FROM hpo_checkpoints")).scalar_one()
            )


@pytest.fixture(scope="module")
def server() -> Iterator[ObjectServer]:
    with running_server() as running:
        yield running


@pytest.fixture
def objects(
    database: Database, server: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[ObjectPlace]:
    for name, value in server.environment.items():
        monkeypatch.setenv(name, value)
    forget_clients()
    yield ObjectPlace(database, server)
    for name in server.names():
        server.delete(name)
    forget_clients()


class TestFolder(CheckpointsContract):
    @pytest.fixture
    def place(self, tmp_path: Path) -> Place:
        return FolderPlace(tmp_path)


class TestObjectStore(CheckpointsContract):
    @pytest.fixture
    def place(self, objects: ObjectPlace) -> Place:
        return objects

    def test_names_are_integers_below_the_prefix(self, objects: ObjectPlace) -> None:
        objects.begun(3).save(8, b"eight")
        (name,) = objects.names()
        prefix, key, trial, token, step = name.rsplit("/", 4)
        assert (prefix, int(key), trial, step) == (
            "some/prefix",
            objects.record.checkpoint_key,
            "3",
            "8.ckpt",
        )
        assert token.isdecimal()

    def test_a_kill_between_row_and_object_leaves_what_the_next_steps_remove(
        self, objects: ObjectPlace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        first = objects.begun(0)
        first.save(4, b"four")
        with monkeypatch.context() as patched:
            patched.setattr(ObjectStore, "write", _killed)
            with pytest.raises(Killed):
                first.save(8, b"eight")
        second = objects.attempt(0)
        assert second.take_over() == b"four"
        with monkeypatch.context() as patched:
            patched.setattr(ObjectStore, "remove", _killed)
            second.save(8, b"eight")
            with pytest.raises(Killed):
                second.save(12, b"twelve")
        assert len(objects.names()) == 3
        third = objects.attempt(0)
        assert third.take_over() == b"twelve"
        third.save(16, b"sixteen")
        assert len(objects.names()) == 2
        objects.end(0, "COMPLETE")
        third.remove()
        assert (objects.names(), objects.num_rows()) == ([], 0)

    def test_who_dies_between_a_trials_end_and_its_removal_leaves_it_to_another_trial(
        self, objects: ObjectPlace
    ) -> None:
        objects.begun(0).save(4, b"four")
        objects.end(0, "COMPLETE")
        other = objects.begun(1)
        other.save(4, b"four")
        objects.end(1, "PRUNED")
        other.remove()
        assert objects.names() == []

    def test_an_upload_that_ends_after_the_take_over_is_removed_by_its_own_attempt(
        self, objects: ObjectPlace, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        old = objects.begun(0)
        old.save(4, b"four")
        upload = ObjectStore.write

        def slow(store: ObjectStore, name: str, content: bytes) -> None:
            with monkeypatch.context() as patched:
                patched.setattr(ObjectStore, "write", upload)
                assert objects.attempt(0).take_over() == b"four"
            upload(store, name, content)

        monkeypatch.setattr(ObjectStore, "write", slow)
        with pytest.raises(LeaseLost):
            old.save(8, b"late")
        assert [name.split("/")[-1] for name in objects.names()] == ["4.ckpt"]


class Killed(BaseException):
    """As if the process had ended here."""


def _killed(*_: object) -> None:
    raise Killed


@pytest.mark.parametrize("status", [403, 500, None], ids=["denied", "broken", "gone"])
def test_a_store_that_fails_is_an_os_error_within_seconds(
    status: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = ObjectStore.of(URL)
    with refusing_server(status or 500) as port:
        for name, value in variables(port if status else free_port()).items():
            monkeypatch.setenv(name, value)
        forget_clients()
        started = time.monotonic()
        calls: tuple[Callable[[], object], ...] = (
            lambda: store.write("1/1/1/1.ckpt", b"x"),
            lambda: store.read("1/1/1/1.ckpt", most_bytes=1),
            lambda: store.remove("1/1/1/1.ckpt"),
        )
        for call in calls:
            with pytest.raises(ObjectStoreError) as caught:
                call()
            message = str(caught.value)
            assert message.startswith(f"{URL}: ")
            assert str(status or "EndpointConnectionError") in message
            assert SECRET_KEY not in message
        assert time.monotonic() - started < 20
    forget_clients()


def test_a_store_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("storage.object_store._ANSWER_SECONDS", 0.5)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen(8)
        for name, value in variables(silent.getsockname()[1]).items():
            monkeypatch.setenv(name, value)
        forget_clients()
        started = time.monotonic()
        with pytest.raises(ObjectStoreError, match="ReadTimeoutError"):
            ObjectStore.of(URL).read("1/1/1/1.ckpt", most_bytes=1)
        assert time.monotonic() - started < 10
    forget_clients()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("s3://", "names no bucket"),
        ("s3://A_B/x", "names no bucket"),
        ("gs://bucket/x", "no 'gs' stores"),
        ("file://host/x", "names no folder"),
    ],
)
def test_a_place_that_can_not_be_is_refused_in_one_line(
    url: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HPO_CHECKPOINTS", url)
    with pytest.raises(StorageError, match=message):
        check_checkpoint_place()


def test_without_boto3_one_line_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with pytest.raises(StorageError, match=r"pip install 'hpo-vision\[s3\]'"):
        ObjectStore.of(URL)
