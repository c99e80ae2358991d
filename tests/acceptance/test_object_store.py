"""Workers that share nothing but a database and an object store."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

from storage.database import Database
from storage.snapshots import StudySnapshot, TrialSnapshot, snapshot
from storage.studies import find_studies
from tests.object_server import BUCKET, SECRET_KEY, running_server, variables
from tests.parts import Hpo, free_port

TRAINING = ("--backbone", "smallcnn", "--epochs", "12", "--trials", "1", "--workers", "1")


def study_of(database: Database) -> StudySnapshot | None:
    found = find_studies(database)
    return snapshot(database, found[0].study_id) if found else None


def killed_in_its_trial(hpo: Hpo, database: Database) -> tuple[float, ...]:
    """A launcher and its worker, killed once a trial has reports: these."""
    launcher = hpo.start("launch", *TRAINING)
    deadline = time.monotonic() + 120
    while True:
        study = study_of(database)
        if study is not None and any(len(trial.steps) > 1 for trial in study.trials):
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    (worker,) = study.workers
    launcher.kill()
    os.kill(worker.pid, signal.SIGKILL)
    launcher.communicate()
    study = study_of(database)
    assert study is not None
    return study.trials[0].values


def goes_on(
    home: Path, database: Database, database_url: str, more: dict[str, str]
) -> tuple[TrialSnapshot, str]:
    """The trial, ended by a worker with a home of its own, and what that worker said."""
    home.mkdir()
    other = Hpo(home, {"HPO_STORAGE": database_url, **more})
    done = other.run("worker", "--study", "digits")
    assert done.returncode == 0, done.stderr
    study = study_of(database)
    assert study is not None
    return study.trials[0], done.stderr


def test_a_trial_goes_on_from_its_checkpoint_on_a_machine_that_shares_an_object_store_alone(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    with running_server() as server:
        more = {
            "HPO_CHECKPOINTS": f"s3://{BUCKET}/hpo",
            "HPO_LEASE_SECONDS": "2",
            **server.environment,
        }
        (tmp_path / "one").mkdir()
        first = Hpo(tmp_path / "one", {"HPO_STORAGE": database_url, **more})
        before = killed_in_its_trial(first, database)
        assert server.names()
        trial, said = goes_on(tmp_path / "two", database, database_url, more)
        assert (trial.state, trial.attempts) == ("COMPLETE", 2)
        assert trial.values[: len(before)] == before
        assert "anew" not in said
        assert "without checkpoints" not in said
        assert server.names() == []
    assert not list(tmp_path.rglob("*.ckpt"))
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in files if SECRET_KEY.encode() in path.read_bytes()]
    assert SECRET_KEY not in said


def test_a_worker_that_can_not_reach_the_store_begins_the_trial_anew_and_says_so(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    checkpoints = {"HPO_CHECKPOINTS": f"s3://{BUCKET}/hpo", "HPO_LEASE_SECONDS": "2"}
    (tmp_path / "one").mkdir()
    with running_server() as server:
        first = Hpo(
            tmp_path / "one", {"HPO_STORAGE": database_url, **checkpoints, **server.environment}
        )
        before = killed_in_its_trial(first, database)
    unreachable = {**checkpoints, **variables(free_port())}
    trial, said = goes_on(tmp_path / "two", database, database_url, unreachable)
    assert (trial.state, trial.attempts) == ("COMPLETE", 2)
    assert trial.values[: len(before)] == before
    assert "trial 0 begins anew: no checkpoint can be reached" in said
    assert len(re.findall("goes on without checkpoints", said)) == 1
    assert SECRET_KEY not in said


def test_without_boto3_a_launch_ends_with_one_line(tmp_path: Path, database_url: str) -> None:
    hide = "import importlib.util as u; real = u.find_spec; "
    hide += "u.find_spec = lambda name, *a: None if name == 'boto3' else real(name, *a); "
    done = subprocess.run(
        [sys.executable, "-P", "-c", hide + "from hpo.cli import main; main(['launch'])"],
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "HPO_HOME": str(tmp_path),
            "HPO_STORAGE": database_url,
            "HPO_CHECKPOINTS": "s3://bucket",
        },
        timeout=120,
    )
    assert done.returncode == 3
    assert done.stderr == "hpo: checkpoints in S3 need boto3: pip install 'hpo-vision[s3]'\n"
