"""What `hpo launch` is told of the search: refused in a line, kept in the spec, compared later."""

from collections.abc import Mapping
from typing import Any

import pytest
from optuna.trial import TrialState

from hpo.errors import NoTrialError, UsageError
from hpo.launch import prepare_study
from hpo.options import LaunchOptions
from hpo.search import SearchOptions
from hpo.warm_start import MOST_EARLIER
from storage import leases
from storage.database import Database
from storage.leases import Lease
from storage.snapshots import snapshot
from storage.studies import OpenStudy, StudyRecord
from trainer.config import ConfigError, TrainConfig


@pytest.fixture(autouse=True)
def _own_home(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HPO_HOME", str(tmp_path))


def prepare(database: Database, study: str = "digits", **search: Any) -> StudyRecord:
    trials = search.pop("trials", None)
    options = LaunchOptions(study=study, trials=trials, search=SearchOptions(**search))
    return prepare_study(database, options)


def finish(database: Database, record: StudyRecord, value: float | None, **config: Any) -> None:
    """A trial of the study, trained with this config."""
    lease = leases.claim(database, record.study_id, "w", lease_seconds=30)
    assert isinstance(lease, Lease)
    study = OpenStudy(database, record)
    trial_id = study.bind(lease)
    trained = TrainConfig.from_dict(config).to_dict()
    study.write(lease, lambda: study.trial(trial_id).set_user_attr("config", trained))
    if value is not None:
        study.report(lease, 8, value, images_per_second=1.0)
    state = TrialState.PRUNED if value is None else TrialState.COMPLETE
    study.end(lease, state, value=value, reason="said")


@pytest.mark.parametrize(
    ("search", "says"),
    [
        ({"sampler": "cmaes"}, "unknown sampler 'cmaes'"),
        ({"pruner": "rung"}, "unknown pruner 'rung', did you mean rungs?"),
        ({"settings": ("lr",)}, "--set takes FIELD=VALUE"),
        ({"settings": ("lr=fast",)}, "--set: lr must be a number, got 'fast'"),
        ({"settings": ("batchsize=8",)}, "unknown field 'batchsize', did you mean batch_size?"),
        ({"settings": ("flip=maybe",)}, "--set: flip must be true or false, got 'maybe'"),
        ({"settings": ("lr=1", "lr=2")}, "--set sets lr twice"),
        ({"settings": ("dropout=1.5",)}, r"dropout must be in \[0, 1\)"),
    ],
)
def test_what_can_not_be_is_refused_before_anything_is_looked_at(
    search: Mapping[str, Any], says: str
) -> None:
    with pytest.raises((UsageError, ConfigError), match=says):
        SearchOptions(**search)


def test_a_field_that_is_set_is_fixed_whatever_the_space_file_says(tmp_path: Any) -> None:
    path = tmp_path / "space.toml"
    path.write_text('[space]\nlr = [0.1, 0.01]\nflip = [true, false]\nbackbone = "resnet8"\n')
    search = SearchOptions(settings=("lr=5e-3", "flip=true", "optimizer=sgd"))
    options = LaunchOptions(space=path, search=search)
    assert options.given_fields() == {
        "lr": 5e-3, "flip": True, "optimizer": "sgd", "backbone": "resnet8",
    }  # fmt: skip


def test_sampler_and_pruner_are_kept_and_compared(database: Database) -> None:
    record = prepare(database, sampler="qmc", pruner="median", settings=("lr=0.01",))
    assert (record.spec["sampler"], record.spec["pruner"]) == ("qmc", "median")
    assert prepare(database).spec == record.spec  # what is left out is not compared
    with pytest.raises(UsageError, match="sampler is 'qmc' there and 'tpe' here"):
        prepare(database, sampler="tpe")
    with pytest.raises(UsageError, match="pruner is 'median' there and 'none' here"):
        prepare(database, pruner="none")
    with pytest.raises(UsageError, match=r"lr is 0\.01 there and 0\.02 here"):
        prepare(database, settings=("lr=0.02",))


def test_a_grid_cuts_the_budget_to_its_size_now_and_later(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    fixed = ("lr=0.01", "weight_decay=0", "backbone=smallcnn")
    record = prepare(database, sampler="grid", settings=fixed)
    assert record.budget == 3
    assert "the grid has 3 points: 3 trials are enough" in caplog.text
    assert prepare(database, trials=40).budget == 3
    with pytest.raises(UsageError, match="can grow but not shrink to 2"):
        prepare(database, trials=2)


def test_a_grid_without_an_end_is_refused_and_so_are_points_in_one(database: Database) -> None:
    with pytest.raises(UsageError, match="lr, weight_decay are ranges"):
        prepare(database, sampler="grid")
    fixed = ("lr=0.01", "weight_decay=0")
    with pytest.raises(UsageError, match="leave out --try and --from"):
        prepare(database, sampler="grid", settings=fixed, tries=("batch_size=64",))


def test_points_wait_to_be_tried_and_the_budget_holds_them(database: Database) -> None:
    tries = ("lr=1e-3,batch_size=64", "tutorial")
    with pytest.raises(UsageError, match="2 starting points don't fit a budget of 1 trials"):
        prepare(database, tries=tries, trials=1)
    for _ in range(2):
        record = prepare(database, tries=tries, trials=3)
    assert record.budget == 3
    assert snapshot(database, record.study_id).count("WAITING") == 2


def test_a_study_begins_with_the_best_of_an_earlier_one(
    database: Database, caplog: pytest.LogCaptureFixture
) -> None:
    earlier = prepare(database, "earlier", trials=20)
    finish(database, earlier, 0.7, lr=1e-3, batch_size=64, backbone="resnet8")
    finish(database, earlier, 0.9, lr=2e-3, batch_size=64, backbone="resnet20")
    finish(database, earlier, 0.8, lr=0.9, batch_size=32, backbone="resnet8")
    finish(database, earlier, None, lr=3e-3)
    for _ in range(2):
        record = prepare(database, "later", earlier="earlier")
    assert record.spec["earlier"] == "earlier"
    study = OpenStudy(database, record)
    waiting = snapshot(database, record.study_id).trials
    assert [study.trial(trial.trial_id)._fixed_params for trial in waiting] == [
        {"lr": 2e-3, "batch_size": 64, "weight_decay": 0.01},
        {"batch_size": 32, "backbone": "resnet8", "weight_decay": 0.01},
        {"lr": 1e-3, "batch_size": 64, "backbone": "resnet8", "weight_decay": 0.01},
    ]
    assert "begins with the best 3 trials of earlier; backbone, lr: sampled where" in caplog.text


def test_a_study_begins_with_few_of_an_earlier_one(database: Database) -> None:
    earlier = prepare(database, "earlier", trials=20)
    for number in range(MOST_EARLIER + 2):
        finish(database, earlier, 0.5, lr=1e-3 * (1 + number))
    record = prepare(database, "later", earlier="earlier")
    assert len(snapshot(database, record.study_id).trials) == MOST_EARLIER


def test_an_earlier_study_that_gives_nothing_is_refused(database: Database) -> None:
    prepare(database, "earlier")
    with pytest.raises(NoTrialError, match="none of its trials can be tried"):
        prepare(database, "later", earlier="earlier")
    with pytest.raises(UsageError, match="no study 'other' here: there is earlier"):
        prepare(database, "later", earlier="other")
    with pytest.raises(UsageError, match="can't begin from itself"):
        prepare(database, "later", earlier="later")
