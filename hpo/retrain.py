"""The winner's last training, on train and validation: one model, or a soup of several."""

import contextlib
import dataclasses
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpo.candidates import Candidate
from hpo.errors import NoTrialError
from hpo.executors.local import num_cores
from hpo.recheck import fresh_seed
from hpo.rungs import STEPS_PER_EPOCH
from hpo.spec import StudySpec
from storage.snapshots import TrialSnapshot
from trainer.config import TrainConfig, TrainingFailure

if TYPE_CHECKING:
    from torch import nn

    from trainer.data.dataset import ImageDataset
    from trainer.reports import ProgressReport

Say = Callable[[str], None]
"""Is told, in a line, how it goes."""


@dataclass(frozen=True, kw_only=True)
class Retrained:
    """The model to hand over, and how it came about."""

    model: "nn.Module"
    config: TrainConfig
    """Of the first training; those of a soup differ in their seed."""
    data: "ImageDataset"
    """Train and validation together, normalised as the model is used to."""
    seeds: tuple[int, ...]
    reports: Sequence["ProgressReport"]
    """The last one of each training."""
    averaging: Mapping[str, Any]
    """Which average of weights was chosen, and what was tried, in words of the manifest."""


def retrain(
    winner: Candidate, data: "ImageDataset", spec: StudySpec, *, tries_soup: bool, say: Say
) -> Retrained:
    """Decide on validation how weights are averaged, then train on train and validation.

    data: with its validation split. tries_soup: whether a soup may be tried, where one makes sense.
    Raises NoTrialError if the winner can't be trained again.
    """
    from trainer.averaging import soup
    from trainer.backbones import as_fed

    average = winner.best_average()
    config = TrainConfig.from_dict(
        {
            **winner.trial.attributes["config"],
            "seed": fresh_seed(winner.trial, 0),
            **({} if average == "none" else {"average": average}),
        }
    )
    averaging: dict[str, Any] = {"chosen": average, "tried": _tried(winner)}
    num_models = 1
    if tries_soup and makes_a_soup(winner):
        tasted = _taste(config, data, winner, spec, say)
        averaging["soup"] = tasted
        if tasted["value"] > tasted["mean of its models"]:
            averaging["chosen"], num_models = "soup", len(tasted["seeds"])
    whole = as_fed(config, data.with_validation_in_training())
    seeds = tuple(fresh_seed(winner.trial, index) for index in _unused(winner, num_models))
    reports = [
        _train(dataclasses.replace(config, seed=seed), whole, winner.trial, say, "retraining")
        for seed in seeds
    ]
    models = [report.state.result for report in reports]
    return Retrained(
        model=models[0] if num_models == 1 else soup(models),
        config=config,
        data=whole,
        seeds=seeds,
        reports=reports,
        averaging=averaging,
    )


def makes_a_soup(winner: Candidate) -> bool:
    """Whether several trainings of the winner have a start in common, so that a mean is a model."""
    config = TrainConfig.from_dict(winner.trial.attributes["config"])
    return bool(config.weights or config.pretrained) and len(winner.values) > 1


def _taste(
    config: TrainConfig, data: "ImageDataset", winner: Candidate, spec: StudySpec, say: Say
) -> dict[str, Any]:
    """The validation value of a soup of as many models as the winner was re-checked with."""
    from trainer.averaging import soup
    from trainer.backbones import as_fed
    from trainer.evaluate import evaluate

    seeds = [fresh_seed(winner.trial, index + 1) for index in range(len(winner.values))]
    reports = [
        _train(dataclasses.replace(config, seed=seed), data, winner.trial, say, "for a soup")
        for seed in seeds
    ]
    fed = as_fed(config, data)
    mixed = soup([report.state.result for report in reports])
    plan = reports[0].state.plan
    found = evaluate(mixed, data.val, plan, mean=fed.mean, std=fed.std).value(spec.objective)
    values = [report.value(spec.objective) for report in reports]
    say(
        f"a soup of {len(values)} models: {found:.4f} on validation, "
        f"{statistics.fmean(values):.4f} in the mean of its models"
    )
    return {
        "value": found,
        "mean of its models": statistics.fmean(values),
        "values": values,
        "seeds": seeds,
    }


def _unused(winner: Candidate, num_models: int) -> list[int]:
    """Indices of seeds that no re-check had: 0, and those after the re-checks'."""
    after = len(winner.values) + len(winner.failures) + 1
    return [0, *range(after, after + num_models - 1)]


def _tried(winner: Candidate) -> dict[str, Any]:
    """Validation value of the winner's re-checks with the last weights and with averages."""
    tried = {"none": winner.values, **winner.averages}
    return {
        name: {"mean": sum(values) / len(values), "values": list(values)}
        for name, values in tried.items()
        if values
    }


def _train(
    config: TrainConfig, data: "ImageDataset", trial: TrialSnapshot, say: Say, what: str
) -> "ProgressReport":
    """The last report of a training as long as the trial's was, or as it would have been.

    All cores train one model now, unlike in the search, if the data is large enough to gain by it.
    Raises NoTrialError if it can't be trained again.
    """
    from trainer.device import DevicePlan, available_devices
    from trainer.loop import train

    device = available_devices()[0]
    plan = dataclasses.replace(
        DevicePlan.from_dict(trial.attributes["plan"]).on(device),
        num_threads=num_cores() if device == "cpu" and len(data.train) > 10_000 else 1,
    )
    stopped_early = trial.state == "COMPLETE" and trial.steps[-1] < config.epochs * STEPS_PER_EPOCH
    end_step = trial.steps[-1] if stopped_early else config.epochs * STEPS_PER_EPOCH
    with contextlib.closing(train(config, data, plan, end_step=end_step)) as reports:
        try:
            for report in reports:
                say(
                    f"{what} on {len(data.train):,} images: epoch {report.epoch:g} of "
                    f"{end_step / STEPS_PER_EPOCH:g}, loss {report.train_loss:.4f}, "
                    f"{report.images_per_second:,.0f} images/s"
                )
        except TrainingFailure as failure:
            raise NoTrialError(
                f"trial {trial.number} can't be trained again with another seed: {failure}"
            ) from failure
    return report
