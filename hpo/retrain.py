"""The winner's last training, on train and validation: one model, or a soup of several.

Retrainings are trials of a study of their own, whose parent is the search's: workers train them
under leases, so that one which is killed goes on from its last checkpoint, on whatever worker takes
it up. Each leaves its last state behind, from which the model is made here.
"""

import dataclasses
import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpo.candidates import Candidate
from hpo.errors import Interrupted, NoTrialError, StudyFailsError
from hpo.executors.local import num_cores
from hpo.objective import RETRAINING, Retraining
from hpo.recheck import RunWorkers, fresh_seed
from hpo.rungs import STEPS_PER_EPOCH
from hpo.spec import StudySpec
from storage.database import Database
from storage.errors import StudyNotFound
from storage.kept_states import KeptStates
from storage.snapshots import TrialSnapshot, snapshot
from storage.starting_points import KEY, add_starting_points
from storage.studies import StudyRecord, create_study, find_study
from trainer.config import TrainConfig

if TYPE_CHECKING:
    from torch import nn

    from trainer.data.dataset import ImageDataset
    from trainer.device import DevicePlan
    from trainer.trained import Trained

Say = Callable[[str], None]
"""Is told, in a line, how it goes."""
_MANY_IMAGES = 10_000
"""From here on all cores together train one model faster than one core does."""


@dataclass(frozen=True, kw_only=True)
class Retrained:
    """The model to hand over, and how it came about."""

    model: "nn.Module"
    config: TrainConfig
    """Of the first training; those of a soup differ in their seed."""
    data: "ImageDataset"
    """Train and validation together, normalised as the model is used to."""
    seeds: tuple[int, ...]
    plan: "DevicePlan"
    """How its device was used."""
    history: Sequence[Mapping[str, Any]]
    """All reports of the first training, as plain values."""
    averaging: Mapping[str, Any]
    """Which average of weights was chosen, and what was tried, in words of the manifest."""


