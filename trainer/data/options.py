"""DataOptions: what a user may say of how pictures are read. Imports without torch."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.config import ConfigError

Progress = Callable[[str, int, int], None]
"""Is told what is done, how many of it are, and how many there are in all."""
LARGEST_SIDE = 4096


def no_progress(_what: str, _num_done: int, _num_all: int) -> None:
    """Nothing."""


@dataclass(frozen=True, kw_only=True)
class DataOptions:
    """How pictures are read. Raises ConfigError if a field is out of its range."""

    image_size: int | None = None
    """Side of the squares that pictures become, in pixels; None is by the data, 32 to 224."""
    max_broken: float = 0.01
    """The share of pictures that may be left out because they can't be used."""
    max_memory_bytes: int | None = None
    """Of pictures that a process keeps in memory at once; None leaves it to the kernel."""

    def __post_init__(self) -> None:
        size, memory = self.image_size, self.max_memory_bytes
        if size is not None and not 1 <= size <= LARGEST_SIDE:
            raise ConfigError(f"--image-size must be between 1 and {LARGEST_SIDE}, got {size}")
        if not math.isfinite(self.max_broken) or not 0 <= self.max_broken < 1:
            raise ConfigError(f"--max-broken is a share of 0 to below 1, got {self.max_broken}")
        if memory is not None and memory < 2**20:
            raise ConfigError(f"--max-memory must be at least 1M, got {memory} bytes")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "DataOptions":
        """The options of these fields."""
        return cls(**values)


DEFAULT_OPTIONS = DataOptions()
