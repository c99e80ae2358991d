"""Search, re-check, retraining and export in this process, by the product's own worker."""

import dataclasses
import json
import types
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from hpo import candidates
from hpo.best import BestOptions, export_best, known_best
from hpo.errors import Interrupted, NoTrialError, UsageError
from hpo.launch import prepare_study
from hpo.limits import Limits
from hpo.options import LaunchOptions
from hpo.recheck import runs_of
from hpo.replay import replay_trial
from hpo.search import SearchOptions
from storage.database import Database
from storage.schema import ensure_tables
from storage.snapshots import StudySnapshot, TrialSnapshot, snapshot
from storage.starting_points import KEY, add_starting_points
from storage.studies import StudyRecord, find_studies, find_study, request_stop
from tests.parts import make_study, url_of
from tests.workers import work
from trainer.config import ConfigError
from trainer.data import registry
from trainer.data.dataset import ImageDataset, Split

EPOCHS = 4
opened: list[str] = []
"""What was going on each time the test split was opened."""
doing = ["nothing"]


def watched_digits(seed: int, *_: object) -> ImageDataset:
    """Digits, that note who opens their test split."""
    data = registry._load_digits(seed)

    def open_test() -> Split:
        opened.append(doing[-1])
        return data.open_test()

    return dataclasses.replace(data, open_test=open_test)


@pytest.fixture(scope="module")
def searched(
    postgres: object, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Database, StudyRecord]]:
    """A study that has ended."""
    from tests.parts import execute

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.SOURCES, "digits", watched_digits)
        patch.setenv("HPO_CHECKPOINTS", str(tmp_path_factory.mktemp("checkpoints")))
        execute(postgres, "CREATE DATABASE test_best")  # type: ignore[arg-type]
        database = Database(url_of(postgres, "test_best"))  # type: ignore[arg-type]
        database.open()
        ensure_tables(database)
        # what re-checks may cost is counted in epochs here: seconds depend on the neighbours
        patch.setattr(candidates, "_cost", lambda _trial, epochs: epochs)
        options = LaunchOptions(
            data="digits",
            trials=10,
            epochs=EPOCHS,
            backbones="smallcnn",
            objective="macro_f1",
            search=SearchOptions(pruner="none"),
        )
        doing.append("search")
        record = prepare_study(database, options)
        work(database, record)
        yield database, record
        database.engine.dispose()


def test_the_winner_is_rechecked_retrained_and_tested_once(
    searched: tuple[Database, StudyRecord], tmp_path: Path
) -> None:
    database, record = searched
    doing.append("known best")
    before = known_best(database, record, top_k=2, num_seeds=2)
    assert before.candidates[0].mean is None
    ran: list[str] = []

    def run_workers(child: StudyRecord, **_: object) -> StudySnapshot:
        ran.append(child.name)
        doing.append("re-check")
        return work(database, child)

    def say(line: str) -> None:
        doing.append(line)

    report = export_best(
        database,
        record,
        BestOptions(out=tmp_path / "out", top_k=2, num_seeds=2),
        run_workers=run_workers,
        say=say,
    )
    kinds = ("recheck", "retrain")
    assert ran == [f"{record.name}:{kind}-{record.study_id}" for kind in kinds]
    assert opened == ["opening the test split, exporting"]
    assert [len(candidate.values) for candidate in report.candidates] == [2, 2]
    assert report.winner.mean == max(c.mean for c in report.candidates if c.mean is not None)
    assert set(report.winner.averages) == {"ema", "tail"}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["study"] == record.name
    assert manifest["objective"] == "macro_f1"
    assert manifest["metrics"]["search"] == {"val_macro_f1": report.winner.search_value}
    assert manifest["candidates"] == [candidate.to_json() for candidate in report.candidates]
    assert manifest["config"]["average"] == manifest["averaging"]["chosen"]
    seeds = {run.attributes["config"]["seed"] for run in rechecks(database, record)}
    searched_seed = report.winner.trial.attributes["config"]["seed"]
    assert len(seeds | {searched_seed, manifest["seeds"]["retraining"]}) == 2 * 2 + 2

    # the same again trains no candidate again, and opens the test split a second time
    again = export_best(
        database,
        record,
        BestOptions(out=tmp_path / "out", top_k=2, num_seeds=2),
        run_workers=run_workers,
        say=say,
    )
    assert [name.partition(":")[2].partition("-")[0] for name in ran] == [*kinds, "retrain"]
    assert again.candidates == report.candidates
    assert again.test == report.test
    assert any("opened 2 times" in note for note in again.notes)
    known = known_best(database, record, top_k=2, num_seeds=2)
    assert known.candidates == report.candidates
    assert (known.test, known.export) == (None, None)

    # none of it counts in the study
    assert [each.name for each in find_studies(database)] == [record.name]
    assert snapshot(database, record.study_id).num_finished == record.budget


def rechecks(database: Database, record: StudyRecord) -> tuple[TrialSnapshot, ...]:
    child = find_study(database, f"{record.name}:recheck-{record.study_id}")
    return snapshot(database, child.study_id).trials


