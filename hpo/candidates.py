"""Candidates for the best: the search's first few, and what fresh seeds say of them."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from hpo.errors import UsageError
from hpo.rungs import STEPS_PER_EPOCH
from hpo.status import ranked_trials
from storage.snapshots import StudySnapshot, TrialSnapshot

MOST_SHARE = 0.5
"""Of what the search has cost: what its re-check may cost."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A trial of the search, and its config trained again in full with fresh seeds."""

    trial: TrialSnapshot
    values: tuple[float, ...] = ()
    """Value of the study's objective at the end of each re-check."""
    averages: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    """The same of averaged weights, by the average's name, in the order of `values`."""
    failures: tuple[str, ...] = ()
    """Why re-checks came to no value."""

    @property
    def search_value(self) -> float:
        """The last value that the search reported."""
        assert self.trial.value is not None
        return self.trial.value

    @property
    def mean(self) -> float | None:
        """Of the re-checks; None without any."""
        return statistics.fmean(self.values) if self.values else None

    @property
    def std(self) -> float | None:
        """Of a sample (n - 1); None for fewer than two re-checks."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    def to_json(self) -> dict[str, Any]:
        """As DESIGN's contract has it."""
        return {
            "number": self.trial.number,
            "search_value": self.search_value,
            "mean": self.mean,
            "std": self.std,
            "values": list(self.values),
        }

    def text(self) -> str:
        """For people, in a line."""
        words = [f"trial {self.trial.number}: {self.search_value:.4f} in the search"]
        if self.mean is not None:
            shown = ", ".join(f"{value:.4f}" for value in self.values)
            spread = "" if self.std is None else f", std {self.std:.4f}"
            excess = self.search_value - self.mean
            low_or_high = "high" if excess >= 0 else "low"
            words.append(
                f"{self.mean:.4f} on average with fresh seeds (n = {len(self.values)}{spread}: "
                f"{shown}), so the search's value was {abs(excess):.4f} too {low_or_high}"
            )
        words += [f"a re-check failed: {failure}" for failure in self.failures]
        return "; ".join(words)

    def best_average(self) -> str:
        """The average of weights that beat the last weights on validation; "none" if none did."""
        means = {"none": self.mean or 0.0}
        for name, values in self.averages.items():
            if len(values) == len(self.values) > 0:
                means[name] = statistics.fmean(values)
        return max(means, key=lambda name: (means[name], name == "none"))


def choose(candidates: Sequence[Candidate]) -> Candidate:
    """The best by mean; one whose re-checks failed loses to those that held up.

    candidates: at least one, in the order of the search, which decides where there is no mean.
    """
    return max(
        candidates,
        key=lambda c: (c.mean is not None, -len(c.failures), c.mean or 0.0),
    )


@dataclass(frozen=True, kw_only=True)
class RecheckPlan:
    """Which trials are trained again, and with how many seeds each (0: not at all)."""

    trials: tuple[TrialSnapshot, ...]
    num_seeds: int
    note: str | None
    """What a user should know of it, in a line."""


def plan_recheck(
    study: StudySnapshot,
    *,
    top_k: int,
    num_seeds: int,
    epochs: int,
    most_share: float = MOST_SHARE,
) -> RecheckPlan:
    """As many candidates and seeds of those wished for as `most_share` of the search's cost pays.

    Fewer of both down to two by two, then fewer seeds, then one candidate. study: with at least
    one trial to choose from. Raises UsageError for numbers that can't be.
    """
    if top_k < 1 or num_seeds < 0:
        raise UsageError(f"--top-k must be >= 1 and --seeds >= 0, got {top_k} and {num_seeds}")
    trials = ranked_trials(study.trials)[:top_k]
    if num_seeds == 0:
        note = "not re-checked: its value is a winner's, and probably too high"
        return RecheckPlan(trials=tuple(trials[:1]), num_seeds=0, note=note)
    budget = most_share * _cost_of_search(study)
    wishes = [(k, s) for k in range(1, len(trials) + 1) for s in range(1, num_seeds + 1)]
    for k, s in sorted(wishes, key=_preference, reverse=True):
        if s * sum(_cost(trial, epochs) for trial in trials[:k]) <= budget:
            fewer = (k, s) != (top_k, num_seeds)
            return RecheckPlan(
                trials=tuple(trials[:k]),
                num_seeds=s,
                note=_fewer(k, s, top_k, num_seeds, trials) if fewer else None,
            )
    note = (
        "not re-checked: one training in full would cost more than half of what the search did; "
        "its value is a winner's, and probably too high"
    )
    return RecheckPlan(trials=tuple(trials[:1]), num_seeds=0, note=note)


def pays_for_soup(
    study: StudySnapshot,
    plan: RecheckPlan,
    winner: Candidate,
    *,
    epochs: int,
    most_share: float = MOST_SHARE,
) -> bool:
    """Whether `most_share` of the search's cost pays for the plan and, once more, for the winner's
    re-checks, which is what it costs to try a soup of them."""
    planned = plan.num_seeds * sum(_cost(trial, epochs) for trial in plan.trials)
    soup = len(winner.values) * _cost(winner.trial, epochs)
    return planned + soup <= most_share * _cost_of_search(study)


def _cost_of_search(study: StudySnapshot) -> float:
    return sum(
        _cost(trial, trial.steps[-1] / STEPS_PER_EPOCH) for trial in study.trials if trial.steps
    )


def _preference(wish: tuple[int, int]) -> tuple[int, int, int, int]:
    k, s = wish
    return min(k, 2), min(s, 2), k * s, k


def _fewer(k: int, s: int, top_k: int, num_seeds: int, trials: Sequence[TrialSnapshot]) -> str:
    if k == len(trials) < top_k and s == num_seeds:
        return f"the study has {k} trials to choose from"
    return (
        f"re-checked {k} candidates with {s} seeds each instead of {top_k} with {num_seeds}: more "
        "would cost over half of what the search did"
    )


def _cost(trial: TrialSnapshot, epochs: float) -> float:
    """Of so many epochs of this trial's config, in seconds for one image an epoch."""
    return epochs / max(trial.images_per_second, 1e-9)
