"""A worker as users of Optuna alone write it: python peer_worker.py STUDY BUDGET EPOCHS SECONDS

The training waits as long for each epoch as the one that hpo runs beside it, and is said to the
same witness. It needs no torch, so a new worker is there sooner than a real one would be.
"""

import math
import sys
import time
import warnings

import optuna
from optuna.storages import RetryFailedTrialCallback
from optuna.study import MaxTrialsCallback

from benchmarks.chaos.faults import here, witness
from benchmarks.chaos.stage import LEASE_SECONDS


def objective(trial: optuna.Trial, epochs: int, epoch_seconds: float) -> float:
    """A report after each epoch."""
    here.trial_id, here.number = trial._trial_id, trial.number
    lr = trial.suggest_float("lr", 1e-4, 1e-1, log=True)
    trial.suggest_categorical("batch_size", [32, 64, 128])
    value = 0.0
    for epoch in range(1, epochs + 1):
        witness("begin")
        time.sleep(epoch_seconds)
        value = 0.9 - abs(math.log10(lr) + 2.5) / 10 - 0.2 / epoch
        witness("leg", step=4 * epoch, value=value)
        trial.report(value, 4 * epoch)
        if trial.should_prune():
            raise optuna.TrialPruned
    return value


def main(name: str, budget: int, epochs: int, epoch_seconds: float) -> None:
    """Until the study has so many finished trials; libpq's variables say where it is."""
    warnings.simplefilter("ignore")  # the heartbeat and its callback call themselves experimental
    storage = optuna.storages.RDBStorage(
        "postgresql+psycopg2://",
        engine_kwargs={"pool_pre_ping": True},
        heartbeat_interval=1,
        grace_period=int(LEASE_SECONDS),
        failed_trial_callback=RetryFailedTrialCallback(),
    )
    study = optuna.load_study(study_name=name, storage=storage, pruner=optuna.pruners.NopPruner())
    ended = (optuna.trial.TrialState.COMPLETE, optuna.trial.TrialState.PRUNED)
    most = MaxTrialsCallback(budget, states=ended)
    if len(study.get_trials(states=ended)) < budget:
        study.optimize(lambda trial: objective(trial, epochs, epoch_seconds), callbacks=[most])


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]))
