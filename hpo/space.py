"""SearchSpace: which fields of TrainConfig are searched, and among what."""

import dataclasses
import math
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from trainer.conditions import idle_because
from trainer.config import ARGUMENT, ConfigError, TrainConfig, check_balance, flat, unknown_name
from trainer.reading import read_small

_FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
_NEVER_SEARCHED = {
    "epochs": "rungs compare trials by the epochs that they have trained",
    "seed": "a seed is not a setting that one can choose well",
}


@dataclass(frozen=True, kw_only=True)
class Range:
    """A number between `low` and `high`, both included."""

    low: float
    high: float
    log: bool = False

    def __post_init__(self) -> None:
        for end in (self.low, self.high):
            if type(end) not in (int, float) or not math.isfinite(end):
                raise ConfigError(f"a range's ends must be numbers, got {end!r}")
        if self.low > self.high:
            raise ConfigError(f"low = {self.low} is above high = {self.high}")
        if not isinstance(self.log, bool):
            raise ConfigError(f"log must be true or false, got {self.log!r}")
        if self.log and self.low <= 0:
            raise ConfigError(f"a logarithmic range must lie above 0, got low = {self.low}")


@dataclass(frozen=True, kw_only=True)
class SearchSpace:
    """field of TrainConfig -> Range, tuple of choices, or the one value it has.

    An argument of a LightningModule is a field by itself, module.NAME.
    Raises ConfigError if a field is unknown, can't be searched, or would leave its range.
    """

    fields: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name, what in self.fields.items():
            if name not in _FIELDS and not name.startswith(ARGUMENT):
                raise ConfigError(unknown_name("field", name, _FIELDS))
            if name in _NEVER_SEARCHED and isinstance(what, Range | tuple):
                raise ConfigError(f"{name} can't be searched: {_NEVER_SEARCHED[name]}")
            for value in _extremes(what):
                try:
                    TrainConfig.from_dict({name: value})
                except ConfigError as error:
                    raise ConfigError(f"space: {error}") from error
            if isinstance(what, Range) and _type(name, what) not in (int, float):
                raise ConfigError(f"space: {name} takes a list of choices, not a range")

    def check_together(self) -> None:
        """Raises ConfigError where a value of one field can't stand beside one of another."""
        if "smote" not in self.choices("balance"):
            return
        for name, what in self.fields.items():
            for value in _extremes(what):
                given = {"trainable": "head", name: value, "balance": "smote"}
                check_balance(TrainConfig.from_dict(given))
        if "trainable" not in self.fields:
            check_balance(TrainConfig(balance="smote"))

    @property
    def searched(self) -> tuple[str, ...]:
        """Names of the fields that differ between trials."""
        return tuple(name for name, what in self.fields.items() if isinstance(what, Range | tuple))

    def idle(self) -> list[str]:
        """Why fields of this space never count, in words; default values are left out."""
        known = {field.name: field.default for field in _FIELDS.values()} | dict(self.fields)
        reasons = [idle_because(name, known) for name in self.fields]
        return [reason for reason in reasons if reason is not None]

    def largest(self, name: str) -> Any:
        """The largest value that a numeric field can take."""
        return max(self.choices(name))

    def choices(self, name: str) -> Sequence[Any]:
        """The values that a field which is no range can take."""
        return _extremes(self.fields[name] if name in self.fields else _FIELDS[name].default)

    def middle(self) -> dict[str, Any]:
        """Each field with a value from the middle of what it may be."""
        return {name: _middle(what) for name, what in self.fields.items()}

    def without(self, names: Collection[str]) -> "SearchSpace":
        """This space but for some fields."""
        return SearchSpace(fields={n: what for n, what in self.fields.items() if n not in names})

    def replace(self, **fields: Any) -> "SearchSpace":
        """This space with some fields as given."""
        return SearchSpace(fields={**self.fields, **fields})

    def suggest(self, trial: optuna.Trial, *, seed: int) -> TrainConfig:
        """What Optuna proposes for this trial; a trial that has its values keeps them."""
        values: dict[str, Any] = {"seed": seed}
        for name, what in self.fields.items():
            if isinstance(what, tuple):
                values[name] = trial.suggest_categorical(name, what)
            elif not isinstance(what, Range):
                values[name] = what
            elif _type(name, what) is int:
                values[name] = trial.suggest_int(name, int(what.low), int(what.high), log=what.log)
            else:
                values[name] = trial.suggest_float(name, what.low, what.high, log=what.log)
        return TrainConfig.from_dict(values)

    def distributions(self) -> dict[str, BaseDistribution]:
        """Those that `suggest` asks Optuna for."""
        found: dict[str, BaseDistribution] = {}
        for name in self.searched:
            what = self.fields[name]
            if isinstance(what, tuple):
                found[name] = CategoricalDistribution(what)
            elif _type(name, what) is int:
                found[name] = IntDistribution(int(what.low), int(what.high), log=what.log)
            else:
                found[name] = FloatDistribution(what.low, what.high, log=what.log)
        return found

    def to_json(self) -> dict[str, Any]:
        """In the form of a space file."""
        return {name: _plain(what) for name, what in self.fields.items()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "SearchSpace":
        """From the form of a space file. Raises ConfigError."""
        return cls(fields={name: _parse(name, what) for name, what in flat(values).items()})


def read_space(path: Path) -> SearchSpace:
    """The table [space] of a TOML file. Raises ConfigError, with the file's name."""
    try:
        content = tomllib.loads(read_small(path).decode("utf-8-sig"))  # some editors begin so
    except OSError as error:
        raise ConfigError(f"can't read the space file {path}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is no text in UTF-8: save it as that") from error
    except RecursionError as error:
        raise ConfigError(f"{path} is no TOML of ours: it is nested too deep") from error
    except ValueError as error:  # a number of 5,000 digits is one, too
        raise ConfigError(f"{path} is no TOML: {error}") from error
    table = content.get("space")
    if not isinstance(table, dict) or not table:
        raise ConfigError(f"{path} has no table [space] with fields in it")
    try:
        return SearchSpace.from_json(table)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def default_space(
    *, input_size: Sequence[int], num_train: int, flips: bool, num_cores: int | None
) -> SearchSpace:
    """A space for images of this size (C, H, W), on GPUs or (with `num_cores`) on a CPU's cores.

    Few dimensions, since fifty trials can't search many. Epochs come from the number of training
    images: a CPU is given about 600,000 images a trial to train on, a GPU two million. Fifty trials
    are to end within about an hour, also where two cores share 50,000 images: resnet20, three
    times as slow as resnet8, is for more cores or fewer images.
    """
    side = max(input_size[1:])
    if num_cores is None:
        small = ("resnet20", "resnet18", "efficientnet_b0")
        backbones: tuple[str, ...] = (
            small if side <= 64 else ("resnet18", "resnet50", "efficientnet_b0")
        )
        images, least, most = 2_000_000, 10, 60
    else:
        backbones = ("smallcnn", "resnet8", "resnet20")
        if side > 64:
            backbones = ("mobilenet_v3_small", "resnet18")
        elif side <= 16 or num_train > 20_000 * num_cores:
            backbones = backbones[:2]
        images, least, most = 600_000, 5, 30
    return SearchSpace(
        fields={
            "lr": Range(low=3e-4, high=3e-2, log=True),
            "batch_size": (32, 64, 128) if num_train < 5_000 else (64, 128, 256),
            "backbone": backbones,
            "weight_decay": Range(low=1e-4, high=1e-1, log=True),
            "epochs": min(most, max(least, images // max(1, num_train))),
            "optimizer": "adamw",
            "schedule": "cosine",
            "flip": flips,
            "translate": max(1, side // 16),
        }
    )


def _parse(name: str, what: Any) -> Any:
    if isinstance(what, Mapping):
        for end in what.values():
            _check_value(name, end)
        try:
            return Range(**what)
        except TypeError as error:
            raise ConfigError(
                f"{name}: a range is {{ low = ..., high = ..., log = true }}, got {dict(what)}"
            ) from error
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from error
    if isinstance(what, list | tuple):
        if not what:
            raise ConfigError(f"{name}: a list of choices can't be empty")
        for choice in what:
            _check_value(name, choice)
        if len({(type(choice), choice) for choice in what}) != len(what):
            raise ConfigError(f"{name}: a choice stands twice in {list(what)}")
        return tuple(what)
    _check_value(name, what)
    return what


def _check_value(name: str, value: Any) -> None:
    """Raises ConfigError for what TOML has beside: dates, tables in lists, numbers without end."""
    if not isinstance(value, bool | int | float | str):
        raise ConfigError(
            f"{name} must be true, false, a number or a word, got {str(value)[:80]!r}"
        )
    if isinstance(value, int) and abs(value) >= 2**63:
        raise ConfigError(f"{name}: a whole number has 64 bits, got one of {value.bit_length()}")


def _plain(what: Any) -> Any:
    if isinstance(what, Range):
        return dataclasses.asdict(what)
    return list(what) if isinstance(what, tuple) else what


def _type(name: str, what: Range) -> Any:
    """Of a field; of an argument whose range's ends are whole numbers, int."""
    if name in _FIELDS:
        return _FIELDS[name].type
    return int if isinstance(what.low, int) and isinstance(what.high, int) else float


def _middle(what: Any) -> Any:
    if isinstance(what, Range):
        middle = (what.low * what.high) ** 0.5 if what.log else (what.low + what.high) / 2
        return int(middle) if isinstance(what.low, int) else middle
    return what[len(what) // 2] if isinstance(what, tuple) else what


def _extremes(what: Any) -> Sequence[Any]:
    if isinstance(what, Range):
        return (what.low, what.high)
    return what if isinstance(what, tuple) else (what,)
