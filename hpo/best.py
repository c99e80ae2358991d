"""Choose the best trial; retrain it, test it once, export it."""

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.errors import NoTrialError, UsageError
from hpo.executors.local import num_cores
from hpo.progress import params_text
from hpo.rungs import STEPS_PER_EPOCH
from hpo.spec import StudySpec
from hpo.status import best_trial, describe
from storage.database import Database
from storage.snapshots import TrialSnapshot, snapshot
from storage.studies import StudyRecord, count_test_opening
from trainer.config import TrainConfig, TrainingFailure

if TYPE_CHECKING:
    from trainer.data.dataset import ImageDataset
    from trainer.loop import ProgressReport

_SEED_STRIDE = 7_919


@dataclass(frozen=True, kw_only=True)
class BestReport:
    """What `hpo best` prints; test and export are None unless it exported."""

    study: str
    trial: TrialSnapshot
    test: Mapping[str, Any] | None = None
    export: Mapping[str, Any] | None = None
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """As DESIGN's contract has it."""
        candidate: dict[str, Any] = {
            "number": self.trial.number,
            "search_value": self.trial.value,
            "mean": None,
            "std": None,
            "values": [],
        }
        return {
            "study": self.study,
            "trial": describe(self.trial),
            "candidates": [candidate],
            "test": self.test,
            "export": self.export,
        }

    def text(self) -> str:
        """For people."""
        assert self.trial.value is not None
        lines = [
            f"{self.study}: best is trial {self.trial.number}, validation accuracy "
            f"{self.trial.value:.4f} in the search ({params_text(self.trial)})"
        ]
        if self.test is not None and self.export is not None:
            low, high = self.test["ci95"]
            lines.append(
                f"test accuracy {self.test['accuracy']:.4f} (95 % interval {low:.4f} to "
                f"{high:.4f}), macro F1 {self.test['macro_f1']:.4f}"
            )
            lines += [
                f"  {self.export['dir']}/{entry['file']}: {entry['bytes']:,} bytes, accuracy "
                f"{entry['accuracy']:.4f}, logits within {entry['max_abs_diff']:.1e}"
                for entry in self.export["formats"].values()
            ]
            lines += [f"  no {name}: {why}" for name, why in self.export["refused"].items()]
        return "\n".join([*lines, *self.notes])


def known_best(database: Database, record: StudyRecord) -> BestReport:
    """The best trial so far; trains nothing. Raises NoTrialError."""
    study = snapshot(database, record.study_id)
    trial = best_trial(study.trials)
    if trial is None:
        raise NoTrialError(
            f"study {record.name} has no trial to choose from: {study.num_finished} of "
            f"{study.budget} have ended; go on with: hpo launch --study {record.name}"
        )
    notes = []
    if study.num_finished < study.budget:
        notes.append(f"best so far: {study.num_finished} of {study.budget} trials have ended")
    return BestReport(study=record.name, trial=trial, notes=notes)


def export_best(
    database: Database, record: StudyRecord, *, out: Path, say: Callable[[str], None]
) -> BestReport:
    """Retrain the best trial on train and validation, open the test split, export.

    say: is told, in a line, how it goes.

    The test split is opened after the last decision, and that is counted in the database. Raises
    NoTrialError; UsageError if `out` can't be written; DataError if the data has changed.
    """
    from trainer.data.registry import load
    from trainer.export.folder import export_model
    from trainer.export.publish import check_out

    check_out(out)
    known = known_best(database, record)
    spec = StudySpec.from_json(record.spec)
    data = load(spec.data, seed=spec.seed, options=spec.data_options)
    if data.fingerprint != spec.fingerprint:
        raise UsageError(f"{spec.data} has changed since the study was made")
    found = known.trial.attributes["config"]
    config = TrainConfig.from_dict({**found, "seed": found["seed"] + _SEED_STRIDE})
    whole = data.with_validation_in_training()
    last = _retrain(config, whole, known.trial, say)
    num_openings = count_test_opening(database, record.study_id)
    if num_openings > 1:
        known.notes.append(
            f"the test split of this study has been opened {num_openings} times: choosing by its "
            "result makes it too good"
        )
    say("opening the test split, exporting")
    manifest = export_model(
        last.state.model,
        config=config,
        data=whole,
        test=data.open_test(),
        out=out,
        about={
            "study": record.name,
            "trial": describe(known.trial),
            "seeds": {"study": spec.seed, "retraining": config.seed},
            "plan": last.state.plan.to_dict(),
            "test_openings": num_openings,
        },
        metrics={
            "search": {"val_accuracy": known.trial.value},
            "retraining": {"epochs": last.epoch, "train_loss": last.train_loss},
        },
    )
    export = {"dir": str(out), "formats": manifest["formats"], "refused": manifest["refused"]}
    test = {
        name: manifest["metrics"]["test"][name]
        for name in ("accuracy", "ci95", "macro_recall", "macro_f1")
    }
    return BestReport(
        study=known.study, trial=known.trial, test=test, export=export, notes=known.notes
    )


def _retrain(
    config: TrainConfig, data: "ImageDataset", trial: TrialSnapshot, say: Callable[[str], None]
) -> "ProgressReport":
    """The last report of a training as long as the trial's was, or as it would have been.

    All cores train one model now, unlike in the search, if the data is large enough to gain by it.
    Raises NoTrialError if it can't be trained
    again.
    """
    from trainer.device import DevicePlan, available_devices
    from trainer.loop import train

    device = available_devices()[0]
    plan = DevicePlan.from_dict(
        {
            **trial.attributes["plan"],
            "device": device,
            "num_threads": num_cores() if device == "cpu" and len(data.train) > 10_000 else 1,
        }
    )
    stopped_early = trial.state == "COMPLETE" and trial.steps[-1] < config.epochs * STEPS_PER_EPOCH
    end_step = trial.steps[-1] if stopped_early else config.epochs * STEPS_PER_EPOCH
    with contextlib.closing(train(config, data, plan)) as reports:
        try:
            for report in reports:
                say(
                    f"retraining on {len(data.train):,} images: epoch {report.epoch:g} of "
                    f"{end_step / STEPS_PER_EPOCH:g}, loss {report.train_loss:.4f}, "
                    f"{report.images_per_second:,.0f} images/s"
                )
                if report.step >= end_step:
                    break
        except TrainingFailure as failure:
            raise NoTrialError(
                f"trial {trial.number} can't be trained again with another seed: {failure}"
            ) from failure
    return report
