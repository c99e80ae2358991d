"""Choose the best trial; re-check it, retrain it, test it once, export it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpo.candidates import Candidate, choose, pays_for_soup, plan_recheck
from hpo.errors import NoTrialError
from hpo.progress import params_text
from hpo.recheck import RunWorkers, known_candidates, recheck, runs_of
from hpo.retrain import Retrainer, Say, makes_a_soup
from hpo.rungs import STEPS_PER_EPOCH
from hpo.spec import StudySpec
from hpo.status import best_trial, describe, launch_command, num_epochs
from storage.database import Database
from storage.snapshots import StudySnapshot, snapshot
from storage.studies import StudyRecord, count_test_opening
from trainer.config import Objective


@dataclass(frozen=True, kw_only=True)
class BestOptions:
    """What `hpo best` was told."""

    out: Path
    top_k: int = 3
    num_seeds: int = 3
    formats: tuple[str, ...] | None = None
    """Of the export; None is all that any machine can write."""


@dataclass(frozen=True, kw_only=True)
class BestReport:
    """What `hpo best` prints; test and export are None unless it exported."""

    study: str
    winner: Candidate
    candidates: Sequence[Candidate]
    test: Mapping[str, Any] | None = None
    export: Mapping[str, Any] | None = None
    notes: Sequence[str] = field(default_factory=tuple)

    def to_json(self) -> dict[str, Any]:
        """As DESIGN's contract has it."""
        return {
            "study": self.study,
            "trial": describe(self.winner.trial),
            "candidates": [candidate.to_json() for candidate in self.candidates],
            "test": self.test,
            "export": self.export,
        }

    def lines(self) -> list[str]:
        """For people."""
        trial = self.winner.trial
        lines = [f"{self.study}: best is trial {trial.number} ({params_text(trial)})"]
        lines += [f"  {candidate.text()}" for candidate in self.candidates]
        if self.test is not None and self.export is not None:
            low, high = self.test["ci95"]
            lines.append(
                f"test accuracy {self.test['accuracy']:.4f} (95 % interval {low:.4f} to "
                f"{high:.4f}), balanced accuracy {self.test['macro_recall']:.4f}, "
                f"macro F1 {self.test['macro_f1']:.4f}"
            )
            lines += [
                f"  {self.export['dir']}/{entry['file']}: {entry['bytes']:,} bytes, accuracy "
                f"{entry['accuracy']:.4f}, logits within {entry['max_abs_diff']:.1e}"
                for entry in self.export["formats"].values()
            ]
            lines += [f"  no {name}: {why}" for name, why in self.export["refused"].items()]
        return [*lines, *self.notes]


def known_best(
    database: Database, record: StudyRecord, *, top_k: int, num_seeds: int
) -> BestReport:
    """What is known so far; trains nothing. Raises NoTrialError, UsageError."""
    study = _study_to_choose_from(database, record)
    plan = plan_recheck(
        study, top_k=top_k, num_seeds=num_seeds, epochs=StudySpec.from_json(record.spec).epochs
    )
    candidates = [
        candidate
        for candidate in known_candidates(database, record, plan)
        if candidate.values or candidate.failures
    ]
    if not candidates:
        best = best_trial(study.trials)
        assert best is not None
        candidates = [Candidate(trial=best)]
    return BestReport(
        study=record.name,
        winner=choose(candidates),
        candidates=candidates,
        notes=_notes(study),
    )


