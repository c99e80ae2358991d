"""Replay: a trial's first epochs again, to see whether they give the same values."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from hpo.errors import NoTrialError, UsageError
from hpo.rungs import STEPS_PER_EPOCH
from hpo.spec import StudySpec
from storage.database import Database
from storage.snapshots import TrialSnapshot, snapshot
from storage.studies import StudyRecord
from trainer.config import TrainingFailure

_NEAR = 0.01
"""Value by which a GPU, whose sums come in any order, may differ."""


@dataclass(frozen=True, kw_only=True)
class Replay:
    """Values of the study's objective at the same steps, then and now."""

    study: str
    trial: int
    device: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    replayed: tuple[float, ...]

    @property
    def is_same(self) -> bool:
        """On a CPU bit for bit, elsewhere within a hundredth."""
        allowed = 0.0 if self.device == "cpu" else _NEAR
        pairs = zip(self.values, self.replayed, strict=True)
        return all(abs(then - now) <= allowed for then, now in pairs)

    def to_json(self) -> dict[str, Any]:
        """As `hpo replay --json` prints it."""
        return {
            "study": self.study,
            "trial": self.trial,
            "device": self.device,
            "steps": list(self.steps),
            "values": list(self.values),
            "replayed": list(self.replayed),
            "same": self.is_same,
        }

    def lines(self) -> list[str]:
        """For people."""
        lines = [
            f"epoch {step / STEPS_PER_EPOCH:g}: {then:.6f} then, {now:.6f} now"
            for step, then, now in zip(self.steps, self.values, self.replayed, strict=True)
        ]
        how = "bit for bit" if self.device == "cpu" else f"within {_NEAR:g}"
        verdict = f"the same, {how}" if self.is_same else f"not the same ({how} was expected)"
        return [*lines, f"trial {self.trial} of {self.study}: {verdict}"]


def replay_trial(
    database: Database,
    record: StudyRecord,
    number: int,
    *,
    epochs: float,
    say: Callable[[str], None],
) -> Replay:
    """Train the first epochs of a trial again, with its config, data, seed and plan.

    epochs: as far as the trial got, at most. say: is told, in a line, how it goes. Raises
    UsageError if there is no such trial, its data has changed, or this machine has no device of
    its kind; NoTrialError if it has no report to compare with.
    """
    from hpo.folding import folds_of
    from trainer.device import DevicePlan
    from trainer.folds import train_folds
    from trainer.loop import train

    trial = _the_trial(database, record, number)
    steps = [step for step in trial.steps if step <= epochs * STEPS_PER_EPOCH] or trial.steps[:1]
    if not steps:
        raise NoTrialError(f"trial {number} of {record.name} has no report to compare with")
    spec = StudySpec.from_json(record.spec)
    config = spec.trial_config(trial.attributes["config"])
    recorded = DevicePlan.from_dict(trial.attributes["plan"])
    plan = recorded.on(_same_kind_of_device(trial))
    if plan.precision != recorded.precision:
        raise UsageError(
            f"trial {number} ran in {recorded.precision}, in which this machine's processor does "
            f"not compute itself: {plan.precision} gives other values"
        )
    data = spec.load_data()
    replayed = []
    folds = folds_of(spec, data, plan.device)
    training = train_folds(config, folds, plan) if folds else train(config, data, plan)
    with contextlib.closing(training) as reports:
        try:
            for report in reports:
                say(f"epoch {report.epoch:g} of {steps[-1] / STEPS_PER_EPOCH:g}")
                replayed.append(report.value(spec.objective))
                if report.step >= steps[-1]:
                    break
        except TrainingFailure as failure:
            raise NoTrialError(f"trial {number} can't be trained again: {failure}") from failure
    return Replay(
        study=record.name,
        trial=number,
        device=plan.device.partition(":")[0],
        steps=tuple(steps),
        values=trial.values[: len(steps)],
        replayed=tuple(replayed),
    )


def _the_trial(database: Database, record: StudyRecord, number: int) -> TrialSnapshot:
    trials = snapshot(database, record.study_id).trials
    for trial in trials:
        if trial.number == number:
            return trial
    known = f"0 to {len(trials) - 1}" if trials else "none yet"
    raise UsageError(f"{record.name} has no trial {number}: there is {known}")


def _same_kind_of_device(trial: TrialSnapshot) -> str:
    from trainer.device import available_devices

    kind = str(trial.attributes["plan"]["device"]).partition(":")[0]
    for device in (*available_devices(), "cpu"):
        if device.partition(":")[0] == kind:
            return device
    raise UsageError(
        f"trial {trial.number} ran on {kind}, which this machine doesn't have: other hardware "
        "gives other sums"
    )
