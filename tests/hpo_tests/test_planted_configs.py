"""What stands with a trial in the database decides nothing about which code runs here."""

import json
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from hpo.space import SearchSpace
from hpo.spec import StudySpec
from storage.database import Database
from tests.parts import Hpo
from trainer.config import ConfigError, TrainConfig

EVIL = """
from pathlib import Path
Path(__file__).with_name("has-run").touch()
def net(**_):
    raise ValueError
"""


def spec(**more: Any) -> StudySpec:
    return StudySpec(
        data="digits",
        fingerprint="none",
        space=SearchSpace(fields={"backbone": ("smallcnn", "resnet8")}),
        seed=0,
        first_rung=4,
        **more,
    )


@pytest.mark.parametrize("backbone", ["evil:net", "lightning:evil:Net", "timm:resnet18"])
def test_a_network_that_the_study_was_not_launched_with_is_not_taken(backbone: str) -> None:
    with pytest.raises(ConfigError, match="the study was not launched with it"):
        spec().trial_config({**TrainConfig().to_dict(), "backbone": backbone})


def test_neither_are_weights(tmp_path: Path) -> None:
    known = str(tmp_path / "known.pth")
    values = {**TrainConfig().to_dict(), "weights": str(tmp_path / "planted.pth")}
    with pytest.raises(ConfigError, match="not launched with them"):
        spec(weights={known: "0" * 64}).trial_config(values)
    taken = spec(weights={known: "0" * 64}).trial_config({**values, "weights": known})
    assert taken.weights == known


def test_a_worker_that_takes_over_a_trial_with_a_planted_network_runs_none_of_its_code(
    database: Database, database_url: str, tmp_path: Path
) -> None:
    (tmp_path / "evil.py").write_text(EVIL)
    home = tmp_path / "home"
    home.mkdir()
    hpo = Hpo(home, {"HPO_STORAGE": database_url, "PYTHONPATH": str(tmp_path)})
    options = ("--trials", "2", "--epochs", "2", "--backbone", "smallcnn", "--workers", "1")
    made = hpo.run("launch", *options)
    assert made.returncode == 0, made.stderr
    plant(database)
    with database.engine.begin() as connection:
        connection.execute(text("UPDATE trials SET state = 'RUNNING' WHERE number = 1"))
        connection.execute(
            text(
                "UPDATE hpo_leases SET ended_at = NULL WHERE trial_id ="
                " (SELECT trial_id FROM trials WHERE number = 1)"
            )
        )
    hpo.run("launch", "--trials", "3", "--workers", "1")
    (trial,) = [each for each in json.loads(hpo.run("trials", "--json").stdout)
                if each["number"] == 1]  # fmt: skip
    assert trial["state"] == "FAIL"
    assert "the study was not launched with it" in trial["reason"]
    plant(database)
    for command in (("replay", "--trial", "0"), ("best", "--export", "--top-k", "1", "--seeds",
                                                 "0", "--out", str(tmp_path / "out"))):  # fmt: skip
        refused = hpo.run(*command)
        assert refused.returncode == 2, refused.stderr
        assert "the study was not launched with it" in refused.stderr.splitlines()[-1]
    assert not (tmp_path / "has-run").exists()


def plant(database: Database) -> None:
    """Give each trial a network that somebody wants to have run."""
    planted = json.dumps({**TrainConfig().to_dict(), "backbone": "evil:net"})
    with database.engine.begin() as connection:
        connection.execute(
            text("UPDATE trial_user_attributes SET value_json = :value WHERE key = 'config'"),
            {"value": planted},
        )
