"""One trial: what it trains, what it reports, and where it ends."""

import contextlib
import functools
import json
import logging
import os
import socket
import time
from collections.abc import Callable, Generator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import optuna
from optuna.trial import TrialState

from hpo.errors import described
from hpo.folding import bytes_beside_a_model, folds_of, work_of_an_epoch
from hpo.measured import machine, measured_once
from hpo.points import RECIPE, suggest_config
from hpo.pruners import PRUNERS, Moment
from hpo.samplers import SAMPLERS, Draw
from hpo.spec import StudySpec
from hpo.spent import Spent
from hpo.utilisation import Work, peak_of
from storage.checkpoints import Checkpoints
from storage.leases import Lease
from storage.studies import OpenStudy
from trainer.config import Argument, ConfigError, TrainConfig, TrainingFailure
from trainer.data.dataset import ImageDataset
from trainer.device import DevicePlan, choose_plan
from trainer.flops import training_flops
from trainer.folds import FoldsReport, FoldsState, train_folds
from trainer.footprint import Footprint, measure_footprint
from trainer.loop import train
from trainer.reports import ProgressReport
from trainer.state import CheckpointError, TrainState, read_progress

logger = logging.getLogger(__name__)
CHECKPOINT_SECONDS = 15.0
"""Of training, at most, that a killed worker loses; each report is saved as well."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a trial ended. value: its last value of the study's objective, None if it has none."""

    state: TrialState
    value: float | None
    reason: str
    constraints: Mapping[str, float] = field(default_factory=dict)
    """By name; > 0 is broken, and such a trial is never the best."""


@dataclass(frozen=True, kw_only=True)
class Retraining:
    """What makes a trial the retraining of another: its model is kept when it ends."""

    whole: bool
    """Whether it trains on train and validation together, and so has no validation values."""
    end_step: int
    """Where it ends: as far as the trial that is trained again has got."""

    @classmethod
    def of(cls, attributes: Mapping[str, Any]) -> "Retraining | None":
        """What stands among a trial's user attributes; None for any other trial."""
        found = attributes.get(RETRAINING)
        return None if found is None else cls(**found)


RETRAINING = "retraining"
"""The user attribute that holds it."""


