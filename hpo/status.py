"""What is known of a study, in the form that `--json` prints."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from hpo.points import RECIPE
from hpo.rungs import STEPS_PER_EPOCH
from hpo.utilisation import mfu, seconds_spent
from storage.snapshots import StudySnapshot, TrialSnapshot
from trainer.conditions import idle_because


def best_trial(trials: Sequence[TrialSnapshot]) -> TrialSnapshot | None:
    """The first of the ranked trials, None if there is none."""
    return next(iter(ranked_trials(trials)), None)


def ranked_trials(trials: Sequence[TrialSnapshot]) -> list[TrialSnapshot]:
    """Those that got farthest first, of those the best by value, of those the earliest.

    A PRUNED trial may be among them, one with a broken constraint or without a report may not.
    """
    candidates = [
        trial
        for trial in trials
        if trial.state in ("COMPLETE", "PRUNED") and trial.is_feasible and trial.value is not None
    ]
    return sorted(candidates, key=_merit, reverse=True)


def _merit(trial: TrialSnapshot) -> tuple[bool, int, float, int]:
    # a trial that stopped early by its own patience is as far as one that did not
    rung = 0 if trial.state == "COMPLETE" else trial.steps[-1]
    assert trial.value is not None
    return trial.state == "COMPLETE", rung, trial.value, -trial.number


def num_epochs(study: StudySnapshot) -> float:
    """Epochs trained by all trials together."""
    return sum(trial.steps[-1] for trial in study.trials if trial.steps) / STEPS_PER_EPOCH


def tried(trial: TrialSnapshot) -> dict[str, Any]:
    """What the trial was proposed: the searched fields that count in it, or a recipe's own."""
    proposed = {**trial.attributes.get(RECIPE, {}), **trial.params}
    whole = {**trial.attributes.get("config", {}), **proposed}
    return {name: value for name, value in proposed.items() if not idle_because(name, whole)}


def describe(trial: TrialSnapshot) -> dict[str, Any]:
    """A trial as the best one of a study is shown."""
    return {"number": trial.number, "value": trial.value, "params": tried(trial)}


def status_json(name: str, study: StudySnapshot) -> dict[str, Any]:
    """As DESIGN's contract has it."""
    best = best_trial(study.trials)
    return {
        "study": name,
        "budget": study.budget,
        "complete": study.count("COMPLETE"),
        "pruned": study.count("PRUNED"),
        "failed": study.count("FAIL"),
        "running": study.count("RUNNING"),
        "waiting": study.count("WAITING"),
        "num_epochs": num_epochs(study),
        "seconds": study.seconds,
        "mfu": mfu(study),
        "spent": seconds_spent(study.trials),
        "best": None if best is None else describe(best),
        "workers": [
            {
                "id": worker.id,
                "host": worker.host,
                "pid": worker.pid,
                "device": worker.device,
                "state": worker.state,
                "trial": worker.trial,
                "epoch": None if worker.trial is None else (worker.step or 0) / STEPS_PER_EPOCH,
            }
            for worker in study.workers
        ],
        "sick": [dataclasses.asdict(worker) for worker in study.sick],
    }


def sick_lines(study: StudySnapshot) -> list[str]:
    """A line for each worker that has left for a reason of its own."""
    return [f"{worker.id} on {worker.device} has left: {worker.reason}" for worker in study.sick]


def trials_json(study: StudySnapshot) -> list[dict[str, Any]]:
    """As DESIGN's contract has it: values are the objective's at the steps."""
    return [
        {
            "number": trial.number,
            "state": trial.state,
            "value": trial.value,
            "params": tried(trial),
            "steps": list(trial.steps),
            "values": list(trial.values),
            "attempts": trial.attempts,
            "reason": trial.attributes.get("reason"),
            "seconds": trial.seconds,
        }
        for trial in study.trials
    ]


def launch_command(name: str) -> str:
    """What a user types to go on with a study."""
    return f"hpo launch --study {name}"


def how_to_go_on(study: StudySnapshot, command: str) -> str:
    """What is left, and the command that goes on."""
    left = study.budget - study.num_finished
    return f"{left} of {study.budget} trials are left; go on with: {command}"
