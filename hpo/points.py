"""Starting points: what a user wants tried before the sampler proposes anything.

They are trials of the study like any other: of its budget, judged by its pruner, learnt from by its
sampler. Fields that a point leaves open are sampled.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import optuna

from hpo.errors import UsageError
from hpo.settings import parse_settings
from hpo.space import SearchSpace
from storage.database import Database
from storage.snapshots import snapshot
from storage.starting_points import KEY, add_starting_points
from storage.studies import StudyRecord
from trainer.config import ConfigError, TrainConfig, flat, unknown_name

RECIPE = "recipe"
"""The user attribute of a trial that has all its fields of its own, whatever the space says."""

RECIPES: Mapping[str, Mapping[str, Any]] = {
    "tutorial": {
        "backbone": "resnet18",
        "lr": 1e-3,
        "batch_size": 64,
        "optimizer": "adam",
        "weight_decay": 1e-4,
        "schedule": "step",
        "flip": True,
        "rotation": 15.0,
    },
}
"""Whole trainings by name. What one leaves out is TrainConfig's default; epochs are the study's."""


@dataclass(frozen=True, kw_only=True)
class StartingPoint:
    """What is tried: values of searched fields, or a whole recipe."""

    key: str
    """Tells it from the study's other points: the same command again adds nothing."""
    params: Mapping[str, Any]
    recipe: Mapping[str, Any] = field(default_factory=dict)

    @property
    def attributes(self) -> Mapping[str, Any]:
        """Of the trial that it becomes."""
        return {RECIPE: dict(self.recipe)} if self.recipe else {}


def parse_point(text: str) -> str | Mapping[str, Any]:
    """A recipe's name, or field -> value of 'lr=1e-3,batch_size=64'. Raises UsageError."""
    if "=" not in text:
        if text not in RECIPES:
            known = unknown_name("starting point", text, RECIPES)
            raise UsageError(f"--try takes FIELD=VALUE,... or a name: {known}")
        return text
    return parse_settings("--try", text.split(","))


def starting_point(space: SearchSpace, given: str | Mapping[str, Any]) -> StartingPoint:
    """The point in this space. Raises ConfigError if it isn't in it; a recipe need not be."""
    if isinstance(given, str):
        recipe = RECIPES[given]
        return StartingPoint(key=f"try {given}", params=fitting(space, recipe), recipe=recipe)
    params = {}
    for name, value in given.items():
        problem = complaint(space, name, value)
        if problem is not None:
            raise ConfigError(f"--try: {problem}")
        if name in space.searched:
            params[name] = value
    if not params:
        raise ConfigError(
            f"--try sets nothing that is searched: that is {', '.join(space.searched) or 'nothing'}"
        )
    return StartingPoint(key=f"try {json.dumps(params, sort_keys=True)}", params=params)


def complaint(space: SearchSpace, name: str, value: Any) -> str | None:
    """Why a trial of this space can't have the value, None if it can."""
    if name not in space.searched:
        fixed = space.fields.get(name, getattr(TrainConfig(), name, None))
        if value == fixed:
            return None
        return f"{name} is not searched here but fixed at {fixed!r}, and can't be {value!r}"
    what = space.fields[name]
    if isinstance(what, tuple):
        return None if value in what else f"{name} = {value!r} is none of {list(what)}"
    if isinstance(value, str):
        return f"{name} = {value!r} is no number"
    if what.low <= value <= what.high:
        return None
    return f"{name} = {value:g} lies outside {what.low:g} to {what.high:g}"


def fitting(space: SearchSpace, values: Mapping[str, Any]) -> Mapping[str, Any]:
    """Those of the values that are searched in this space, and lie in it."""
    values = flat(values)
    return {
        name: values[name]
        for name in space.searched
        if name in values and complaint(space, name, values[name]) is None
    }


def suggest_config(
    space: SearchSpace, trial: optuna.Trial, *, seed: int, recipe: Mapping[str, Any] | None
) -> TrainConfig:
    """The trial's config: what Optuna proposes, or the recipe that the trial was made with.

    What of a recipe lies in the space becomes the trial's parameters, for samplers to learn from.
    """
    if recipe is None:
        return space.suggest(trial, seed=seed)
    inside = fitting(space, recipe)
    SearchSpace(fields={name: space.fields[name] for name in inside}).suggest(trial, seed=seed)
    return TrainConfig.from_dict({**recipe, "epochs": space.fields["epochs"], "seed": seed})


def check_room(points: Sequence[StartingPoint], *, num_there: int, budget: int) -> None:
    """Raises UsageError if so many points don't fit the budget of trials beside those there are."""
    if num_there + len(points) > budget:
        raise UsageError(
            f"{len(points)} starting points don't fit a budget of {budget} trials, of which "
            f"{num_there} are there: give --trials {num_there + len(points)} or more"
        )


def add_points(
    database: Database, record: StudyRecord, points: Sequence[StartingPoint], *, budget: int
) -> None:
    """Have the study's workers try them next, but for those that they have tried.

    budget: trials that the study may have, these included. Raises UsageError if it has no room.
    """
    study = snapshot(database, record.study_id)
    there = [trial for trial in study.trials if trial.state != "FAIL"]
    known = {trial.attributes.get(KEY) for trial in there}
    new = {point.key: point for point in points if point.key not in known}
    if not new:
        return
    check_room(list(new.values()), num_there=len(there), budget=budget)
    add_starting_points(
        database,
        record,
        {key: point.attributes for key, point in new.items()},
        params={key: point.params for key, point in new.items()},
    )