def test_a_recheck_that_was_stopped_says_so_and_goes_on(
    searched: tuple[Database, StudyRecord], tmp_path: Path
) -> None:
    database, record = searched
    options = BestOptions(out=tmp_path / "out", top_k=1, num_seeds=3)

    def stopped(child: StudyRecord, **_: object) -> StudySnapshot:
        request_stop(database, record.study_id)
        return work(database, child)

    with pytest.raises(Interrupted, match="the same command goes on"):
        export_best(database, record, options, run_workers=stopped, say=print)
    assert not (tmp_path / "out").exists()
    report = export_best(
        database, record, options, run_workers=lambda child, **_: work(database, child), say=print
    )
    assert len(report.winner.values) == 3


def test_an_export_that_can_t_be_written_leaves_the_test_split_closed(
    searched: tuple[Database, StudyRecord], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database, record = searched
    before, number = list(opened), find_study(database, record.name).test_openings
    monkeypatch.setattr("shutil.disk_usage", lambda _: types.SimpleNamespace(free=2**20))
    options = BestOptions(out=tmp_path / "out", top_k=1, num_seeds=0)
    with pytest.raises(ConfigError, match="its disk has 1 MiB left"):
        export_best(
            database,
            record,
            options,
            run_workers=lambda child, **_: work(database, child),
            say=print,
        )
    assert opened == before
    assert find_study(database, record.name).test_openings == number


def test_the_quick_way_trains_no_candidate_and_says_so(
    searched: tuple[Database, StudyRecord], tmp_path: Path
) -> None:
    database, record = searched
    ran: list[str] = []

    def run_workers(child: StudyRecord, **_: object) -> StudySnapshot:
        ran.append(child.name)
        return work(database, child)

    options = BestOptions(out=tmp_path / "out", top_k=1, num_seeds=0)
    report = export_best(database, record, options, run_workers=run_workers, say=print)
    assert not any("recheck" in name for name in ran)
    assert report.winner.mean is None
    assert any("probably too high" in note for note in report.notes)
    assert "probably too high" in "\n".join(report.lines())


def test_a_replay_gives_the_same_values_bit_for_bit(
    searched: tuple[Database, StudyRecord],
) -> None:
    database, record = searched
    whole = next(t for t in snapshot(database, record.study_id).trials if t.state == "COMPLETE")
    found = replay_trial(database, record, whole.number, epochs=2, say=print)
    assert found.is_same
    assert (found.values, found.steps[-1]) == (found.replayed, 8)
    assert "the same, bit for bit" in found.lines()[-1]
    other = dataclasses.replace(found, replayed=(*found.replayed[:-1], 0.1234))
    assert not other.is_same
    assert "not the same" in other.lines()[-1]


def test_a_trial_that_is_not_there_can_not_be_replayed(
    searched: tuple[Database, StudyRecord],
) -> None:
    with pytest.raises(UsageError, match="no trial 77: there is 0 to 9"):
        replay_trial(*searched, 77, epochs=1, say=print)


def test_a_model_above_a_limit_is_a_constraint_without_an_epoch(database: Database) -> None:
    options = LaunchOptions(
        study="small",
        data="digits",
        trials=4,
        epochs=1,
        backbones="smallcnn,resnet18",
    )
    limited = dataclasses.replace(options, limits=Limits(max_params=100_000))
    record = prepare_study(database, limited)
    found = work(database, record)
    large = [trial for trial in found.trials if trial.params["backbone"] == "resnet18"]
    assert large
    for trial in large:
        assert (trial.state, trial.is_feasible, trial.steps) == ("PRUNED", False, ())
        assert "parameters, above --max-params 100,000" in trial.attributes["reason"]
    impossible = dataclasses.replace(limited, study="none", limits=Limits(max_params=10))
    with pytest.raises(UsageError, match="no backbone of the space keeps the limits"):
        prepare_study(database, impossible)


def test_a_study_with_nothing_to_choose_from_is_said(database: Database, tmp_path: Path) -> None:
    record = prepare_study(database, LaunchOptions(data="digits", trials=1, epochs=1))
    with pytest.raises(NoTrialError, match="no trial to choose from"):
        known_best(database, record, top_k=3, num_seeds=3)
    with pytest.raises(NoTrialError, match="no trial to choose from"):
        export_best(
            database,
            record,
            BestOptions(out=tmp_path / "out"),
            run_workers=lambda child, **_: work(database, child),
            say=print,
        )


def test_re_checks_of_a_candidate_come_in_the_order_of_their_seeds(
    database: Database,
) -> None:
    keys = ["3/2", "3/10", "3/1", "30/1"]
    record = make_study(database, name="study")
    child = make_study(database, name=f"study:recheck-{record.study_id}", budget=len(keys))
    add_starting_points(database, child, {key: {} for key in keys})
    with database.engine.begin() as connection:
        connection.execute(text("UPDATE trials SET state = 'COMPLETE'"))
    trial = TrialSnapshot(
        trial_id=1, number=3, state="COMPLETE", value=0.9, params={}, attributes={}, steps=(),
        values=(), is_feasible=True, attempts=1, seconds=1.0, images_per_second=1.0,
    )  # fmt: skip
    found = runs_of(database, record, candidates.Candidate(trial=trial))
    assert [run.attributes[KEY] for run in found] == ["3/1", "3/2", "3/10"]