def export_best(
    database: Database,
    record: StudyRecord,
    options: BestOptions,
    *,
    run_workers: RunWorkers,
    say: Say,
) -> BestReport:
    """Re-check the best few, retrain the winner on train and validation, test it once, export it.

    The test split is opened after the last decision, and that is counted in the database. Raises
    NoTrialError; UsageError if `out` can't be written; DataError if the data has changed; what
    `run_workers` raises.
    """
    from trainer.export.folder import export_model, rehearse_export
    from trainer.export.formats import DEFAULT_FORMATS, check_formats
    from trainer.export.publish import check_out

    formats = check_formats(DEFAULT_FORMATS if options.formats is None else options.formats)
    check_out(options.out)
    study = _study_to_choose_from(database, record)
    spec = StudySpec.from_json(record.spec)
    data = spec.load_data(looks_anew=True)
    plan = plan_recheck(study, top_k=options.top_k, num_seeds=options.num_seeds, epochs=spec.epochs)
    notes = [*_notes(study), *([plan.note] if plan.note else [])]
    candidates = recheck(database, record, plan, run_workers=run_workers)
    winner = choose(candidates)
    for candidate in candidates:
        say(candidate.text())
    pays_soup = pays_for_soup(study, plan, winner, epochs=spec.epochs)
    if makes_a_soup(winner) and not pays_soup:
        notes.append("no soup was tried: it would cost over half of what the search did")
    retrainer = Retrainer(
        database=database, record=record, spec=spec, run_workers=run_workers, say=say
    )
    retrained = retrainer.retrain(winner, data, tries_soup=pays_soup)
    last = retrained.history[-1]
    about = {
        "study": record.name,
        "trial": describe(winner.trial),
        "seeds": {
            "study": spec.seed,
            "retraining": retrained.config.seed,
            "soup": list(retrained.seeds) if len(retrained.seeds) > 1 else None,
        },
        "plan": retrained.plan.to_dict(),
        "candidates": [candidate.to_json() for candidate in candidates],
        "averaging": retrained.averaging,
        "objective": spec.objective,
        "search": _search(study, spec),
    }
    described: dict[str, Any] = {
        "config": retrained.config,
        "data": retrained.data,
        "out": options.out,
        "formats": formats,
        "curves": _curves(database, record, winner, retrained.history, spec.objective),
        "metrics": {
            "search": {f"val_{spec.objective}": winner.search_value},
            "recheck": {"mean": winner.mean, "std": winner.std, "values": list(winner.values)},
            "retraining": {"epochs": last["epoch"], "train_loss": last["train_loss"]},
        },
    }
    rehearse_export(retrained.model, about={**about, "test_openings": 1}, **described)
    num_openings = count_test_opening(database, record.study_id)
    if num_openings > 1:
        notes.append(
            f"the test split of this study has been opened {num_openings} times: choosing by its "
            "result makes it too good"
        )
    say("opening the test split, exporting")
    manifest = export_model(
        retrained.model,
        test=data.open_test(),
        about={**about, "test_openings": num_openings},
        **described,
    )
    retrainer.forget()
    tested = manifest["metrics"]["test"]
    return BestReport(
        study=record.name,
        winner=winner,
        candidates=candidates,
        test={name: tested[name] for name in ("accuracy", "ci95", "macro_recall", "macro_f1")},
        export={
            "dir": str(options.out),
            "formats": manifest["formats"],
            "refused": manifest["refused"],
        },
        notes=notes,
    )


def _study_to_choose_from(database: Database, record: StudyRecord) -> StudySnapshot:
    study = snapshot(database, record.study_id)
    if best_trial(study.trials) is None:
        raise NoTrialError(
            f"study {record.name} has no trial to choose from: {study.num_finished} of "
            f"{study.budget} have ended; go on with: {launch_command(record.name)}"
        )
    return study


def _notes(study: StudySnapshot) -> list[str]:
    if study.num_finished >= study.budget:
        return []
    return [f"best so far: {study.num_finished} of {study.budget} trials have ended"]


def _search(study: StudySnapshot, spec: StudySpec) -> dict[str, Any]:
    """What an export says of the search that it comes from."""
    return {
        "num_trials": study.num_finished,
        "complete": study.count("COMPLETE"),
        "pruned": study.count("PRUNED"),
        "failed": study.count("FAIL"),
        "num_epochs": num_epochs(study),
        "seconds": study.seconds,
        "space": spec.space.to_json(),
        "folds": spec.folds,
    }


def _curves(
    database: Database,
    record: StudyRecord,
    winner: Candidate,
    history: Sequence[Mapping[str, Any]],
    objective: Objective,
) -> dict[str, list[tuple[float, float]]]:
    """By epoch: validation values of the winner's runs, and the retraining's loss."""
    number = winner.trial.number
    what = f"validation {objective.replace('_', ' ')}"
    runs = {f"trial {number} in the search ({what})": winner.trial}
    for index, run in enumerate(runs_of(database, record, winner)):
        runs[f"trial {number}, fresh seed {index + 1} ({what})"] = run
    curves = {
        name: [
            (step / STEPS_PER_EPOCH, value)
            for step, value in zip(run.steps, run.values, strict=True)
        ]
        for name, run in runs.items()
    }
    losses = [(report["epoch"], report["train_loss"]) for report in history]
    return {**curves, "retraining (training loss)": losses}
