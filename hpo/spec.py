"""StudySpec: all that a worker needs to know of a study, as JSON."""

import dataclasses
import importlib.metadata
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from hpo.errors import UsageError
from hpo.import_path import append_folders
from hpo.limits import Limits
from hpo.space import SearchSpace
from trainer.config import MODULE, ConfigError, Objective, Precision, TrainConfig, unknown_name
from trainer.data.options import DEFAULT_OPTIONS, DataOptions, Progress, no_progress

if TYPE_CHECKING:
    from trainer.data.dataset import ImageDataset

VERSION = 3
MOST_FOLDS = 20
PRECISIONS = ("auto", "fp32", "bf16")


def program_versions() -> dict[str, str]:
    """Of what decides a trial's course: workers of one study must agree on them."""
    return {
        name: importlib.metadata.version(distribution)
        for name, distribution in (("hpo", "hpo-vision"), ("optuna", "optuna"))
    }


def can_work_together(made_with: Any, here: Any) -> bool:
    """Whether a study that was made with one version goes on under the other.

    Releases that differ in their patch number only do: they change neither what a trial's config
    means nor how it is trained.
    """
    return series(made_with) == series(here)


def series(version: Any) -> str:
    """Of versions that can work together: 0.1.* of 0.1.7; the version itself if it has no dots."""
    parts = str(version).split(".")
    return f"{'.'.join(parts[:2])}.*" if len(parts) > 2 else str(version)