class TrialRun:
    """One attempt at one trial, from its lease to its end."""

    def __init__(
        self,
        study: OpenStudy,
        spec: StudySpec,
        lease: Lease,
        data: ImageDataset,
        *,
        device: str,
        pulse: Callable[[], None],
        is_leaving: Callable[[], bool] = lambda: False,
        spent: Spent | None = None,
    ) -> None:
        """pulse: is called before each batch, and what it raises ends the attempt. is_leaving:
        whether it will raise, so that what has been trained is saved first. spent: where the
        attempt's seconds are counted.
        """
        self._spent = Spent(worker_id="") if spent is None else spent
        self._spent.begin()
        self._study, self._spec, self._lease, self._data = study, spec, lease, data
        self._device, self._pulse, self._is_leaving = device, pulse, is_leaving
        self._saved_at = time.monotonic()
        self._final: bytes | None = None
        """The last state of a retraining, whose model is wanted."""
        with self._spent.on("database"):
            self._trial_id = study.bind(lease)
            trial = study.trial(self._trial_id)
        self.number = trial.number
        self._attributes: Mapping[str, Any] = trial.user_attrs
        self._retraining = Retraining.of(self._attributes)
        if self._has_no_validation:
            self._data = data.with_validation_in_training()
        self._checkpoints: Checkpoints | None = study.checkpoints(
            lease, self._trial_id, trial_number=trial.number
        )

    def run(self) -> Outcome:
        """Train until the trial's end and tell it.

        Raises LeaseLost, what `pulse` raises, and any error that is no result of the training.
        """
        try:
            with self._spent.on("setup"):
                config = self._suggest()
            outcome = self._go_on(config)
        except TrainingFailure as failure:
            outcome = Outcome(
                state=TrialState.PRUNED,
                value=None,
                reason=str(failure),
                constraints={"trainable": 1.0},
            )
        self._tell(outcome)
        return outcome

    def fail(self, error: Exception) -> Outcome:
        """End the trial after an error that is none of its results. Raises LeaseLost."""
        reason = str(error) if isinstance(error, ConfigError) else described(error)
        outcome = Outcome(state=TrialState.FAIL, value=None, reason=reason)
        self._tell(outcome)
        return outcome

    def _suggest(self) -> TrainConfig:
        """The trial's config: what it was made with, or an earlier attempt was given, is kept."""
        if "config" in self._attributes:
            return self._spec.trial_config(self._attributes["config"])
        # seeded by the trial, so that a resumed trial is proposed what it would have been
        seed = trial_seed(self._spec.seed, self.number)
        draw = Draw(
            space=self._spec.space,
            study_seed=self._spec.seed,
            seed=seed,
            number=self.number,
            take_point=lambda num_points: self._study.take_point(self._lease, num_points),
        )
        self._study.study.sampler = SAMPLERS[self._spec.sampler](draw)

        def suggest() -> TrainConfig:
            trial = optuna.Trial(self._study.study, self._trial_id)
            recipe = self._attributes.get(RECIPE)
            return suggest_config(self._spec.space, trial, seed=seed, recipe=recipe)

        return self._study.write(self._lease, suggest)

    def _go_on(self, config: TrainConfig) -> Outcome:
        """From the newest checkpoint; anew if that turns out to be none of this trial's."""
        with self._spent.on("checkpoints"):
            resume = self._take_over()
        try:
            return self._train(config, resume)
        except CheckpointError as error:
            logger.warning("trial %d begins anew: %s", self.number, error)
        return self._train(config, None)

    def _train(self, config: TrainConfig, resume: bytes | None) -> Outcome:
        progress = None if resume is None else read_progress(resume)
        history = [] if progress is None else progress.history
        for past in history:
            self._report(past)  # one of them may be missing: checkpoints are written first
        decided = progress is not None and progress.is_underway  # it was told to go on
        outcome = self._outcome(history[-1]) if history and not decided else None
        if outcome is not None:
            self._final = resume
        elif not history:
            outcome = self._too_large(config)
        if outcome is not None:
            return outcome
        with self._spent.on("setup"):
            plan = self._plan(config)
        with contextlib.closing(self._reports(config, plan, resume)) as reports:
            seconds = 0.0 if progress is None else progress.seconds
            for report in self._spent.reports(reports, history, seconds_before=seconds):
                if report.finished and self._retraining is not None:
                    self._final = report.state.to_bytes()
                with self._spent.on("checkpoints"):
                    self._save(report.step, report.state)
                with self._spent.on("database"):
                    self._report(report.to_dict())
                    outcome = self._outcome(report.to_dict())
                if outcome is not None:
                    return outcome
        raise AssertionError("a training's last report says that it is the last")

    def _reports(
        self, config: TrainConfig, plan: DevicePlan, resume: bytes | None
    ) -> Generator[ProgressReport | FoldsReport, None, None]:
        """The training: of one model, or of one for each of the study's folds."""
        averages, objective = self._attributes.get("try_averages", ()), self._spec.objective
        end_step = None if self._retraining is None else self._retraining.end_step
        folds = folds_of(self._spec, self._data, plan.device)
        if not folds:
            return train(
                config,
                self._data,
                plan,
                resume=resume,
                pulse=self._pulse,
                keep=self._keep,
                end_step=end_step,
                try_averages=averages,
                objective=objective,
            )
        return train_folds(
            config,
            folds,
            plan,
            resume=resume,
            pulse=self._pulse,
            keep=self._keep,
            try_averages=averages,
            objective=objective,
        )

    def _keep(self, state: TrainState | FoldsState) -> None:
        """Between two optimizer steps: save the training now and then, and before it is left."""
        is_due = time.monotonic() - self._saved_at >= CHECKPOINT_SECONDS
        if self._checkpoints is None or not (is_due or self._is_leaving()):
            return
        step = int(state.history[-1]["step"]) if state.history else 0
        with self._spent.on("checkpoints"):
            self._save(step, state)
        with self._spent.on("database"):
            self._study.advance(self._lease, state.position)

    def _too_large(self, config: TrainConfig) -> Outcome | None:
        """The end of a trial whose model breaks a limit, before an epoch is spent on it."""
        limits = self._spec.limits
        if not limits.given():
            return None
        footprint = _footprint(
            config.backbone,
            tuple(sorted(config.module.items())),
            self._data.input_size,
            self._data.num_classes,
            self._device,
            limits.max_latency_ms is not None,
        )
        complaint = limits.complaint(footprint)
        if complaint is None:
            return None
        return Outcome(
            state=TrialState.PRUNED,
            value=None,
            reason=f"{config.backbone} has {complaint}",
            constraints=limits.excess(footprint),
        )

    def _plan(self, config: TrainConfig) -> DevicePlan:
        """How the device is used: chosen by the first attempt, kept by later ones."""
        if "plan" in self._attributes:
            chosen = DevicePlan.from_dict(self._attributes["plan"])
            plan = chosen.on(self._device)
            if plan.precision != chosen.precision:
                logger.warning(
                    "trial %d goes on in %s: this processor does not compute in %s itself",
                    self.number,
                    plan.precision,
                    chosen.precision,
                )
            return plan
        plan = choose_plan(
            config,
            input_size=self._data.input_size,
            num_classes=self._data.num_classes,
            device=self._device,
            data_bytes=bytes_beside_a_model(self._spec, config, self._data, self._device),
            graphs=os.environ.get("HPO_CUDA_GRAPHS") == "1",
            precision=self._spec.given_precision,
            remember=self._remember,
        )
        work = asdict(self._work(config))

        def note() -> None:
            trial = optuna.Trial(self._study.study, self._trial_id)
            trial.set_user_attr("config", config.to_dict())
            trial.set_user_attr("plan", plan.to_dict())
            trial.set_user_attr("work", work)

        self._study.write(self._lease, note)
        return plan

    def _remember(self, what: str, measure: Callable[[], Mapping[str, Any]]) -> Mapping[str, Any]:
        """What was measured for this study on such a machine, else of this machine at all.

        A study's trials are comparable, and repeatable, only where all of them are computed alike.
        """
        key = json.dumps({"what": what, **machine()}, sort_keys=True)
        found: Mapping[str, Any] = self._study.remembered(key, measured_once(what, measure))
        return found

    def _work(self, config: TrainConfig) -> Work:
        """What an epoch of this trial is to its device."""
        data, spec = self._data, self._spec
        epoch = work_of_an_epoch(data, folds=spec.folds, seed=spec.seed)
        flops = training_flops(config, input_size=data.input_size, num_classes=data.num_classes)
        return Work(
            flops_per_epoch=float(flops * epoch.num_trained),
            host=socket.gethostname(),
            device=self._device,
            peak_flops=peak_of(self._device),
        )

    def _report(self, report: Mapping[str, Any]) -> None:
        if report["averages"] and not self._has_no_validation:

            def note() -> None:
                trial = optuna.Trial(self._study.study, self._trial_id)
                trial.set_user_attr("averages", dict(report["averages"]))

            self._study.write(self._lease, note)
        self._study.report(
            self._lease,
            int(report["step"]),
            self._value(report),
            images_per_second=float(report["images_per_second"]),
        )

    @property
    def _has_no_validation(self) -> bool:
        return self._retraining is not None and self._retraining.whole

    def _value(self, report: Mapping[str, Any]) -> float:
        """What Optuna is told of a report; without validation images, minus the training loss."""
        if self._has_no_validation:
            return -float(report["train_loss"])
        return float(report[f"val_{self._spec.objective}"])

    def _outcome(self, report: Mapping[str, Any]) -> Outcome | None:
        """How the trial ends if it ends with this report, its newest one."""
        step, value = int(report["step"]), self._value(report)
        if report["finished"]:
            reason = report["reason"] or f"trained for {self._spec.epochs} epochs"
            return Outcome(state=TrialState.COMPLETE, value=value, reason=reason)
        moment = Moment(
            study=self._study,
            spec=self._spec,
            trial_id=self._trial_id,
            number=self.number,
            step=step,
            value=value,
        )
        verdict = PRUNERS[self._spec.pruner](moment)
        if verdict is None or verdict.goes_on:
            return None
        return Outcome(state=TrialState.PRUNED, value=value, reason=verdict.reason)

    def _tell(self, outcome: Outcome) -> None:
        if outcome.constraints:

            def constrain() -> None:
                for name, value in outcome.constraints.items():
                    # again after a lost connection: Optuna would warn of one that is there
                    trial = optuna.Trial(self._study.study, self._trial_id)
                    if name not in trial.storage.get_trial(self._trial_id).constraints:
                        trial.set_constraint(name, value)

            self._study.write(self._lease, constrain)
        if self._retraining is not None and outcome.state == TrialState.COMPLETE:
            assert self._final is not None
            self._study.kept_states.write(self.number, self._lease.token, self._final)
        self._study.end(
            self._lease,
            outcome.state,
            value=outcome.value,
            reason=outcome.reason,
            attributes={"spent": self._spent.to_json()},
        )
        if self._checkpoints is None:
            return
        try:
            self._checkpoints.remove()
        except OSError as error:
            self._do_without_checkpoints(error)

    def _take_over(self) -> bytes | None:
        """The newest checkpoint that was written whole, None to begin anew."""
        if self._checkpoints is None:
            return None
        try:
            return self._checkpoints.take_over()
        except OSError as error:
            if self._lease.attempts > 1:
                logger.warning("trial %d begins anew: no checkpoint can be reached", self.number)
            self._do_without_checkpoints(error)
        return None

    def _save(self, step: int, state: TrainState | FoldsState) -> None:
        """Under the step of its newest report: what was saved there is replaced in one step."""
        if self._checkpoints is None:
            return
        try:
            self._checkpoints.save(step, state.to_bytes())
        except OSError as error:
            self._do_without_checkpoints(error)
        self._saved_at = time.monotonic()

    def _do_without_checkpoints(self, error: OSError) -> None:
        self._checkpoints = None
        _say_without_checkpoints(error.strerror or str(error))


@functools.cache
def _say_without_checkpoints(reason: str) -> None:
    """Once in a worker's life: a full disk concerns all of its trials."""
    logger.warning(
        "training goes on without checkpoints (%s): if this worker dies, its trial begins anew",
        reason,
    )


@functools.cache
def _footprint(
    backbone: str,
    arguments: tuple[tuple[str, Argument], ...],
    input_size: tuple[int, int, int],
    num_classes: int,
    device: str,
    times_latency: bool,
) -> Footprint:
    """Measured once in a worker's life, so that a backbone is judged alike in all its trials."""
    return measure_footprint(
        TrainConfig(backbone=backbone, module=dict(arguments)),
        input_size=input_size,
        num_classes=num_classes,
        device=device,
        times_latency=times_latency,
    )


def trial_seed(study_seed: int, number: int) -> int:
    """A seed of its own for each trial of each study."""
    return (study_seed * 1_000_003 + number) % 2**31
