"""The last training of the winner: one model, or a soup of several from the same weights."""

import dataclasses
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from hpo.candidates import Candidate, RecheckPlan, pays_for_soup
from hpo.errors import ExitCode, Interrupted, StudyFailsError
from hpo.retrain import Retrainer, makes_a_soup
from hpo.space import SearchSpace
from hpo.spec import StudySpec
from storage.checkpoints import checkpoint_root
from storage.database import Database
from storage.snapshots import StudySnapshot, TrialSnapshot, snapshot
from storage.studies import StudyRecord, create_study, find_study
from tests.workers import work
from trainer import augment as augmenting
from trainer import loop
from trainer.config import TrainConfig
from trainer.data import registry
from trainer.data.dataset import ImageDataset
from trainer.data.registry import load
from trainer.device import DevicePlan
from trainer.evaluate import evaluate
from trainer.export.model import ExportModel
from trainer.loop import train
from trainer.weights import digest

PLAN = DevicePlan(device="cpu", num_threads=1)


@pytest.fixture(scope="module")
def digits() -> ImageDataset:
    whole = load("digits", seed=0)
    few = {"train": whole.train.take(range(300)), "val": whole.val.take(range(200))}
    return ImageDataset(**{**vars(whole), **few})


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory, digits: ImageDataset) -> Path:
    """Of a network that has seen some digits."""
    (*_, last) = train(TrainConfig(backbone="smallcnn", epochs=3, lr=1e-2), digits, PLAN)
    exported = ExportModel(last.state.model, mean=digits.mean, std=digits.std)
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in exported.state_dict().items()}
    path.write_bytes(safetensors.torch.save(tensors))
    return path


def spec(data: ImageDataset, weights: Path | None = None) -> StudySpec:
    return StudySpec(
        weights={} if weights is None else {str(weights): digest(weights)},
        data="digits",
        fingerprint=data.fingerprint,
        space=SearchSpace(fields={"backbone": "smallcnn", "epochs": 2}),
        seed=0,
        first_rung=4,
    )


