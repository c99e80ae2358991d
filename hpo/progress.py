"""The live view of a study: a table on a terminal, a line every few seconds elsewhere."""

import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import TextIO

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from hpo.rungs import STEPS_PER_EPOCH
from hpo.status import best_trial, tried
from hpo.terminal import escaped, unguarded
from storage.snapshots import StudySnapshot, TrialSnapshot
from trainer.data.options import Progress

LINE_SECONDS = 5.0
_NARROWEST_TABLE = 60
"""Columns of a terminal below which a table's cells have no room for what is in them."""


class PlainConsole(Console):
    """rich's console, which moves the cursor and colours itself, but lets no words do so."""

    def __init__(self, stream: TextIO) -> None:
        super().__init__(file=unguarded(stream), markup=False, emoji=False, highlight=False)

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """All that this console shows passes here. Its own controls are segments without words."""
        for segment in super().render(renderable, options):
            if segment.control:
                yield segment
            else:
                yield Segment(escaped(segment.text, keep="\n"), segment.style)


def moves(console: Console) -> bool:
    """Whether the console can write over what it has written, as a dumb terminal can't."""
    return console.is_terminal and not console.is_dumb_terminal


class ProgressView:
    """Shows snapshots of one study as they come."""

    def __init__(
        self, name: str, *, num_epochs: int, stream: TextIO, shows_best: bool = True
    ) -> None:
        """shows_best: not where trials are trained again, whose values are no search's."""
        self._name, self._num_epochs, self._shows_best = name, num_epochs, shows_best
        self._console = PlainConsole(stream)
        self._is_live = moves(self._console)
        self._live = Live(console=self._console, auto_refresh=False, transient=True)
        self._started = time.monotonic()
        self._finished_at_start: int | None = None
        self._last_line, self._last_text = -LINE_SECONDS, ""

    def __enter__(self) -> "ProgressView":
        if self._is_live:
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._live.stop()

    def show(self, study: StudySnapshot) -> None:
        """Show the study as it is now."""
        if self._finished_at_start is None:
            self._finished_at_start = study.num_finished
        if self._is_live:
            shown: list[RenderableType] = [_words(self.line(study))]
            if self._console.width >= _NARROWEST_TABLE:
                shown.append(self._running(study))
            self._live.update(Group(*shown), refresh=True)
        elif time.monotonic() - self._last_line >= LINE_SECONDS:
            text = self.line(study)
            if text != self._last_text:
                self._console.print(_words(text), soft_wrap=True)
            self._last_line, self._last_text = time.monotonic(), text

    def line(self, study: StudySnapshot) -> str:
        """The study in one line."""
        speed = sum(worker.images_per_second for worker in study.workers)
        parts = [
            f"{self._name}: {study.num_finished}/{study.budget} trials",
            f"{study.count('RUNNING')} running",
            f"{study.count('PRUNED')} pruned",
        ]
        for state, word in (("WAITING", "waiting"), ("FAIL", "failed")):
            if study.count(state):
                parts.append(f"{study.count(state)} {word}")
        if self._shows_best:
            best = best_trial(study.trials)
            parts.append(f"best {_value(best)}" + (f" (trial {best.number})" if best else ""))
        parts.append(f"{speed:,.0f} images/s")
        left = self._seconds_left(study)
        if left is not None:
            parts.append(f"about {duration(left)} left")
        return ", ".join(parts)

    def _seconds_left(self, study: StudySnapshot) -> float | None:
        """As long as the trials that are left take at the pace since the start."""
        done = study.num_finished - (self._finished_at_start or 0)
        left = study.budget - study.num_finished
        if done < 2 or left <= 0:
            return None
        return (time.monotonic() - self._started) / done * left

    def _running(self, study: StudySnapshot) -> Table:
        table = Table("worker", "trial", "epoch", "value", "images/s", "config", box=None)
        trials = {trial.number: trial for trial in study.trials}
        for worker in study.workers:
            trial = trials.get(worker.trial) if worker.trial is not None else None
            epoch = (worker.step or 0) / STEPS_PER_EPOCH
            table.add_row(
                _words(f"{worker.id} {worker.device}"),
                "idle" if trial is None else str(trial.number),
                "" if trial is None else f"{epoch:g}/{self._num_epochs}",
                "" if trial is None or not trial.values else f"{trial.values[-1]:.4f}",
                f"{worker.images_per_second:,.0f}" if worker.images_per_second else "",
                _words("" if trial is None else params_text(trial)),
            )
        return table


@contextmanager
def reading_bar(stream: TextIO) -> Iterator[Progress]:
    """A bar for the reading of pictures, gone afterwards; without a terminal, lines now and then.

    Nothing is shown of what takes no time.
    """
    console = PlainConsole(stream)
    words = TextColumn("reading {task.description}", markup=False)
    columns = (words, BarColumn(), MofNCompleteColumn())
    bar = Bar(*columns, TimeRemainingColumn(), console=console, transient=True)
    is_live = moves(console)
    tasks: dict[str, TaskID] = {}
    last_line: float | None = None

    def tell(what: str, num_done: int, num_all: int) -> None:
        nonlocal last_line
        if is_live:
            if what not in tasks:
                bar.start()
                tasks[what] = bar.add_task(escaped(what))
            bar.update(tasks[what], completed=num_done, total=num_all)
        elif last_line is None:
            last_line = time.monotonic()
        elif time.monotonic() - last_line >= LINE_SECONDS:
            last_line = time.monotonic()
            console.print(_words(f"reading {what}: {num_done:,} of {num_all:,}"), soft_wrap=True)

    try:
        yield tell
    finally:
        if tasks:
            bar.stop()


def params_text(trial: TrialSnapshot) -> str:
    """What the trial was proposed, in a few words."""
    words = []
    for name, value in tried(trial).items():
        words.append(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}")
    return ", ".join(words)


def duration(seconds: float) -> str:
    """In the unit that suits it."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def _words(words: str) -> Text:
    """One line, as wide as it will be shown."""
    return Text(escaped(words))


def _value(trial: TrialSnapshot | None) -> str:
    return "-" if trial is None or trial.value is None else f"{trial.value:.4f}"
