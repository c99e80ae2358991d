"""A study with folds: what is settled, forecast, trained, re-checked, replayed and exported."""

import contextlib
import dataclasses
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from hpo import doctor
from hpo.best import BestOptions, export_best
from hpo.doctor import examine
from hpo.errors import ExitCode, UsageError, exit_code
from hpo.folding import folds_of, work_of_an_epoch
from hpo.forecast import Pace, forecast
from hpo.launch import prepare_study
from hpo.objective import TrialRun
from hpo.options import LaunchOptions
from hpo.progress import duration
from hpo.replay import replay_trial
from hpo.rungs import first_rung
from hpo.space import SearchSpace
from hpo.spec import StudySpec
from storage import leases
from storage.database import Database
from storage.leases import Lease
from storage.snapshots import snapshot
from storage.studies import OpenStudy, find_study
from tests.workers import work
from trainer.config import ConfigError
from trainer.data import registry
from trainer.data.dataset import ImageDataset
from trainer.data.options import no_progress
from trainer.speed import Speed

EPOCHS = 2
SPEC = StudySpec(
    data="digits",
    fingerprint="0" * 64,
    space=SearchSpace(fields={"epochs": EPOCHS}),
    seed=0,
    first_rung=4,
)


def few_digits(seed: int, *_: object) -> ImageDataset:
    """150 digits to train and validate on."""
    data = registry._load_digits(seed)
    return dataclasses.replace(
        data, train=data.train.take(range(120)), val=data.val.take(range(30))
    )


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ImageDataset:
    """What `digits` is in these tests."""
    monkeypatch.setitem(registry.SOURCES, "digits", few_digits)
    monkeypatch.setenv("HPO_CHECKPOINTS", str(tmp_path / "checkpoints"))
    return few_digits(0)


@pytest.fixture
def batch_of_ten(tmp_path: Path) -> Path:
    path = tmp_path / "space.toml"
    path.write_text('[space]\nlr = 3e-3\nbatch_size = 10\ndropout = 0.3\nbackbone = "smallcnn"\n')
    return path


def options(space: Path | None = None, **given: object) -> LaunchOptions:
    usual = LaunchOptions(data="digits", trials=2, epochs=EPOCHS, space=space, folds=3)
    return dataclasses.replace(usual, **given)  # type: ignore[arg-type]


@pytest.mark.parametrize("folds", [-1, 0, 1, 21])
def test_a_number_of_folds_that_can_not_be_is_refused(folds: int) -> None:
    with pytest.raises(UsageError, match=f"--folds must be between 2 and 20, got {folds}"):
        LaunchOptions(folds=folds)


def test_a_spec_keeps_its_folds_and_says_where_others_differ(database: Database) -> None:
    record = prepare_study(database, options())
    spec = StudySpec.from_json(json.loads(json.dumps(record.spec)))
    assert spec.folds == 3
    assert spec.differences({"folds": 3}) == []
    with pytest.raises(UsageError, match="folds is 3 there and 5 here"):
        prepare_study(database, options(folds=5))
    prepare_study(database, options(folds=None))
    prepare_study(database, options(study="plain", folds=None))
    with pytest.raises(UsageError, match="folds is None there and 3 here"):
        prepare_study(database, options(study="plain"))


def test_a_study_from_before_there_were_folds_has_one_split(database: Database) -> None:
    values = prepare_study(database, options(folds=None)).spec
    older = {name: value for name, value in values.items() if name != "folds"}
    assert StudySpec.from_json(older).folds is None


