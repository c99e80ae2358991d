"""What `hpo launch` and `hpo doctor` were told, checked as far as that needs no data."""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from hpo.errors import UsageError
from hpo.limits import Limits
from hpo.search import SearchOptions
from hpo.space import SearchSpace, read_space
from hpo.spec import check_folds, check_precision, check_study_name
from trainer.config import MODULE, Objective, unknown_name
from trainer.data.options import DataOptions


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """What `hpo launch` was told; None is what was left out."""

    study: str | None = None
    data: str | None = None
    image_size: int | None = None
    max_broken: float | None = None
    max_memory_bytes: int | None = None
    trials: int | None = None
    epochs: int | None = None
    space: Path | None = None
    backbones: str | None = None
    modules: str | None = None
    """LightningModules to choose among, beside the backbones."""
    weights: Path | None = None
    seed: int | None = None
    folds: int | None = None
    objective: Objective | None = None
    precision: str | None = None
    workers: str = "auto"
    devices: str | None = None
    timeout_seconds: float | None = None
    limits: Limits = field(default_factory=Limits)
    search: SearchOptions = field(default_factory=SearchOptions)

    def __post_init__(self) -> None:
        if self.trials is not None and not 1 <= self.trials <= 1_000_000:
            raise UsageError(f"--trials must be between 1 and 1000000, got {self.trials}")
        if self.epochs is not None and not 1 <= self.epochs <= 100_000:
            raise UsageError(f"--epochs must be between 1 and 100000, got {self.epochs}")
        if self.seed is not None and not 0 <= self.seed < 2**31:
            raise UsageError(f"--seed must be >= 0 and below 2147483648, got {self.seed}")
        check_folds(self.folds)
        if self.objective is not None and self.objective not in get_args(Objective):
            raise UsageError(unknown_name("objective", self.objective, get_args(Objective)))
        if self.precision is not None:
            check_precision(self.precision)
        if self.study is not None:
            check_study_name(self.study)
        DataOptions(**self.given_data_options())

    def given_data_options(self) -> dict[str, Any]:
        """Fields of DataOptions that an option sets."""
        names = [field.name for field in dataclasses.fields(DataOptions)]
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    def given_fields(self) -> dict[str, Any]:
        """Fields of the space that an option or the space file sets."""
        fields = dict(read_space(self.space).fields) if self.space else {}
        names = [*_listed(self.backbones), *(MODULE + name for name in _listed(self.modules))]
        if names:
            fields["backbone"] = SearchSpace.from_json({"backbone": names}).fields["backbone"]
        if self.epochs is not None:
            fields["epochs"] = self.epochs
        if self.weights is not None:
            fields["weights"] = str(self.weights)
        fields |= self.search.fixed()
        if "weights" in fields:
            fields["weights"] = _absolute(fields["weights"])
        return fields


def _listed(names: str | None) -> list[str]:
    return [] if names is None else [name.strip() for name in names.split(",")]


def _absolute(paths: str | tuple[str, ...]) -> str | tuple[str, ...]:
    """Workers run in other folders; "" stays: no weights."""
    if isinstance(paths, tuple):
        return tuple(str(_absolute(path)) for path in paths)
    return os.path.abspath(os.path.expanduser(paths)) if paths else ""
