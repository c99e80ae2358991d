"""The witness and the fault points, inside the product's processes.

What is done is said by HPO_CHAOS, a FaultPlan as JSON. Everything is looked up when it is needed:
workers are forked from a server that has these modules loaded.
"""

import dataclasses
import functools
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

VARIABLE = "HPO_CHAOS"


@dataclass(frozen=True, kw_only=True)
class Fault:
    """A signal that a process sends itself when it passes a point."""

    point: str
    signal: Literal["SIGKILL", "SIGTERM", "SIGINT", "SIGSTOP"] = "SIGKILL"
    times: int = 1
    """By all processes of the stage together."""
    trial: int | None = None
    """The number of the trial in hand; None: any, also none."""
    command: bool = False
    """Only in processes that are no worker."""
    after: int = 1
    """The first passing, counted in each process, at which it may happen."""


@dataclass(frozen=True, kw_only=True)
class FaultPlan:
    """What is to go wrong in the processes that have it in their environment."""

    folder: str
    """Holds the witness and what has happened already."""
    faults: tuple[Fault, ...] = ()
    most_hits: int = 2
    """Kills that one trial suffers at points: three attempts in a row without a report end it."""
    leg_seconds: float | None = None
    """Simulated training: the real loop on 64 images, with a pause of this length a leg."""
    step_seconds: float | None = None
    """Slow training: the real loop on all images, each optimizer step longer by this and noted."""
    load_seconds: float = 0.0
    """What it takes longer until a worker has its data."""
    sick: Mapping[str, str] = field(default_factory=dict)
    """Number of a trial, or "*" -> what its training does: raise, oom, nan, inf, hang, hang-child.
    It hangs once, the others happen at every attempt."""
    torn: bool = False
    """Who is killed after a checkpoint leaves it truncated."""
    versions: Mapping[str, str] = field(default_factory=dict)
    """Distribution -> the version that it says it has."""
    constants: Mapping[str, float] = field(default_factory=dict)
    """module.NAME -> its value."""

    def to_json(self) -> str:
        """For the environment."""
        return json.dumps(dataclasses.asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The plan of to_json's text."""
        values = json.loads(text)
        return cls(**{**values, "faults": tuple(Fault(**each) for each in values["faults"])})


@dataclass
class Here:
    """What this process is doing."""

    is_worker: bool = False
    study: str | None = None
    trial_id: int | None = None
    number: int | None = None
    token: int | None = None
    attempts: int = 0
    saving: bool = False
    taking_over: bool = False
    exporting: bool = False
    passes: Counter[str] = field(default_factory=Counter)

    def forget_trial(self) -> None:
        """Before a claim."""
        self.trial_id = self.number = self.token = None
        self.attempts = 0
        self.saving = self.taking_over = False


here = Here()


@functools.cache
def plan() -> FaultPlan:
    """Of this process."""
    return FaultPlan.from_json(os.environ[VARIABLE])


def start_anew() -> None:
    """In a process that has just been forked."""
    plan.cache_clear()
    here.__dict__.update(Here().__dict__)


def witness(kind: str, **more: Any) -> None:
    """Add a line to the log of the stage: one write, so that lines stay whole."""
    line = {
        "kind": kind,
        "at": time.time(),
        "pid": os.getpid(),
        "study": here.study,
        "trial_id": here.trial_id,
        "number": here.number,
        "token": here.token,
        **more,
    }
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT
    log = os.open(Path(plan().folder) / "witness.jsonl", flags, 0o644)
    try:
        os.write(log, f"{json.dumps(line)}\n".encode())
    finally:
        os.close(log)


def point(name: str, *, torn_file: Path | None = None) -> None:
    """A place at which this process may be told to end itself."""
    here.passes[name] += 1
    for fault in plan().faults:
        if fault.point != name or here.passes[name] < fault.after:
            continue
        if fault.trial not in (None, here.number) or (fault.command and here.is_worker):
            continue
        kills = fault.signal == "SIGKILL" and here.trial_id is not None
        if kills and not _has_room(f"hit-{here.trial_id}", most=plan().most_hits):
            continue
        if not _mark(f"{fault.signal} {name}", most=fault.times):
            continue
        if kills:
            _mark(f"hit-{here.trial_id}", most=plan().most_hits)
        if plan().torn and torn_file is not None:
            os.truncate(torn_file, torn_file.stat().st_size // 2)
        witness("fault", point=name, signal=fault.signal)
        os.kill(os.getpid(), signal.Signals[fault.signal])
        time.sleep(0.05)  # a signal to oneself may come a moment later


def sickness() -> str | None:
    """What the training of the trial in hand does, None if it is well."""
    kind = plan().sick.get(str(here.number)) or plan().sick.get("*")
    if kind is None or (kind.startswith("hang") and not _mark(f"sick-{here.number}", most=1)):
        return None
    return kind


def _mark(name: str, *, most: int) -> bool:
    """Count this in the stage, unless it has happened `most` times."""
    for path in _slots(name, most):
        try:
            os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            return True
        except FileExistsError:
            continue
    return False


def _has_room(name: str, *, most: int) -> bool:
    return not all(path.exists() for path in _slots(name, most))


def _slots(name: str, most: int) -> list[Path]:
    folder = Path(plan().folder) / "happened"
    folder.mkdir(exist_ok=True)
    return [folder / f"{name}-{index}" for index in range(most)]
