"""A launch that is refused, early or late, leaves database, files and an existing study as is."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from hpo import cli
from storage.database import Database

SPACE = '[space]\nlr = {low = 1e-3, high = 1e-2, log = true}\nbackbone = "smallcnn"\nepochs = 2\n'
EARLY: dict[str, Sequence[str]] = {
    "data that isn't there": ("--data", "nothing-of-this-name"),
    "a folder that isn't there": ("--data", "./no/such/folder"),
    "an image size of 0": ("--image-size", "0"),
    "more broken than all": ("--max-broken", "2"),
    "a memory that is no size": ("--max-memory", "much"),
    "no trials": ("--trials", "0"),
    "no epochs": ("--epochs", "0"),
    "workers that are no number": ("--workers", "none"),
    "no workers": ("--workers", "0"),
    "a device that isn't there": ("--devices", "cuda:7"),
    "a space file that isn't there": ("--space", "no.toml"),
    "a space file with an unknown field": ("--space", "unknown.toml"),
    "a backbone that isn't there": ("--backbone", "resnet9"),
    "an own network that isn't there": ("--backbone", "no_package:net"),
    "a module that isn't there": ("--module", "no_package:Net"),
    "weights that aren't there": ("--weights", "no.pth"),
    "a seed below 0": ("--seed", "-1"),
    "one fold": ("--folds", "1"),
    "an objective that there is not": ("--objective", "f1"),
    "a precision that there is not": ("--precision", "fp8"),
    "a time limit of nothing": ("--timeout", "0"),
    "a limit of no parameters": ("--max-params", "0"),
    "a limit that no network keeps": ("--max-megabytes", "0.0001"),
    "a latency of 0": ("--max-latency-ms", "0"),
    "a sampler that there is not": ("--sampler", "best"),
    "a pruner that there is not": ("--pruner", "best"),
    "a starting point outside of the space": ("--try", "lr=100"),
    "more starting points than trials": ("--trials", "1", "--try", "lr=1e-3", "--try", "lr=2e-3"),
    "an earlier study that isn't there": ("--from", "no-such-study"),
    "a field that there is not": ("--set", "speed=2"),
    "a study's name that can't be": ("--study", "a b"),
}
LATE: dict[str, Sequence[str]] = {
    "another seed": ("--seed", "5"),
    "another number of epochs": ("--epochs", "3"),
    "another backbone": ("--backbone", "resnet8"),
    "another precision": ("--precision", "bf16"),
    "another sampler": ("--sampler", "random"),
    "another pruner": ("--pruner", "none"),
    "folds": ("--folds", "2"),
    "a limit": ("--max-params", "1e9"),
    "another objective": ("--objective", "macro_f1"),
    "a smaller budget": ("--trials", "2"),
    "a starting point without room": ("--try", "lr=1e-3"),
    "from itself": ("--from", "digits"),
}
TABLES = ("hpo_studies", "hpo_leases", "hpo_workers", "trials", "trial_user_attributes", "studies")


def content(database: Database) -> dict[str, Any]:
    """Of all tables that a launch writes."""
    with database.engine.connect() as connection:
        return {
            name: [tuple(map(str, row)) for row in connection.execute(text(f"TABLE {name}"))]
            for name in TABLES
        }


@pytest.fixture
def launch(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[Sequence[str]], int]:
    """The exit code of hpo launch with these options, in this process."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HPO_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HPO_STORAGE", database_url)
    monkeypatch.setattr("hpo.executors.local.warm_up", lambda **_: None)
    (tmp_path / "unknown.toml").write_text("[space]\nspeed = 2\n")
    (tmp_path / "space.toml").write_text(SPACE)

    def run(options: Sequence[str]) -> int:
        with pytest.raises(SystemExit) as ended:
            cli.main(["launch", *options])
        return int(ended.value.code or 0)

    return run


@pytest.mark.parametrize("what", EARLY)
def test_a_refused_launch_makes_no_study_and_no_file(
    what: str,
    launch: Callable[[Sequence[str]], int],
    database: Database,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = content(database)
    options = EARLY[what]
    space = () if "--space" in options or "--module" in options else ("--space", "space.toml")
    assert launch([*space, *options]) in (2, 5)
    assert content(database) == before
    assert not (tmp_path / "home").exists()
    err = capsys.readouterr().err
    assert "Traceback" not in err


@pytest.mark.parametrize("what", [*EARLY, *LATE])
def test_a_refused_launch_leaves_a_study_that_is_there_as_it_is(
    what: str, launch: Callable[[Sequence[str]], int], database: Database
) -> None:
    a_stopped_study(database)
    before = content(database)
    assert launch({**EARLY, **LATE}[what]) in (2, 5)
    assert content(database) == before


@pytest.mark.parametrize("options", [(), ("--devices", "cpu"), ("--data", "digits")])
def test_bf16_on_a_processor_that_emulates_it_is_refused_before_there_is_a_study(
    options: Sequence[str],
    launch: Callable[[Sequence[str]], int],
    database: Database,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("trainer.device.available_devices", lambda: ["cpu"])
    monkeypatch.setattr("trainer.device.has_fast_bf16", lambda: False)
    before = content(database)
    assert launch(["--precision", "bf16", *options]) == 2
    assert content(database) == before
    assert not (tmp_path / "home").exists()
    (line,) = capsys.readouterr().err.splitlines()
    assert "does not compute in bf16 itself: use a GPU or a processor that does" in line


def test_a_study_in_bf16_is_not_taken_on_by_a_launch_where_it_is_emulated(
    launch: Callable[[Sequence[str]], int],
    database: Database,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from hpo.launch import prepare_study
    from hpo.options import LaunchOptions

    monkeypatch.setattr("trainer.device.available_devices", lambda: ["cpu"])
    monkeypatch.setattr("trainer.device.has_fast_bf16", lambda: True)
    prepare_study(database, LaunchOptions(trials=3, backbones="smallcnn", precision="bf16"))
    before = content(database)
    monkeypatch.setattr("trainer.device.has_fast_bf16", lambda: False)
    assert launch(["--study", "digits", "--trials", "5"]) == 2
    assert content(database) == before
    assert "does not compute in bf16 itself" in capsys.readouterr().err.splitlines()[-1]


def a_stopped_study(database: Database) -> None:
    """Of digits, with a budget of three trials and three trials that have ended."""
    from hpo.launch import prepare_study
    from hpo.options import LaunchOptions
    from storage.studies import request_stop

    record = prepare_study(
        database,
        LaunchOptions(trials=3, epochs=2, backbones="smallcnn", timeout_seconds=3600),
    )
    with database.engine.begin() as connection:
        connection.execute(
            text(
                "INSERT INTO trials (number, study_id, state)"
                " SELECT n, :study, 'COMPLETE' FROM generate_series(0, 2) n"
            ),
            {"study": record.study_id},
        )
    request_stop(database, record.study_id)
