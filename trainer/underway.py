"""Underway: how far a leg of a training is between two of its optimizer steps."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import torch
from torch import Tensor

from trainer.config import TrainConfig
from trainer.seeds import random_states, seeded_generator, set_random_states


@dataclass(kw_only=True, eq=False)
class Underway:
    """All that changes within a leg beside weights, averages and the optimizer's state.

    torch's own random state, from which dropout and stochastic depth draw, is the leg's while it
    runs (trainer.seeds.own_randomness), and is read when a checkpoint is made.
    """

    next_batch: int
    """Of the epoch."""
    total_loss: Tensor
    """Of the leg's images so far, 0-d, on the device."""
    generator: torch.Generator
    """Of augmentation and mixing."""
    seconds: float = 0.0
    """Spent on the leg so far, by all attempts together."""
    random: Mapping[str, Tensor] = field(default_factory=dict)
    """torch's own random state where a checkpoint was made, by kind of device, until go_on."""
    since: float = 0.0
    """time.perf_counter() when the leg began, had it run without a pause."""

    @classmethod
    def begin(cls, config: TrainConfig, *, step: int, first_batch: int, device: str) -> Self:
        """A leg's first moment. step: the leg's."""
        return cls(
            next_batch=first_batch,
            total_loss=torch.zeros((), device=device),
            generator=seeded_generator("augment", config.seed, step),
        )

    @classmethod
    def from_dict(cls, saved: Mapping[str, Any], *, device: str) -> Self:
        """Of to_dict().

        Raises AttributeError, KeyError, TypeError, ValueError or RuntimeError if it is none.
        """
        generator = torch.Generator()
        generator.set_state(saved["generator"])
        for kind in saved["random"].keys() & {"cpu", torch.device(device).type}:
            torch.Generator(kind).set_state(saved["random"][kind])  # refuses what is no state
        return cls(
            next_batch=int(saved["next_batch"]),
            total_loss=saved["total_loss"].to(device),
            generator=generator,
            seconds=float(saved["seconds"]),
            random=dict(saved["random"]),
        )

    def to_dict(self, device: str) -> dict[str, Any]:
        """Tensors and plain values. device: the training's; call it where the leg runs."""
        return {
            "next_batch": self.next_batch,
            "total_loss": self.total_loss,
            "generator": self.generator.get_state(),
            "seconds": self.seconds,
            "random": {**(self.random or random_states(device))},
        }

    def go_on(self, device: str) -> None:
        """Run, with torch's own random state as it was; inside of the leg's own_randomness."""
        set_random_states(self.random, device=device)
        self.random = {}
        self.start_clock()

    def start_clock(self) -> None:
        """From here on the leg takes time."""
        self.since = time.perf_counter() - self.seconds

    def stop_clock(self) -> float:
        """Seconds spent on the leg so far."""
        self.seconds = time.perf_counter() - self.since
        return self.seconds
