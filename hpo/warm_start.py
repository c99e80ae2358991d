"""What a study tries first: the user's own points, and the best trials of an earlier study."""

import logging
from collections.abc import Sequence

from hpo.errors import NoTrialError, UsageError
from hpo.points import StartingPoint, fitting, starting_point
from hpo.search import SearchOptions
from hpo.space import SearchSpace
from hpo.spec import StudySpec
from hpo.status import ranked_trials
from storage.database import Database
from storage.snapshots import snapshot
from storage.studies import find_studies

logger = logging.getLogger(__name__)
MOST_EARLIER = 5
"""Trials of an earlier study that a new one begins with."""


def starting_points(
    database: Database, study: str, spec: StudySpec, options: SearchOptions
) -> list[StartingPoint]:
    """What the study is to try first, the user's own points before those of an earlier study.

    Raises UsageError, ConfigError, or NoTrialError if the earlier study has nothing to begin with.
    """
    if spec.sampler == "grid" and (options.tries or options.earlier):
        raise UsageError("--sampler grid tries every combination: leave out --try and --from")
    points = [starting_point(spec.space, given) for given in options.points()]
    if options.earlier is not None:
        points += _points_of(database, options.earlier, study, spec.space)
    return points


def _points_of(
    database: Database, earlier: str, study: str, space: SearchSpace
) -> list[StartingPoint]:
    if earlier == study:
        raise UsageError(f"--from {earlier}: a study can't begin from itself, give another --study")
    studies = {record.name: record for record in find_studies(database)}
    if earlier not in studies:
        raise UsageError(
            f"--from: no study {earlier[:80]!r} here: there is {', '.join(studies) or 'none'}"
        )
    points: list[StartingPoint] = []
    left_out: set[str] = set()
    for trial in ranked_trials(snapshot(database, studies[earlier].study_id).trials):
        config = trial.attributes.get("config", {})
        params = fitting(space, config)
        if not params or any(point.params == params for point in points):
            continue
        left_out |= {name for name in space.searched if name not in params}
        # by its place, not its number: what is enqueued stays so when the earlier study goes on
        key = f"from {earlier}/{len(points) + 1}"
        points.append(StartingPoint(key=key, params=params))
        if len(points) == MOST_EARLIER:
            break
    if not points:
        raise NoTrialError(f"--from {earlier}: none of its trials can be tried in this space")
    _say(earlier, len(points), sorted(left_out))
    return points


def _say(earlier: str, num_points: int, left_out: Sequence[str]) -> None:
    sampled = f"; {', '.join(left_out)}: sampled where its value lies outside" if left_out else ""
    logger.warning("begins with the best %d trials of %s%s", num_points, earlier, sampled)
