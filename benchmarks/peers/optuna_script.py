"""Optuna with the usual script: one process, threads (n_jobs), or a process on each core.

    python -m benchmarks.peers.optuna_script TASK.json

One thread of torch each where more than one trial runs at once (two cores: EVIDENCE on threads);
a process alone has all cores, as torch's default is.
"""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import optuna
import torch
from optuna.storages.journal import JournalFileBackend

from benchmarks.peers.training import objective_of


def study_of(task: dict[str, Any]) -> optuna.Study:
    """Made by whoever comes first."""
    pruner = optuna.pruners.MedianPruner() if task["prunes"] else optuna.pruners.NopPruner()
    storage = None
    if task["num_processes"] > 1:
        backend = JournalFileBackend(task["journal"])
        storage = optuna.storages.JournalStorage(backend)
    return optuna.create_study(
        study_name="peer",
        direction="maximize",
        storage=storage,
        sampler=optuna.samplers.TPESampler(seed=task["seed"]),
        pruner=pruner,
        load_if_exists=True,
    )


def main() -> None:
    """Run the task, or one process's share of it."""
    task = json.loads(Path(sys.argv[1]).read_text())
    share = len(sys.argv) > 2
    if share or task["num_threads"] > 1:
        torch.set_num_threads(1)
    study = study_of(task)
    if not share:
        for point in task["points"]:
            study.enqueue_trial(point)
    if task["num_processes"] > 1 and not share:
        command = [sys.executable, "-m", "benchmarks.peers.optuna_script", sys.argv[1], "share"]
        running = [subprocess.Popen(command) for _ in range(task["num_processes"])]
        raise SystemExit(max(process.wait() for process in running))
    num_trials = task["num_trials"] // task["num_processes"]
    study.optimize(objective_of(task), n_trials=num_trials, n_jobs=task["num_threads"])


if __name__ == "__main__":
    main()
