"""Files of deleted studies go; those of other databases, and of nobody known, stay."""

from pathlib import Path

import optuna
import pytest

from storage.database import Database
from storage.leases import Lease, claim
from storage.leftovers import logs_of, mark, remove_leftovers
from storage.studies import OpenStudy, StudyRecord
from tests.parts import make_study


@pytest.fixture(autouse=True)
def own_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_HOME", str(tmp_path))


def with_files(database: Database, name: str) -> tuple[StudyRecord, list[Path]]:
    """A study with a checkpoint and logs."""
    record = make_study(database, name=name)
    study = OpenStudy(database, record)
    lease = claim(database, record.study_id, "w", lease_seconds=30)
    assert isinstance(lease, Lease)
    checkpoints = study.checkpoints(lease, study.bind(lease), trial_number=0)
    checkpoints.take_over()
    checkpoints.save(1, b"one")
    logs = logs_of(record.checkpoint_key)
    logs.mkdir(parents=True)
    (logs / "worker-0.log").write_text("a line")
    mark(database, logs)
    return record, [logs, logs.parents[1] / "checkpoints" / str(record.checkpoint_key)]


def delete(database: Database, record: StudyRecord) -> None:
    study = OpenStudy(database, record).study
    optuna.delete_study(study_name=record.name, storage=study._storage)


def test_logs_and_checkpoints_of_a_deleted_study_go_and_those_of_others_stay(
    database: Database, tmp_path: Path
) -> None:
    _, of_one = with_files(database, "one")
    deleted, of_deleted = with_files(database, "deleted")
    delete(database, deleted)
    unmarked = tmp_path / "logs" / "12345"
    unmarked.mkdir()
    foreign = tmp_path / "checkpoints" / "67890"
    foreign.mkdir()
    (foreign / "database").write_text("another database")
    assert sorted(remove_leftovers(database)) == sorted(of_deleted)
    assert all(folder.is_dir() for folder in (*of_one, unmarked, foreign))
    assert not any(folder.exists() for folder in of_deleted)
    assert remove_leftovers(database) == []


def test_a_link_in_the_place_of_a_studys_folder_is_neither_marked_nor_followed(
    database: Database, tmp_path: Path
) -> None:
    record, (logs, checkpoints) = with_files(database, "deleted")
    delete(database, record)
    elsewhere = tmp_path / "elsewhere"
    checkpoints.rename(elsewhere)
    checkpoints.symlink_to(elsewhere)
    assert remove_leftovers(database) == [logs]
    assert (elsewhere / "database").exists()
    (elsewhere / "database").unlink()
    with pytest.raises(OSError, match=r"Not a directory|symbolic links"):
        mark(database, checkpoints)
    assert not (elsewhere / "database").exists()