@dataclass(frozen=True, kw_only=True)
class Retrainer:
    """Trains a candidate's config again, by workers, and opens what they come to."""

    database: Database
    record: StudyRecord
    """Of the search."""
    spec: StudySpec
    run_workers: RunWorkers
    say: Say

    def retrain(self, winner: Candidate, data: "ImageDataset", *, tries_soup: bool) -> Retrained:
        """Decide on validation how weights are averaged, then train on train and validation.

        data: with its validation split. tries_soup: whether a soup may be tried, where one makes
        sense. Raises NoTrialError if the winner diverges with another seed, StudyFailsError if
        its training ends by errors, Interrupted if it was stopped, and what the workers' launch
        raises.
        """
        from trainer.averaging import soup
        from trainer.backbones import as_fed

        average = winner.best_average()
        chosen = {} if average == "none" else {"average": average}
        config = self.spec.trial_config({
            **winner.trial.attributes["config"], "seed": fresh_seed(winner.trial, 0), **chosen,
        })  # fmt: skip
        averaging: dict[str, Any] = {"tried": _tried(winner)}
        num_models = 1
        if tries_soup and makes_a_soup(winner):
            tasted = self._taste(config, data, winner)
            averaging["soup"] = tasted
            if tasted["value"] > tasted["mean of its models"]:
                num_models = len(tasted["seeds"])
        whole = data.with_validation_in_training()
        seeds = tuple(fresh_seed(winner.trial, index) for index in _unused(winner, num_models))
        self.say(f"retraining trial {winner.trial.number} on {len(whole.train):,} images")
        trained = self._trained(winner.trial, config, seeds, whole, is_whole=True)
        models = [each.model for each in trained]
        averaging["chosen"] = "soup" if num_models > 1 else trained[0].averaging
        return Retrained(
            model=models[0] if num_models == 1 else soup(models),
            config=config,
            data=as_fed(config, whole),
            seeds=seeds,
            plan=trained[0].plan,
            history=trained[0].history,
            averaging=averaging,
        )

    def forget(self) -> None:
        """Remove the states that retrainings have left: what they are for is done."""
        child = self._study()
        kept = KeptStates(child.checkpoint_key)
        for trial in snapshot(self.database, child.study_id).trials:
            kept.remove(trial.number, trial.token)

    def _taste(
        self, config: TrainConfig, data: "ImageDataset", winner: Candidate
    ) -> dict[str, Any]:
        """The validation value of a soup of as many models as the winner was re-checked with."""
        from trainer.averaging import soup
        from trainer.backbones import as_fed
        from trainer.evaluate import evaluate

        seeds = [fresh_seed(winner.trial, index + 1) for index in range(len(winner.values))]
        self.say(f"training {len(seeds)} models for a soup, on {len(data.train):,} images each")
        trained = self._trained(winner.trial, config, seeds, data, is_whole=False)
        fed = as_fed(config, data)
        mixed = soup([each.model for each in trained])
        plan, objective = trained[0].plan, self.spec.objective
        found = evaluate(mixed, data.val, plan, mean=fed.mean, std=fed.std).value(objective)
        values = [float(each.history[-1][f"val_{objective}"]) for each in trained]
        self.say(
            f"a soup of {len(values)} models: {found:.4f} on validation, "
            f"{statistics.fmean(values):.4f} in the mean of its models"
        )
        return {
            "value": found,
            "mean of its models": statistics.fmean(values),
            "values": values,
            "seeds": seeds,
        }

    def _trained(
        self,
        trial: TrialSnapshot,
        config: TrainConfig,
        seeds: Sequence[int],
        data: "ImageDataset",
        *,
        is_whole: bool,
    ) -> list["Trained"]:
        """A training for each seed, as long as the trial's was or would have been.

        What was trained before and has left its state is taken as it is.
        """
        from trainer.device import available_devices
        from trainer.trained import open_trained

        last = config.epochs * STEPS_PER_EPOCH
        stopped_early = trial.state == "COMPLETE" and trial.steps[-1] < last
        what = Retraining(whole=is_whole, end_step=trial.steps[-1] if stopped_early else last)
        configs = [dataclasses.replace(config, seed=seed) for seed in seeds]
        alone = len(configs) == 1 and len(data.train) > _MANY_IMAGES
        states = self._states(trial, configs, what, alone=alone)
        return [
            open_trained(state, each, data, device=available_devices()[0], end_step=what.end_step)
            for each, state in zip(configs, states, strict=True)
        ]

    def _states(
        self, trial: TrialSnapshot, configs: Sequence[TrainConfig], what: Retraining, *, alone: bool
    ) -> list[bytes]:
        """The last state of each training. alone: one at a time, by all cores of a CPU."""
        child = self._study()
        kept = KeptStates(child.checkpoint_key)
        plan = {**trial.attributes["plan"], "num_threads": num_cores() if alone else 1}
        points = {}
        for config in configs:
            key = self._key(child, kept, trial, config, what)
            points[key] = {
                "config": config.to_dict(),
                "plan": plan,
                RETRAINING: dataclasses.asdict(what),
                "of_trial": trial.number,
            }
        if not set(points) <= self._ended(child).keys():
            add_starting_points(self.database, child, points)
            self.run_workers(find_study(self.database, child.name), alone=alone)
        ended = self._ended(child)
        states = []
        for key in points:
            run = ended.get(key)
            if run is None:
                raise Interrupted("the retraining was stopped; the same command goes on with it")
            if run.state == "FAIL":
                raise StudyFailsError(
                    f"retraining trial {trial.number} failed: {run.attributes.get('reason')}; "
                    "the same command trains it again"
                )
            if run.state != "COMPLETE":
                raise NoTrialError(
                    f"trial {trial.number} can't be trained again with another seed: "
                    f"{run.attributes.get('reason')}"
                )
            state = kept.read(run.number, run.token)
            if state is None:
                raise NoTrialError(
                    f"what the retraining of trial {trial.number} has left can't be read: "
                    "the same command trains it again"
                )
            states.append(state)
        return states

    def _key(
        self,
        child: StudyRecord,
        kept: KeptStates,
        trial: TrialSnapshot,
        config: TrainConfig,
        what: Retraining,
    ) -> str:
        """Names the training; anew where an earlier one's state was used up, or it has failed."""
        ended, number = self._ended(child), 1
        described = json.dumps([config.to_dict(), dataclasses.asdict(what)], sort_keys=True)
        about = f"{trial.number}/{hashlib.sha256(described.encode()).hexdigest()[:16]}"
        while True:
            key = f"{about}/{number}"
            run = ended.get(key)
            if run is None:
                return key
            if run.state == "COMPLETE" and kept.read(run.number, run.token) is not None:
                return key
            number += 1

    def _ended(self, child: StudyRecord) -> dict[str, TrialSnapshot]:
        """The child's trials that have ended, by key."""
        return {
            str(run.attributes.get(KEY)): run
            for run in snapshot(self.database, child.study_id).trials
            if run.state in ("COMPLETE", "PRUNED", "FAIL")
        }

    def _study(self) -> StudyRecord:
        name = f"{self.record.name}:retrain-{self.record.study_id}"
        try:
            return find_study(self.database, name)
        except StudyNotFound:
            spec = dataclasses.replace(self.spec, pruner="none", folds=None)
            return create_study(
                self.database, name, spec=spec.to_json(), budget=1, parent_id=self.record.study_id
            )


def makes_a_soup(winner: Candidate) -> bool:
    """Whether several trainings of the winner have a start in common, so that a mean is a model."""
    config = TrainConfig.from_dict(winner.trial.attributes["config"])
    return bool(config.weights or config.pretrained) and len(winner.values) > 1


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
