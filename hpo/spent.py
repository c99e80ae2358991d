"""Where a trial's seconds go: training, and what stands beside it."""

import contextlib
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeVar, get_args

from trainer.reports import ReportValues

Part = Literal["between", "setup", "training", "evaluation", "checkpoints", "database"]
PARTS: tuple[Part, ...] = get_args(Part)
"""between: since the worker's last trial (its first: since the worker began, so with the data).
setup: suggesting, the probe of speed and memory, the model, what a checkpoint restores.
"""

Report = TypeVar("Report", bound=ReportValues)


@dataclass(kw_only=True)
class Spent:
    """Seconds of one attempt at a trial, by what they were spent on."""

    worker_id: str
    since: float = field(default_factory=time.perf_counter)
    """When the worker was done with what came before."""
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(PARTS, 0.0))

    def begin(self) -> None:
        """The trial begins now."""
        self.seconds["between"] = time.perf_counter() - self.since

    @contextlib.contextmanager
    def on(self, part: Part) -> Iterator[None]:
        """Count what is done in here; it stands in no other."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[part] += time.perf_counter() - started

    def reports(
        self,
        reports: Generator[Report, None, None],
        history: Sequence[Mapping[str, Any]],
        *,
        seconds_before: float,
    ) -> Iterator[Report]:
        """The reports as they come, their seconds counted.

        history: of earlier attempts, which spent seconds_before. What is counted meanwhile on
        another part, as checkpoints within an epoch are, is no set-up.
        """
        before = seconds_before
        images = history[-1]["images_seen"] if history else 0
        while True:
            started, elsewhere = time.perf_counter(), sum(self.seconds.values())
            report = next(reports, None)
            taken = time.perf_counter() - started - (sum(self.seconds.values()) - elsewhere)
            if report is None:
                self.seconds["setup"] += taken
                return
            stepped, trained = report.seconds - before, report.images_seen - images
            training = min(stepped, trained / report.images_per_second)
            self.seconds["training"] += training
            self.seconds["evaluation"] += stepped - training
            self.seconds["setup"] += max(0.0, taken - stepped)
            before, images = report.seconds, report.images_seen
            yield report

    def to_json(self) -> dict[str, Any]:
        """To be kept with the trial; `other` is what none of the parts has."""
        other = time.perf_counter() - self.since - sum(self.seconds.values())
        seconds = {**self.seconds, "other": max(0.0, other)}
        return {"worker": self.worker_id} | {part: round(seconds[part], 4) for part in seconds}
