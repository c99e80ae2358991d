"""How much of its hardware a study uses: the MFU, and where its workers' seconds go."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hpo.executors.local import cores_of_all_workers
from hpo.measured import measured_once
from hpo.rungs import STEPS_PER_EPOCH
from storage.snapshots import StudySnapshot, TrialSnapshot


@dataclass(frozen=True, kw_only=True)
class Work:
    """What an epoch of a trial is, and what the device that it runs on can do."""

    flops_per_epoch: float
    """Of all images that are trained on, the backward pass with it."""
    host: str
    device: str
    peak_flops: float
    """A second: of the whole device; on a CPU, of all cores that the launcher may use."""


def peak_of(device: str) -> float:
    """Measured once a machine. Imports torch."""
    from trainer.flops import peak_flops

    one: float = measured_once(f"peak of {device}", lambda: peak_flops(device), float)
    return one * cores_of_all_workers() if device == "cpu" else one


def mfu(study: StudySnapshot) -> float | None:
    """Operations of all steps that were trained, by what the devices could have done meanwhile.

    None before the first report, and where operations can't be counted. Evaluation, and what was
    trained again after a kill, count as idle; so does the time between two launches.
    """
    done, peaks = 0.0, dict[tuple[str, str], float]()
    for trial in study.trials:
        work = trial.attributes.get("work")
        if work is not None and trial.steps:
            done += work["flops_per_epoch"] * trial.steps[-1] / STEPS_PER_EPOCH
            device = work["host"], work["device"]
            peaks[device] = max(work["peak_flops"], peaks.get(device, 0.0))
    possible = study.seconds * sum(peaks.values())
    return done / possible if done and possible else None


def seconds_spent(trials: Sequence[TrialSnapshot]) -> list[dict[str, Any]]:
    """A row for each worker that has ended trials: their number, and its seconds by part."""
    rows: dict[str, dict[str, Any]] = {}
    for trial in trials:
        spent = dict(trial.attributes.get("spent", {}))
        if spent:
            worker = spent.pop("worker")
            row = rows.setdefault(worker, {"worker": worker, "num_trials": 0})
            row["num_trials"] += 1
            for part, seconds in spent.items():
                row[part] = round(row.get(part, 0.0) + seconds, 4)
    return [rows[worker] for worker in sorted(rows)]