@pytest.fixture
def retrainer(
    database: Database,
    digits: ImageDataset,
    weights: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Retrainer:
    """One whose workers run in this process; what it says is printed."""
    monkeypatch.setenv("HPO_CHECKPOINTS", str(tmp_path / "checkpoints"))
    monkeypatch.setitem(registry.SOURCES, "digits", lambda *_: digits)
    of_study = spec(digits, weights)
    record = create_study(database, "study", spec=of_study.to_json(), budget=1)
    return Retrainer(
        database=database,
        record=record,
        spec=of_study,
        run_workers=lambda child, **_: work(database, child),
        say=print,
    )


def candidate(num_values: int, **fields: Any) -> Candidate:
    config = TrainConfig.from_dict(
        {"backbone": "smallcnn", "epochs": 2, "batch_size": 32, "lr": 3e-3, **fields}
    )
    trial = TrialSnapshot(
        trial_id=1, number=0, state="COMPLETE", value=0.9, params={},
        attributes={"config": config.to_dict(), "plan": PLAN.to_dict()}, steps=(4, 8),
        values=(0.8, 0.9), is_feasible=True, attempts=1, seconds=1.0, images_per_second=100.0,
    )  # fmt: skip
    return Candidate(trial=trial, values=(0.9,) * num_values)


def test_a_soup_is_tried_on_validation_and_kept_only_if_it_wins(
    weights: Path, digits: ImageDataset, retrainer: Retrainer, capsys: pytest.CaptureFixture[str]
) -> None:
    winner = candidate(3, weights=str(weights))
    result = retrainer.retrain(winner, digits, tries_soup=True)
    tasted = result.averaging["soup"]
    assert len(set(tasted["seeds"])) == len(tasted["values"]) == 3
    assert tasted["mean of its models"] == pytest.approx(sum(tasted["values"]) / 3)
    wins = tasted["value"] > tasted["mean of its models"]
    assert (result.averaging["chosen"] == "soup") == wins
    assert len(result.seeds) == (3 if wins else 1)
    assert not set(result.seeds) & set(tasted["seeds"])
    assert "a soup of 3 models: " in capsys.readouterr().out


@pytest.mark.parametrize("wins", [True, False])
def test_a_soup_is_equal_parts_of_models_trained_on_train_and_validation(
    wins: bool,
    weights: Path,
    digits: ImageDataset,
    retrainer: Retrainer,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def taste(*_: Any) -> dict[str, Any]:
        return {"value": 0.5 + 0.1 * wins, "mean of its models": 0.55, "seeds": [1, 2]}

    monkeypatch.setattr(Retrainer, "_taste", taste)
    winner = candidate(2, weights=str(weights))
    result = retrainer.retrain(winner, digits, tries_soup=True)
    assert len(result.data.train) == 500
    assert len(set(result.seeds)) == (2 if wins else 1)
    models = [trained_here(winner, seed, digits) for seed in result.seeds]
    for name, tensor in result.model.state_dict().items():
        parts = torch.stack([model[name].double() for model in models])
        torch.testing.assert_close(tensor.double(), parts.mean(dim=0), rtol=1e-5, atol=1e-6)
    assert (
        evaluate(
            result.model, digits.val, PLAN, mean=result.data.mean, std=result.data.std
        ).accuracy
        > 0.8
    )


def trained_here(winner: Candidate, seed: int, data: ImageDataset) -> dict[str, torch.Tensor]:
    """The weights that the winner's config comes to with this seed, without any worker."""
    config = TrainConfig.from_dict({**winner.trial.attributes["config"], "seed": seed})
    (*_, last) = train(config, data.with_validation_in_training(), PLAN)
    return {name: tensor.clone() for name, tensor in last.state.result.state_dict().items()}


def test_without_a_common_start_or_means_there_is_no_soup(
    weights: Path, digits: ImageDataset, retrainer: Retrainer
) -> None:
    assert not makes_a_soup(candidate(3))
    assert not makes_a_soup(candidate(1, weights=str(weights)))
    assert makes_a_soup(candidate(2, weights=str(weights)))
    for winner, tries in ((candidate(3), True), (candidate(3, weights=str(weights)), False)):
        result = retrainer.retrain(winner, digits, tries_soup=tries)
        assert result.averaging["chosen"] == "none"
        assert "soup" not in result.averaging
        assert len(result.seeds) == 1


def test_a_retraining_is_no_trial_of_the_study_and_its_state_goes_when_it_was_used(
    digits: ImageDataset, retrainer: Retrainer
) -> None:
    first = retrainer.retrain(candidate(0), digits, tries_soup=False)
    child = find_study(retrainer.database, f"study:retrain-{retrainer.record.study_id}")
    assert child.parent_id == retrainer.record.study_id
    (trial,) = snapshot(retrainer.database, child.study_id).trials
    assert (trial.state, trial.steps) == ("COMPLETE", (1, 4, 8))
    assert trial.value == pytest.approx(-first.history[-1]["train_loss"])
    assert snapshot(retrainer.database, retrainer.record.study_id).trials == ()
    again = retrainer.retrain(candidate(0), digits, tries_soup=False)  # reads what is there
    assert len(snapshot(retrainer.database, child.study_id).trials) == 1
    retrainer.forget()
    assert list(checkpoint_root().rglob("*.ckpt")) == []
    anew = retrainer.retrain(candidate(0), digits, tries_soup=False)
    assert len(snapshot(retrainer.database, child.study_id).trials) == 2
    for other in (again, anew):
        for name, tensor in first.model.state_dict().items():
            assert torch.equal(tensor, other.model.state_dict()[name])


def test_a_retraining_that_was_interrupted_goes_on_where_it_was(
    digits: ImageDataset, retrainer: Retrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = retrainer.retrain(candidate(0), digits, tries_soup=False)
    retrainer.forget()
    batches = {"seen": 0}
    augment = augmenting.augment

    def counted(*args: Any) -> Any:
        batches["seen"] += 1
        if batches["seen"] == 12:
            os.kill(os.getpid(), signal.SIGTERM)
        return augment(*args)

    monkeypatch.setattr(loop, "augment", counted)
    with pytest.raises(Interrupted, match="the same command goes on with it"):
        retrainer.retrain(candidate(0), digits, tries_soup=False)
    result = retrainer.retrain(candidate(0), digits, tries_soup=False)
    assert batches["seen"] == 32  # 16 batches an epoch, two epochs, and none of them twice
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, result.model.state_dict()[name])


def test_a_retraining_that_fails_says_why_and_that_the_same_command_tries_again(
    digits: ImageDataset, retrainer: Retrainer
) -> None:
    def tries(child: StudyRecord, **_: Any) -> StudySnapshot:
        in_the_way = checkpoint_root() / str(child.checkpoint_key) / "results"
        in_the_way.parent.mkdir(parents=True, exist_ok=True)
        in_the_way.touch()
        while snapshot(retrainer.database, child.study_id).count("FAIL") == 0:
            work(retrainer.database, child, ends=(ExitCode.GIVEN_BACK, ExitCode.DONE))
        in_the_way.unlink()
        return snapshot(retrainer.database, child.study_id)

    failing = dataclasses.replace(retrainer, run_workers=tries)
    with pytest.raises(StudyFailsError) as raised:
        failing.retrain(candidate(0), digits, tries_soup=False)
    assert str(raised.value).startswith("retraining trial 0 failed: 3 attempts in a row")
    assert "/results" in str(raised.value)
    assert str(raised.value).endswith("; the same command trains it again")
    again = retrainer.retrain(candidate(0), digits, tries_soup=False)
    assert again.history[-1]["epoch"] == 2


@pytest.mark.parametrize(("searched", "pays"), [(17, False), (18, True)])
def test_a_soup_counts_in_the_half_of_the_search_that_a_re_check_may_cost(
    searched: int, pays: bool
) -> None:
    winner = candidate(3)
    study = StudySnapshot(
        budget=searched, stop_requested=False, seconds=1.0,
        trials=(winner.trial,) * searched, workers=(),
    )  # fmt: skip
    # six re-checks and three models, of two epochs each, against half of the epochs searched
    plan = RecheckPlan(trials=(winner.trial,) * 2, num_seeds=3, note=None)
    assert pays_for_soup(study, plan, winner, epochs=2) is pays


@pytest.mark.parametrize("average", ["ema", "tail"])
def test_a_retraining_as_short_as_the_trial_hands_over_the_average_that_was_chosen(
    digits: ImageDataset, average: str, retrainer: Retrainer
) -> None:
    stopped = candidate(2, epochs=8, patience=1)  # the trial's last report is at step 8 of 32
    winner = Candidate(trial=stopped.trial, values=(0.9, 0.8), averages={average: (0.95, 0.9)})
    result = retrainer.retrain(winner, digits, tries_soup=False)
    last = result.history[-1]
    assert result.averaging["chosen"] == average
    assert (last["step"], last["finished"]) == (8, True)
    config = TrainConfig.from_dict(
        {**stopped.trial.attributes["config"], "seed": result.seeds[0], "average": average}
    )
    (*_, report) = train(config, digits.with_validation_in_training(), PLAN, end_step=8)
    expected = report.state.averages.models()[average].state_dict()
    for name, tensor in result.model.state_dict().items():
        assert torch.equal(tensor, expected[name])
