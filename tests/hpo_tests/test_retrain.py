"""The last training of the winner: one model, or a soup of several from the same weights."""

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from hpo import retrain as retraining
from hpo.candidates import Candidate, RecheckPlan, pays_for_soup
from hpo.retrain import makes_a_soup, retrain
from hpo.space import SearchSpace
from hpo.spec import StudySpec
from storage.snapshots import StudySnapshot, TrialSnapshot
from trainer.config import TrainConfig
from trainer.data.dataset import ImageDataset
from trainer.data.registry import load
from trainer.device import DevicePlan
from trainer.evaluate import evaluate
from trainer.export.model import ExportModel
from trainer.loop import train

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


def spec(data: ImageDataset) -> StudySpec:
    return StudySpec(
        data="digits",
        fingerprint=data.fingerprint,
        space=SearchSpace(fields={"backbone": "smallcnn", "epochs": 2}),
        seed=0,
        first_rung=4,
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
    weights: Path, digits: ImageDataset
) -> None:
    said: list[str] = []
    winner = candidate(3, weights=str(weights))
    result = retrain(winner, digits, spec(digits), tries_soup=True, say=said.append)
    tasted = result.averaging["soup"]
    assert len(set(tasted["seeds"])) == len(tasted["values"]) == 3
    assert tasted["mean of its models"] == pytest.approx(sum(tasted["values"]) / 3)
    wins = tasted["value"] > tasted["mean of its models"]
    assert (result.averaging["chosen"] == "soup") == wins
    assert len(result.seeds) == (3 if wins else 1)
    assert not set(result.seeds) & set(tasted["seeds"])
    assert any(line.startswith("a soup of 3 models: ") for line in said)


@pytest.mark.parametrize("wins", [True, False])
def test_a_soup_is_equal_parts_of_models_trained_on_train_and_validation(
    wins: bool, weights: Path, digits: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    def taste(*_: Any) -> dict[str, Any]:
        return {"value": 0.5 + 0.1 * wins, "mean of its models": 0.55, "seeds": [1, 2]}

    monkeypatch.setattr(retraining, "_taste", taste)
    winner = candidate(2, weights=str(weights))
    result = retrain(winner, digits, spec(digits), tries_soup=True, say=lambda _: None)
    models = [report.state.result.state_dict() for report in result.reports]
    assert len(result.data.train) == 500
    assert len(models) == len(set(result.seeds)) == (2 if wins else 1)
    for name, tensor in result.model.state_dict().items():
        parts = torch.stack([model[name].double() for model in models])
        torch.testing.assert_close(tensor.double(), parts.mean(dim=0), rtol=1e-5, atol=1e-6)
    assert (
        evaluate(
            result.model, digits.val, PLAN, mean=result.data.mean, std=result.data.std
        ).accuracy
        > 0.8
    )


def test_without_a_common_start_or_means_there_is_no_soup(
    weights: Path, digits: ImageDataset
) -> None:
    assert not makes_a_soup(candidate(3))
    assert not makes_a_soup(candidate(1, weights=str(weights)))
    assert makes_a_soup(candidate(2, weights=str(weights)))
    for winner, tries in ((candidate(3), True), (candidate(3, weights=str(weights)), False)):
        result = retrain(winner, digits, spec(digits), tries_soup=tries, say=lambda _: None)
        assert result.averaging["chosen"] == "none"
        assert "soup" not in result.averaging
        assert len(result.seeds) == 1


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
    digits: ImageDataset, average: str
) -> None:
    stopped = candidate(2, epochs=8, patience=1)  # the trial's last report is at step 8 of 32
    winner = Candidate(trial=stopped.trial, values=(0.9, 0.8), averages={average: (0.95, 0.9)})
    result = retrain(winner, digits, spec(digits), tries_soup=False, say=lambda _: None)
    (last,) = result.reports
    assert result.averaging["chosen"] == average
    assert last.step == 8
    assert last.finished
    assert last.state.averaging == average
    assert result.model is last.state.averages.models()[average]
