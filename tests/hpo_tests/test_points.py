"""Starting points: what they may be, and that they are tried as trials of the study."""

from typing import Any

import optuna
import pytest

from hpo.errors import UsageError
from hpo.points import (
    RECIPES,
    StartingPoint,
    add_points,
    parse_point,
    starting_point,
    suggest_config,
)
from hpo.space import Range, SearchSpace
from storage.database import Database
from storage.snapshots import snapshot
from storage.studies import OpenStudy
from tests.parts import make_study
from trainer.config import ConfigError, TrainConfig

SPACE = SearchSpace(
    fields={
        "lr": Range(low=1e-4, high=1e-2, log=True),
        "batch_size": (32, 64),
        "backbone": ("smallcnn", "resnet8"),
        "optimizer": "adamw",
        "epochs": 3,
    }
)


def test_a_point_is_read_as_its_fields_are_typed() -> None:
    assert parse_point("lr=1e-3, batch_size=64,backbone=resnet8,flip=TRUE") == {
        "lr": 1e-3,
        "batch_size": 64,
        "backbone": "resnet8",
        "flip": True,
    }
    assert parse_point("tutorial") == "tutorial"


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("lr=2", r"lr = 2 lies outside 0.0001 to 0.01"),
        ("batch_size=48", r"batch_size = 48 is none of \[32, 64\]"),
        ("batch_size=many", r"--try: batch_size must be a whole number, got 'many'"),
        ("flip=yes", "--try: flip must be true or false"),
        ("optimizer=sdg", "unknown optimizer 'sdg', did you mean sgd"),
        ("optimizer=sgd", "optimizer is not searched here but fixed at 'adamw'"),
        ("epochs=4", "epochs is not searched here but fixed at 3"),
        ("momentum=0.5", "momentum is not searched here but fixed at 0.9"),
        ("optimizer=adamw", "--try sets nothing that is searched: that is lr, batch_size"),
        ("lr=0", "lr must be > 0"),
        ("lr=1,lr=2", "--try sets lr twice"),
        ("lr=", "takes FIELD=VALUE"),
        ("rate=1", "unknown field 'rate'"),
        ("tutorails", "--try takes FIELD=VALUE,... or a name: unknown starting point 'tutorails'"),
    ],
)  # fmt: skip
def test_a_point_that_can_not_be_is_refused_in_a_line(text: str, says: str) -> None:
    with pytest.raises((UsageError, ConfigError), match=says) as refusal:
        starting_point(SPACE, parse_point(text))
    assert "\n" not in str(refusal.value)


def config_of(database: Database, point: StartingPoint) -> tuple[TrainConfig, dict[str, Any]]:
    """What the first trial of a study with this point trains, and its parameters."""
    record = make_study(database)
    add_points(database, record, [point], budget=5)
    (waiting,) = snapshot(database, record.study_id).trials
    study = OpenStudy(database, record)
    study.trial(waiting.trial_id)
    trial = optuna.Trial(study.study, waiting.trial_id)
    config = suggest_config(SPACE, trial, seed=7, recipe=waiting.attributes.get("recipe"))
    return config, trial.params


def test_what_a_point_leaves_open_is_sampled(database: Database) -> None:
    config, params = config_of(database, starting_point(SPACE, {"lr": 1e-3, "batch_size": 64}))
    assert (config.lr, config.batch_size, config.seed) == (1e-3, 64, 7)
    assert params == {"lr": 1e-3, "batch_size": 64, "backbone": config.backbone}


def test_the_tutorials_recipe_is_tried_as_it_is_written(database: Database) -> None:
    config, params = config_of(database, starting_point(SPACE, "tutorial"))
    assert config == TrainConfig(
        backbone="resnet18", lr=1e-3, batch_size=64, optimizer="adam", weight_decay=1e-4,
        schedule="step", flip=True, rotation=15.0, epochs=3, seed=7,
    )  # fmt: skip
    assert params == {"lr": 1e-3, "batch_size": 64}  # resnet18 is none of the space's


@pytest.mark.parametrize("name", RECIPES)
def test_each_recipe_is_a_training(name: str) -> None:
    TrainConfig.from_dict(RECIPES[name])


def test_the_same_points_again_add_nothing_and_a_full_budget_refuses_more(
    database: Database,
) -> None:
    record = make_study(database, budget=2)
    first = starting_point(SPACE, {"lr": 1e-3})
    same = starting_point(SPACE, {"optimizer": "adamw", "lr": 0.001})
    for _ in range(2):
        add_points(database, record, [first, same, starting_point(SPACE, "tutorial")], budget=2)
    assert len(snapshot(database, record.study_id).trials) == 2
    with pytest.raises(UsageError, match="1 starting points don't fit a budget of 2 trials"):
        add_points(database, record, [starting_point(SPACE, {"lr": 2e-3})], budget=2)
    assert len(snapshot(database, record.study_id).trials) == 2
