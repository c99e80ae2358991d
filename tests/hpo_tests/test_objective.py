"""What a trial reports, and does with checkpoints that can't be used, or can't be kept."""

import dataclasses
import io
import pickle
import time
from collections.abc import Callable
from pathlib import Path
from typing import get_args

import pytest
import torch
from optuna.trial import TrialState

from hpo.errors import UsageError
from hpo.objective import Outcome, TrialRun, _say_without_checkpoints
from hpo.replay import replay_trial
from hpo.space import Range, SearchSpace
from hpo.spec import StudySpec
from hpo.utilisation import mfu, seconds_spent
from storage import leases
from storage.checkpoints import TrialCheckpoints, checkpoint_root
from storage.database import Database
from storage.leases import Lease
from storage.snapshots import snapshot
from storage.studies import OpenStudy, StudyRecord, create_study
from trainer.config import Objective, TrainConfig
from trainer.data.dataset import ImageDataset
from trainer.data.registry import load
from trainer.device import DevicePlan
from trainer.loop import train

SPEC = StudySpec(
    data="digits",
    fingerprint="none",
    space=SearchSpace(
        fields={"lr": Range(low=1e-4, high=1e-2), "backbone": "smallcnn", "epochs": 2}
    ),
    seed=0,
    first_rung=4,
)


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    whole = load("digits", seed=0)
    return ImageDataset(
        **{**vars(whole), "train": whole.train.take(range(64)), "val": whole.val.take(range(64))}
    )