def test_a_class_of_too_few_images_is_refused_before_there_is_a_study(
    database: Database, few: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    ones = few.train.labels == 1
    rare = torch.where(ones & (ones.cumsum(0) > 2), 2, few.train.labels)
    val = dataclasses.replace(few.val, labels=few.val.labels.clamp(min=2))
    data = dataclasses.replace(few, train=dataclasses.replace(few.train, labels=rare), val=val)
    monkeypatch.setitem(registry.SOURCES, "digits", lambda *_: data)
    with pytest.raises(ConfigError, match=r"--folds 3 needs 3 .* digits has 2 of '1'") as refused:
        prepare_study(database, options())
    assert exit_code(refused.value) == ExitCode.USAGE
    found = {each.about: each for each in examine(lambda: database, options(), no_progress)}
    assert (found["data"].level, found["data"].code) == ("problem", ExitCode.USAGE)
    prepare_study(database, options(folds=2))


def test_folds_that_break_a_memory_limit_are_refused(
    database: Database, few: ImageDataset, monkeypatch: pytest.MonkeyPatch
) -> None:
    train, val = (
        dataclasses.replace(split, images=split.images.repeat(1, 1, 8, 8))
        for split in (few.train, few.val)
    )
    large = dataclasses.replace(few, train=train, val=val)
    monkeypatch.setitem(registry.SOURCES, "digits", lambda *_: large)
    with pytest.raises(UsageError, match=r"--folds keeps 2 MiB .* more than --max-memory"):
        prepare_study(database, options(max_memory_bytes=2**20))
    prepare_study(database, options(max_memory_bytes=2**21))


def test_an_epoch_of_folds_is_the_work_of_all_of_them(few: ImageDataset) -> None:
    single = work_of_an_epoch(few, folds=None, seed=0)
    assert (single.num_train, single.num_trained, single.num_checked) == (120, 120, 30)
    for folds, smallest in ((2, 75), (4, 112), (7, 128)):
        found = work_of_an_epoch(few, folds=folds, seed=0)
        assert (found.num_trained, found.num_checked) == ((folds - 1) * 150, 150)
        spec = dataclasses.replace(SPEC, folds=folds)
        cut = folds_of(spec, few, "cpu")
        assert found.num_train == smallest == min(len(fold.train) for fold in cut)
        assert sum(len(fold.train) for fold in cut) == found.num_trained
        held = cut[0].train.images.untyped_storage().nbytes() + 150 * 64
        assert found.image_bytes == held
        assert folds_of(spec, few, "cpu") is cut
    assert folds_of(SPEC, few, "cpu") == ()


def test_the_first_rung_counts_a_folds_own_images(database: Database, tmp_path: Path) -> None:
    path = tmp_path / "space.toml"
    path.write_text("[space]\nbatch_size = 7\n")
    # 120 images are 17 batches of 7, 75 are 11
    assert first_rung(num_train=120, largest_batch=7) == 4
    assert prepare_study(database, options(path, study="a", folds=None)).spec["first_rung"] == 4
    assert prepare_study(database, options(path, study="b", folds=2)).spec["first_rung"] == 16
    assert prepare_study(database, options(path, study="c", folds=8)).spec["first_rung"] == 4


def test_the_doctors_forecast_is_k_times_as_long_and_says_why(
    database: Database, batch_of_ten: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    speed = Speed(
        train=10.0, evaluate=20.0, precision="fp32", channels_last=False, micro_batch=None
    )
    crew = SimpleNamespace(speeds=lambda *_, **__: [speed])
    monkeypatch.setattr(doctor, "Crew", lambda *_: contextlib.nullcontext(crew))

    def found(folds: int | None) -> dict[str, str]:
        given = options(batch_of_ten, folds=folds, workers="1", trials=40)
        return {each.about: each.text for each in examine(lambda: database, given, no_progress)}

    single, five = found(None), found(5)
    assert "folds" not in single
    assert five["folds"] == (
        "a trial trains 5 models, each on 120 images or more, and is validated on all 150: "
        "its epochs cost 5 times those of one model"
    )
    assert "12 s an epoch" in single["speed"]
    assert "60 s an epoch" in five["speed"]
    ends = [
        forecast(
            dataclasses.replace(SPEC, first_rung=16), num_trials=40, num_workers=1,
            num_train=num_train, num_val=num_val, num_val_early=num_val,
            paces={"smallcnn": Pace(train=10, evaluate=20)},
        ).seconds
        for num_train, num_val in ((120, 30), (600, 150), (0, 0))
    ]  # fmt: skip
    assert f"take about {duration(ends[0])} on" in single["end"]
    assert f"take about {duration(ends[1])} on" in five["end"]
    assert ends[1] - ends[2] == pytest.approx(5 * (ends[0] - ends[2]))


def test_a_trial_that_is_cut_goes_on_with_all_folds(
    database: Database, few: ImageDataset, batch_of_ten: Path
) -> None:
    whole = prepare_study(database, options(batch_of_ten, study="whole", trials=1))
    cut = prepare_study(database, options(batch_of_ten, study="cut", trials=1))
    (uncut,) = work(database, whole).trials
    study, spec = OpenStudy(database, cut), StudySpec.from_json(cut.spec)
    lease = leases.claim(database, cut.study_id, "w", lease_seconds=30)
    assert isinstance(lease, Lease)
    batches = iter(range(10**6))

    def pulse() -> None:
        if next(batches) == 50:  # in the second of three folds, after the report at step 4
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        TrialRun(study, spec, lease, few, device="cpu", pulse=pulse).run()
    leases.release(database, lease)
    assert snapshot(database, cut.study_id).trials[0].steps == (1, 4)
    (resumed,) = work(database, cut).trials
    assert (resumed.attempts, resumed.steps) == (2, (1, 4, 8))
    assert (uncut.attempts, uncut.values) == (1, resumed.values)
    # an accuracy over all 150 images, which one split of 30 can't have
    assert any((value * 30) % 1 > 1e-6 for value in resumed.values)


def test_a_folded_study_is_replayed_and_rechecked_in_folds_and_its_winner_retrained_on_all(
    database: Database, batch_of_ten: Path, tmp_path: Path
) -> None:
    record = prepare_study(database, options(batch_of_ten, trials=4))
    found = work(database, record)
    assert replay_trial(database, record, 0, epochs=1, say=print).is_same
    report = export_best(
        database,
        record,
        BestOptions(out=tmp_path / "out", top_k=1, num_seeds=1, formats=("safetensors",)),
        run_workers=lambda child, **_: work(database, child),
        say=print,
    )
    child = find_study(database, f"{record.name}:recheck-{record.study_id}")
    assert child.spec["folds"] == 3
    (run,) = snapshot(database, child.study_id).trials
    assert report.winner.values == (run.value,)
    assert set(run.attributes["averages"]) == {"ema", "tail"}
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["search"]["folds"] == 3
    assert sum(manifest["data"]["images"]["train"]) == 150
    assert found.num_finished == 4
