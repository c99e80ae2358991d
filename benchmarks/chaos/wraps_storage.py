"""The witness and the fault points of storage/ and of Optuna's suggestions."""

import os
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

from benchmarks.chaos.around import around, passes
from benchmarks.chaos.faults import here, point, witness


def wrap_leases(module: ModuleType) -> None:
    """Claims, their reaping, the release, and the binding."""

    def before_claim(*_: Any, **__: Any) -> None:
        here.forget_trial()
        point("before claim")

    def after_claim(claimed: Any, *_: Any, **__: Any) -> None:
        if isinstance(claimed, module.Lease):
            here.trial_id, here.token = claimed.trial_id, claimed.token
            here.attempts = claimed.attempts
            witness("claim", attempts=claimed.attempts)
            point("after claim")

    def before_statement(_fence: Any, place: str, _connection: Any) -> None:
        if place == "last":
            point("after ask")  # the trial's row is written, and not yet bound or committed

    def after_release(*_: Any, **__: Any) -> None:
        witness("released")
        point("after release")

    around(module, "claim", before=before_claim, after=after_claim)
    around(module, "release", before=passes("before release"), after=after_release)
    around(module, "_reap", before=passes("before reap"), after=passes("in reap"))
    around(module, "_fail", before=passes("before fail"), after=passes("in fail"))
    around(module.Fence, "_run", before=before_statement)


def wrap_studies(module: ModuleType) -> None:
    """All that a worker does with its trial, and what a launcher does with the study."""

    def after_bind(trial_id: int, study: Any, lease: Any) -> None:
        here.study, here.trial_id, here.token = study.record.name, trial_id, lease.token
        witness("bound")
        point("after bind")

    def after_trial(trial: Any, *_: Any) -> None:
        here.number = trial.number

    def after_report(_: None, _study: Any, lease: Any, step: int, value: float, **__: Any) -> None:
        witness("reported", token=lease.token, trial_id=here.trial_id, step=step, value=value)
        point("after report")

    def after_end(_: None, _study: Any, lease: Any, state: Any, **__: Any) -> None:
        witness("ended", token=lease.token, trial_id=here.trial_id, state=state.name)
        point("after tell")

    study = module.OpenStudy
    around(study, "bind", after=after_bind)
    around(study, "trial", after=after_trial)
    around(study, "report", before=passes("before report"), after=after_report)
    around(study, "end", before=passes("before tell"), after=after_end)
    before, after = passes("before create"), passes("after create")
    around(module, "create_study", before=before, after=after)
    around(module, "relaunch", after=passes("after relaunch"))


def wrap_schema(module: ModuleType) -> None:
    """The tables."""
    before, after = passes("before tables"), passes("after tables")
    around(module, "ensure_tables", before=before, after=after)


def wrap_checkpoints(module: ModuleType) -> None:
    """Saving and taking over."""
    own = module.TrialCheckpoints
    around(own, "save", before=_before_save, after=_after_save)
    around(own, "take_over", before=_before_take_over, after=_after_take_over)
    around(module, "write_file", after=_after_write)
    around(module, "read_file", after=_after_read)
    around(shutil, "rmtree", before=_before_rmtree)
    around(os, "fsync", before=_before_fsync)


def _before_save(*_: Any, **__: Any) -> None:
    point("before checkpoint")
    here.saving = True


def _after_save(_: None, checkpoints: Any, step: int, _payload: bytes) -> None:
    here.saving = False
    witness("saved", step=step)
    point("after checkpoint", torn_file=Path(checkpoints._own) / f"{step}.ckpt")


def _before_fsync(_: int) -> None:
    if here.saving:
        point("in checkpoint")  # written, and not yet under its name


def _before_take_over(*_: Any, **__: Any) -> None:
    point("before folder")
    here.taking_over = here.attempts > 1
    if here.taking_over:
        point("before take-over")


def _after_take_over(*_: Any, **__: Any) -> None:
    if here.taking_over:
        point("after take-over")
    here.taking_over = False


def _after_write(*_: Any, **__: Any) -> None:
    if here.taking_over:
        point("in take-over")


def _before_rmtree(path: Any, *_: Any, **__: Any) -> None:
    if here.taking_over and Path(path).name.isdigit():
        point("before removal")


def _after_read(payload: bytes | None, path: Path) -> None:
    if path.parent.name.isdigit():  # a checkpoint, and not what a retraining has left
        witness("read", file_token=int(path.parent.name), valid=payload is not None)


def wrap_suggest(module: ModuleType) -> None:
    """Each parameter."""

    def after_suggest(value: Any, _trial: Any, name: str, *_: Any, **__: Any) -> None:
        witness("param", name=name, value=value)
        point(f"after suggest {name}")

    for kind in ("float", "int", "categorical"):
        around(module.Trial, f"suggest_{kind}", after=after_suggest)