@dataclass(frozen=True, kw_only=True)
class StudySpec:
    """The frozen description of a study; the budget, which may grow, is not part of it."""

    data: str
    """A source's name, or an absolute path."""
    fingerprint: str
    """Of the data; a worker that finds other data under the same name refuses."""
    space: SearchSpace
    seed: int
    first_rung: int
    """The step at which trials are judged for the first time."""
    objective: Objective = "accuracy"
    """The validation value that trials are judged by."""
    limits: Limits = field(default_factory=Limits)
    data_options: DataOptions = DEFAULT_OPTIONS
    """How pictures are read: workers read them as the launcher did."""
    import_paths: tuple[str, ...] = ()
    """Folders of the user's own networks and DataModules, in which workers look for them."""
    weights: Mapping[str, str] = field(default_factory=dict)
    """sha256 of each file or export that trials start from, by its path."""
    folds: int | None = None
    """Parts of train and validation, each of which validates a training on the others; None is one
    validation split."""
    sampler: str = "tpe"
    """Who proposes what trials are to be: a key of hpo.samplers.SAMPLERS."""
    pruner: str = "rungs"
    """Who decides whether a trial goes on: a key of hpo.pruners.PRUNERS."""
    earlier: str | None = None
    """The study whose best trials this one begins with."""
    precision: str = "auto"
    """Of all trainings: fp32, bf16, or auto, the fastest that is measured; a study goes by what its
    first trial on such a machine has measured."""
    eta: int = 4
    """One in `eta` goes on at each rung."""
    lease_seconds: float = 30.0
    stall_seconds: float = 300.0
    """Without an optimizer step, after which a worker counts as hanging."""
    version: int = VERSION
    versions: Mapping[str, str] = field(default_factory=program_versions)

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UsageError(f"--seed must be >= 0, got {self.seed}")
        check_folds(self.folds)
        check_precision(self.precision)
        if not 0 < self.lease_seconds <= 3600:
            raise UsageError(f"a lease lasts up to an hour, got {self.lease_seconds} s")

    @property
    def given_precision(self) -> Precision | None:
        """The precision that the user has chosen, if it is the user's choice."""
        return None if self.precision == "auto" else cast(Precision, self.precision)

    @property
    def epochs(self) -> int:
        """Of a trial that is not stopped."""
        return int(self.space.fields["epochs"])

    def load_data(
        self, *, looks_anew: bool = False, progress: Progress = no_progress
    ) -> "ImageDataset":
        """The study's data. Raises DataError if it can't be read, UsageError if it is another.

        What an earlier process has read and the cache holds is the study's, and neither its files
        are listed nor a DataModule's code is run. looks_anew: files are, so that data that changed
        or vanished are found out. Weights that trials start from are looked at, too: ConfigError if
        they can't be read. progress: is told how far the reading of pictures is.
        """
        from trainer.data.registry import load
        from trainer.weights import digest

        for path, known in self.weights.items():
            if digest(Path(path)) != known:
                raise UsageError(f"weights {path} are not those that the study was made with")
        trusts = not looks_anew or self.data.startswith(MODULE)  # whose items may take minutes
        data = load(
            self.data,
            seed=self.seed,
            options=self.data_options,
            progress=progress,
            fingerprint=self.fingerprint if trusts else None,
        )
        if data.fingerprint != self.fingerprint:
            raise UsageError(
                f"{self.data} is not the data that the study was made with: its fingerprint differs"
            )
        return data

    def trial_config(self, values: Mapping[str, Any]) -> TrainConfig:
        """The config that stands with a trial of this study.

        Attributes of a trial are written by whoever can write to the database, and a network of the
        user's own is code that runs here. So only networks and weights that the study was launched
        with are taken. Raises ConfigError for others.
        """
        config = TrainConfig.from_dict(values)
        if ":" in config.backbone and config.backbone not in self.space.choices("backbone"):
            raise ConfigError(
                f"backbone {config.backbone} stands with a trial, but the study was not launched "
                "with it: it is not loaded"
            )
        if config.weights and config.weights not in self.weights:
            raise ConfigError(
                f"weights {config.weights} stand with a trial, but the study was not launched with "
                "them: they are not loaded"
            )
        return config

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        values = dataclasses.asdict(self)
        return {**values, "space": self.space.to_json(), "versions": dict(self.versions)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "StudySpec":
        """Raises UsageError if the study was made by another version of this program.

        Python looks for modules in the study's import_paths from then on.
        """
        found = {"spec": values.get("version"), **values.get("versions", {})}
        wanted = {"spec": VERSION, **program_versions()}
        unknown = values.keys() - {each.name for each in dataclasses.fields(cls)}
        for name, version in wanted.items():
            if not can_work_together(found.get(name), version):
                raise UsageError(
                    f"the study was made with {name} {found.get(name)}, here is {version}: use "
                    f"{name} {series(found.get(name))}, or another study"
                )
        if unknown:
            raise UsageError(
                f"the study was made with a later hpo {found.get('hpo')}, which knows of "
                f"{', '.join(sorted(unknown))}: update hpo here, or use another study"
            )
        import_paths = tuple(values.get("import_paths", ()))
        append_folders(import_paths)  # the space's own networks are looked at while it is read
        parsed = {
            "import_paths": import_paths,
            "space": SearchSpace.from_json(values["space"]),
            "limits": Limits(**values["limits"]),
            "data_options": DataOptions.from_dict(values.get("data_options", {})),
        }
        return cls(**{**values, **parsed})

    def differences(self, given: Mapping[str, Any]) -> list[str]:
        """Where options differ from this spec, in words.

        given: `data`, `seed`, `folds`, `objective`, `sampler`, `pruner`, `from`, limits, fields of
        DataOptions and of the space; what is not in it is not compared.
        """
        mine = {
            **self.space.fields,
            **self.data_options.to_dict(),
            **self.limits.given(),
            "data": self.data,
            "seed": self.seed,
            "folds": self.folds,
            "objective": self.objective,
            "sampler": self.sampler,
            "pruner": self.pruner,
            "precision": self.precision,
            "from": self.earlier,
        }
        return [
            f"{name} is {mine.get(name)!r} there and {value!r} here"
            for name, value in given.items()
            if mine.get(name) != value
        ]


def check_folds(folds: int | None) -> None:
    """Raises UsageError if there can't be so many."""
    if folds is not None and not 2 <= folds <= MOST_FOLDS:
        raise UsageError(f"--folds must be between 2 and {MOST_FOLDS}, got {folds}")


def check_precision(precision: str) -> None:
    """Raises UsageError if there is no such precision."""
    if precision not in PRECISIONS:
        raise UsageError(unknown_name("precision", precision, PRECISIONS))


def check_study_name(name: str) -> str:
    """The name, if it is one of letters, digits, '.', '_' and '-'. Raises UsageError."""
    if not re.fullmatch(r"[A-Za-z0-9._-]{1,64}", name):
        raise UsageError(f"a study's name has 1 to 64 of A-Z a-z 0-9 . _ -, got {name[:80]!r}")
    return name
