"""What may be changed through optuna-dashboard: notes, and whole studies by deleting them.

All else that it can write belongs to the leases. A worker trains what a trial's attributes say, and
reads their own states; who could write those through a browser would choose what runs on other
people's machines, or end their trials. The rules hang on the app's own routes, so that the app and
the rules can't understand one address differently. A route that is not listed here is refused.
"""

import importlib.util
import json
from collections.abc import Callable, Mapping
from typing import Any

import bottle
import optuna

from hpo.door import READING

_REFUSED = (
    "the dashboard only writes notes and deletes studies: the rest of a study is changed by hpo's "
    "commands"
)
_LARGEST = 2**31 - 1
"""A number of a study or trial in Postgres."""

Body = Mapping[str, Any]


def _note(body: Body) -> str | None:
    version = body.get("version")
    if type(version) is not int or not 0 < version <= _LARGEST:
        return "`version` must be a whole number > 0"
    return None if isinstance(body.get("body"), str) else "`body` must be a text"


def _deletion(body: Body) -> str | None:
    if isinstance(body.get("remove_associated_artifacts", False), bool):
        return None
    return "`remove_associated_artifacts` must be true or false"


CHANGES: Mapping[tuple[str, str], Callable[[Body], str | None]] = {
    ("DELETE", "/api/studies/<study_id:int>"): _deletion,
    ("PUT", "/api/studies/<study_id:int>/note"): _note,
    ("PUT", "/api/studies/<study_id:int>/<trial_id:int>/note"): _note,
}
"""Changes that are let through, by method and route: what is wrong with their body, or None."""


class Rules:
    """A plugin of Bottle: allows or refuses each route's requests, and answers bad input by 400.

    The app itself answers bad input by 500, as if something of ours were broken.
    """

    name, api = "hpo", 2

    def __init__(self, storage: optuna.storages.BaseStorage) -> None:
        """storage: the one that the app has."""
        self._storage = storage

    def apply(self, callback: Callable[..., Any], route: Any) -> Callable[..., Any]:
        """Bottle asks for this once a route: what is to be called in the callback's place."""
        reads = route.method in READING
        wrong = CHANGES.get((route.method, route.rule))

        def ruled(**found: Any) -> Any:
            if not reads and wrong is None:
                return _problem(403, _REFUSED)
            if not all(0 <= value <= _LARGEST for value in found.values() if type(value) is int):
                return _problem(400, "that is no number of a study or trial")
            problem = self._wrong_in_reading(route.rule, found) if reads else None
            if wrong is not None:
                problem = self._wrong_in_change(found, wrong)
            return callback(**found) if problem is None else problem

        return ruled

    def _wrong_in_reading(self, rule: str, found: Mapping[str, Any]) -> bottle.HTTPResponse | None:
        after = bottle.request.params.get("after", "0")
        if not (after.isdecimal() and len(after) < 10):
            return _problem(400, "`after` must be a whole number >= 0")
        if "/plot/" not in rule:
            return None
        if importlib.util.find_spec("plotly") is None:
            return _problem(404, "plots need plotly, which is not installed here")
        return self._missing(found)

    def _wrong_in_change(
        self, found: Mapping[str, Any], wrong: Callable[[Body], str | None]
    ) -> bottle.HTTPResponse | None:
        body = _json_body()
        if not isinstance(body, dict):
            return _problem(400, "the body must be a JSON object, as application/json")
        words = wrong(body)
        return self._missing(found) if words is None else _problem(400, words)

    def _missing(self, found: Mapping[str, Any]) -> bottle.HTTPResponse | None:
        """The answer where the study, or the trial in it, isn't there."""
        try:
            trials = self._storage.get_all_trials(found["study_id"], deepcopy=False)
        except KeyError:
            return _problem(404, "there is no such study")
        wanted = found.get("trial_id")
        if wanted is None or any(trial._trial_id == wanted for trial in trials):
            return None
        return _problem(404, "there is no such trial in this study")


def _json_body() -> Any:
    """What the request brings: {} for nothing, None for what is no JSON."""
    if bottle.request.content_length <= 0:
        return {}
    try:
        return bottle.request.json
    except (bottle.HTTPError, RecursionError):
        return None


def _problem(status: int, reason: str) -> bottle.HTTPResponse:
    """In the form in which the app's pages expect it, which show the reason."""
    headers = {"Content-Type": "application/json"}
    return bottle.HTTPResponse(json.dumps({"reason": reason}), status=status, headers=headers)
