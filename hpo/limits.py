"""Deployment limits: what a model may weigh, known before an epoch is spent on it."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from hpo.errors import UsageError

if TYPE_CHECKING:
    from trainer.footprint import Footprint


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The largest model that may be exported; None is no limit. Raises UsageError."""

    max_params: float | None = None
    max_megabytes: float | None = None
    """Of float32 weights, 10**6 bytes."""
    max_latency_ms: float | None = None
    """Of one image on the worker's device."""

    def __post_init__(self) -> None:
        for name, limit in self.given().items():
            if not 0 < limit < math.inf:
                raise UsageError(f"{option(name)} must be above 0, got {limit:g}")

    def given(self) -> dict[str, float]:
        """The limits that there are, by the field's name."""
        return {
            name: limit for name, limit in dataclasses.asdict(self).items() if limit is not None
        }

    def excess(self, footprint: "Footprint") -> dict[str, float]:
        """By how much of itself each limit is broken: constraints for Optuna, <= 0 is kept."""
        measured = _measured(footprint)
        return {
            name: measured[name] / limit - 1
            for name, limit in self.given().items()
            if measured[name] is not None
        }

    def complaint(self, footprint: "Footprint") -> str | None:
        """Which limits are broken, in words; None if all are kept."""
        measured, given = _measured(footprint), self.given()
        broken = [
            f"{_text(measured[name])} {_UNITS[name]}, above {option(name)} {_text(given[name])}"
            for name, excess in self.excess(footprint).items()
            if excess > 0
        ]
        return "; ".join(broken) or None


def _measured(footprint: "Footprint") -> Mapping[str, Any]:
    return {
        "max_params": footprint.num_params,
        "max_megabytes": footprint.megabytes,
        "max_latency_ms": footprint.latency_ms,
    }


def _text(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def option(name: str) -> str:
    """The command line's word for a field."""
    return f"--{name.replace('_', '-')}"


_UNITS = {"max_params": "parameters", "max_megabytes": "MB", "max_latency_ms": "ms"}
