"""How a study searches, as `hpo launch` was told: sampler, pruner, and what is tried first."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hpo.errors import UsageError
from hpo.points import parse_point
from hpo.pruners import PRUNERS
from hpo.samplers import SAMPLERS
from hpo.settings import parse_settings
from trainer.config import unknown_name


@dataclass(frozen=True, kw_only=True)
class SearchOptions:
    """None, or empty, is what was left out. Raises UsageError or ConfigError."""

    sampler: str | None = None
    pruner: str | None = None
    tries: tuple[str, ...] = ()
    """Starting points: FIELD=VALUE,... or a name."""
    earlier: str | None = None
    """A study whose best trials are starting points."""
    settings: tuple[str, ...] = ()
    """FIELD=VALUE, for all trials."""

    def __post_init__(self) -> None:
        if self.sampler is not None and self.sampler not in SAMPLERS:
            raise UsageError(unknown_name("sampler", self.sampler, SAMPLERS))
        if self.pruner is not None and self.pruner not in PRUNERS:
            raise UsageError(unknown_name("pruner", self.pruner, PRUNERS))
        self.points()
        self.fixed()

    def points(self) -> list[str | Mapping[str, Any]]:
        """What is to be tried: names of recipes, or values of fields."""
        return [parse_point(text) for text in self.tries]

    def fixed(self) -> Mapping[str, Any]:
        """Fields that have one value in all trials."""
        return parse_settings("--set", self.settings)

    def given(self) -> dict[str, Any]:
        """What a study's spec is compared with; None is what was left out."""
        return {"sampler": self.sampler, "pruner": self.pruner, "from": self.earlier}
