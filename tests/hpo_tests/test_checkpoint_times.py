"""When a trial is saved within an epoch, and that the next attempt goes on from there."""

import contextlib
import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from optuna.trial import TrialState

from hpo import objective
from hpo.objective import TrialRun
from hpo.space import SearchSpace
from hpo.spec import StudySpec
from storage import leases
from storage.checkpoints import TrialCheckpoints
from storage.database import Database
from storage.leases import Lease
from storage.snapshots import snapshot
from storage.studies import OpenStudy, create_study
from trainer.data.dataset import ImageDataset
from trainer.data.registry import load

SPEC = StudySpec(
    data="digits",
    fingerprint="none",
    space=SearchSpace(
        fields={"lr": 1e-2, "batch_size": 8, "backbone": "smallcnn", "epochs": 2, "flip": True}
    ),
    seed=0,
    first_rung=4,
    pruner="none",
)


class Preempted(Exception):
    """The worker was asked to leave."""


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    whole = load("digits", seed=0)
    return ImageDataset(
        **{**vars(whole), "train": whole.train.take(range(96)), "val": whole.val.take(range(64))}
    )


@pytest.fixture
def saved(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """The step that each checkpoint was kept under."""
    monkeypatch.setenv("HPO_CHECKPOINTS", str(tmp_path / "checkpoints"))
    steps: list[int] = []
    save = TrialCheckpoints.save

    def noted(self: TrialCheckpoints, step: int, payload: bytes) -> None:
        steps.append(step)
        save(self, step, payload)

    monkeypatch.setattr(TrialCheckpoints, "save", noted)
    return steps


def a_study(database: Database, spec: StudySpec) -> OpenStudy:
    name = f"study-{spec.folds}-{spec.seed}"
    return OpenStudy(database, create_study(database, name, spec=spec.to_json(), budget=9))


def attempt(
    database: Database,
    study: OpenStudy,
    spec: StudySpec,
    data: ImageDataset,
    *,
    pulse: Callable[[], None] = lambda: None,
    is_leaving: Callable[[], bool] = lambda: False,
) -> TrialState:
    lease = leases.claim(database, study.record.study_id, "w", lease_seconds=30)
    assert isinstance(lease, Lease)
    run = TrialRun(study, spec, lease, data, device="cpu", pulse=pulse, is_leaving=is_leaving)
    try:
        return run.run().state
    except Preempted:
        leases.forget_worker(database, "w")
        raise


def values(database: Database, study: OpenStudy) -> list[tuple[float, ...]]:
    return [trial.values for trial in snapshot(database, study.record.study_id).trials]


@dataclass
class Clock:
    """Preempts a training after so many batches."""

    most: int
    num_batches: int = 0

    def tick(self) -> None:
        self.num_batches += 1
        if self.num_batches > self.most:
            raise Preempted

    def has_run_out(self) -> bool:
        return self.num_batches >= self.most


@pytest.mark.usefixtures("saved")
@pytest.mark.parametrize("folds", [None, 2])
def test_a_trial_that_is_preempted_every_few_batches_ends_as_if_it_had_never_been(
    folds: int | None, database: Database, digits: ImageDataset
) -> None:
    spec = dataclasses.replace(SPEC, folds=folds)
    whole = a_study(database, dataclasses.replace(spec, seed=0))
    assert attempt(database, whole, spec, digits) is TrialState.COMPLETE
    cut = a_study(database, dataclasses.replace(spec, seed=1))
    num_attempts, state = 0, None
    while state is None:
        num_attempts += 1
        clock = Clock(most=4 + num_attempts % 3)  # evaluations, in which nothing is saved, tick too
        with contextlib.suppress(Preempted):
            state = attempt(
                database, cut, spec, digits, pulse=clock.tick, is_leaving=clock.has_run_out
            )
    assert num_attempts > 4
    assert values(database, cut) == values(database, whole)
    (trial,) = snapshot(database, cut.record.study_id).trials
    assert (trial.state, trial.attempts) == ("COMPLETE", num_attempts)


def test_a_training_is_saved_within_an_epoch_when_enough_time_has_passed(
    database: Database, digits: ImageDataset, saved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    study = a_study(database, SPEC)
    monkeypatch.setattr(objective, "CHECKPOINT_SECONDS", 1e9)
    attempt(database, study, SPEC, digits)
    assert saved == [1, 4, 8]
    saved.clear()
    monkeypatch.setattr(objective, "CHECKPOINT_SECONDS", 0.0)
    attempt(database, study, SPEC, digits)
    assert saved == [0] * 3 + [1] * 10 + [4] * 13 + [8]