@pytest.fixture
def study(database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> OpenStudy:
    monkeypatch.setenv("HPO_CHECKPOINTS", str(tmp_path / "checkpoints"))
    record = create_study(database, "study", spec=SPEC.to_json(), budget=3)
    return OpenStudy(database, record)


def claim(database: Database, record: StudyRecord) -> Lease:
    claimed = leases.claim(database, record.study_id, "w", lease_seconds=30)
    assert isinstance(claimed, Lease)
    return claimed


def run(database: Database, study: OpenStudy, data: ImageDataset) -> Outcome:
    lease = claim(database, study.record)
    return TrialRun(study, SPEC, lease, data, device="cpu", pulse=lambda: None).run()


def hollow(_valid: bytes) -> bytes:
    file = io.BytesIO()
    torch.save({"format": 1}, file)
    return file.getvalue()


def of_other_weights(valid: bytes) -> bytes:
    content = torch.load(io.BytesIO(valid), weights_only=True)
    content["model"] = {name: torch.zeros(3) for name in content["model"]}
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


class Trap:
    """Raises when it is unpickled."""

    def __reduce__(self) -> tuple[object, ...]:
        return pytest.fail, ("code of a checkpoint was run",)


def hostile(_valid: bytes) -> bytes:
    return pickle.dumps(Trap())


@pytest.mark.parametrize("forge", [hollow, of_other_weights, lambda _: b"no checkpoint", hostile])
def test_a_trial_whose_checkpoint_is_another_s_begins_anew(
    forge: Callable[[bytes], bytes],
    database: Database,
    study: OpenStudy,
    digits: ImageDataset,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lease = claim(database, study.record)
    cut = TrialRun(study, SPEC, lease, digits, device="cpu", pulse=lambda: None)

    def save(own: TrialCheckpoints, step: int, payload: bytes) -> None:
        original(own, step, forge(payload))
        raise KeyboardInterrupt

    original = TrialCheckpoints.save
    with monkeypatch.context() as patched:
        patched.setattr(TrialCheckpoints, "save", save)
        with pytest.raises(KeyboardInterrupt):
            cut.run()
    leases.release(database, lease)
    assert run(database, study, digits).state == TrialState.COMPLETE
    assert "trial 0 begins anew: the checkpoint" in caplog.text
    (trial,) = snapshot(database, study.record.study_id).trials
    assert (trial.number, trial.steps, trial.attempts) == (0, (4, 8), 2)


@pytest.mark.parametrize("objective", get_args(Objective))
def test_a_trial_reports_the_objective_and_its_last_report_is_its_value(
    objective: Objective, database: Database, study: OpenStudy, digits: ImageDataset
) -> None:
    spec = dataclasses.replace(SPEC, objective=objective)
    lease = claim(database, study.record)
    outcome = TrialRun(study, spec, lease, digits, device="cpu", pulse=lambda: None).run()
    (trial,) = snapshot(database, study.record.study_id).trials
    config = TrainConfig.from_dict(trial.attributes["config"])
    plan = DevicePlan.from_dict(trial.attributes["plan"])
    reports = list(train(config, digits, plan))
    assert list(trial.values) == [report.to_dict()[f"val_{objective}"] for report in reports]
    assert outcome.value == trial.value == trial.values[-1]


def test_a_worker_says_once_that_there_is_no_room_for_checkpoints(
    database: Database, study: OpenStudy, digits: ImageDataset, caplog: pytest.LogCaptureFixture
) -> None:
    _say_without_checkpoints.cache_clear()
    checkpoint_root().write_text("a file where a folder is to be")
    for _ in range(3):
        assert run(database, study, digits).value is not None
    assert [each for each in caplog.messages if "without checkpoints" in each] == [
        "training goes on without checkpoints (Not a directory): if this worker dies, "
        "its trial begins anew"
    ]


def test_a_trial_says_how_much_it_computed_and_where_its_seconds_went(
    database: Database, study: OpenStudy, digits: ImageDataset
) -> None:
    started = time.perf_counter()
    run(database, study, digits)
    seconds = time.perf_counter() - started
    now = snapshot(database, study.record.study_id)
    (row,) = seconds_spent(now.trials)
    assert row.pop("num_trials") == 1
    assert row.pop("worker") == ""
    assert 0 < row["training"] < sum(row.values()) <= seconds
    share = mfu(now)
    assert share is not None
    assert 0 < share < 1


def test_all_trials_of_a_study_are_computed_as_its_first_one_was(
    database: Database, digits: ImageDataset, study: OpenStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the probe finds later, when the machine is busier, or measured anew."""
    found = [
        DevicePlan(device="cpu", channels_last=channels_last).to_dict()
        for channels_last in (True, False, False)
    ]
    monkeypatch.setattr("hpo.objective.measured_once", lambda *_: found.pop(0))
    for _ in range(2):
        run(database, study, digits)
    other = OpenStudy(database, create_study(database, "other", spec=SPEC.to_json(), budget=1))
    run(database, other, digits)
    chosen = [
        trial.attributes["plan"]["channels_last"]
        for record in (study.record, other.record)
        for trial in snapshot(database, record.study_id).trials
    ]
    assert chosen == [True, True, False]


def test_a_precision_of_the_users_choice_is_not_measured(
    database: Database, digits: ImageDataset, study: OpenStudy, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(what: str, *_: object) -> float:
        assert what.startswith("peak of"), what
        return 1e9

    monkeypatch.setattr("hpo.objective.measured_once", measured)
    monkeypatch.setattr("hpo.utilisation.measured_once", measured)
    spec = dataclasses.replace(SPEC, precision="fp32")
    lease = claim(database, study.record)
    TrialRun(study, spec, lease, digits, device="cpu", pulse=lambda: None).run()
    (trial,) = snapshot(database, study.record.study_id).trials
    assert trial.attributes["plan"]["precision"] == "fp32"
    assert trial.attributes["plan"]["channels_last"] is True


def test_a_trial_that_began_in_bf16_goes_on_in_fp32_where_bf16_is_emulated_and_says_so(
    database: Database,
    digits: ImageDataset,
    study: OpenStudy,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr("trainer.device.has_fast_bf16", lambda: True)
    lease = claim(database, study.record)
    spec = dataclasses.replace(SPEC, precision="bf16")
    num_batches = []

    def cut() -> None:
        num_batches.append(1)
        if len(num_batches) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TrialRun(study, spec, lease, digits, device="cpu", pulse=cut).run()
    leases.release(database, lease)
    monkeypatch.setattr("trainer.device.has_fast_bf16", lambda: False)
    assert run(database, study, digits).state == TrialState.COMPLETE
    said = "trial 0 goes on in fp32: this processor does not compute in bf16 itself"
    assert said in caplog.messages
    (trial,) = snapshot(database, study.record.study_id).trials
    assert (trial.steps, trial.attributes["plan"]["precision"]) == ((4, 8), "bf16")
    with pytest.raises(UsageError, match="trial 0 ran in bf16, in which this machine's processor"):
        replay_trial(database, study.record, 0, epochs=1, say=print)
