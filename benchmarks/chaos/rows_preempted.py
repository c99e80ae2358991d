"""Row 30: workers that are told to leave, or killed, long before an epoch is over."""

import math
import signal
from collections import Counter
from collections.abc import Iterator

from benchmarks.chaos.audit import Finding, audit
from benchmarks.chaos.faults import FaultPlan
from benchmarks.chaos.stage import STUDY, Arena, Overdue, Stage, wait_for
from benchmarks.chaos.zygote import Forked, Zygote

BATCH_SIZE = 64
STEPS_AN_EPOCH = math.ceil(1149 / BATCH_SIZE)
"""Of digits."""
SAVING_SECONDS = 1
CHECKPOINT_SECONDS = {"hpo.objective.CHECKPOINT_SECONDS": SAVING_SECONDS}
MOST_ATTEMPTS = 60


def preempted(arena: Arena, long: bool) -> Iterator[Finding]:
    """Row 30: every 2.5 s of training, where an epoch takes 9 s; in the long form 20 s and 36 s."""
    step_seconds, steps, epochs = (2.0, 10, 2) if long else (0.5, 5, 1)
    plan = FaultPlan(folder="", step_seconds=step_seconds)
    with arena.stage(plan) as stage:
        how = f"SIGTERM every {step_seconds * steps:g} s"
        finding = _through(stage, signal.SIGTERM, steps, epochs, how=how)
        again = _trained_again(stage, epochs)
        # one that comes while the training is evaluated loses the steps since the last save
        most = steps * (epochs + 1)
        finding.check(
            again <= most, f"{again} optimizer steps were done again after SIGTERM, not {most}"
        )
        yield finding
    plan = FaultPlan(folder="", step_seconds=step_seconds, constants=CHECKPOINT_SECONDS)
    with arena.stage(plan) as stage:
        how = f"kill -9 every {step_seconds * steps:g} s, saved every {SAVING_SECONDS} s"
        finding = _through(stage, signal.SIGKILL, steps, epochs, how=how)
        # of the step that is under way, what was done has no line
        most = stage.num_kills * math.ceil(SAVING_SECONDS / step_seconds)
        again = _trained_again(stage, epochs)
        finding.check(again <= most, f"{again} optimizer steps were done again, not {most}")
        finding.notes.append(f"{again} optimizer steps were done again")
        yield finding


def _through(stage: Stage, number: signal.Signals, steps: int, epochs: int, *, how: str) -> Finding:
    """One worker after another gets so many optimizer steps far; the last ones end the study."""
    stage.make_study(
        "--pruner", "none", "--set", f"batch_size={BATCH_SIZE}", trials=1, epochs=epochs
    )
    zygote = Zygote(stage)
    try:
        codes = list(_preempt(stage, zygote, number, steps))
    finally:
        zygote.close()
    epoch_seconds = STEPS_AN_EPOCH * (stage.plan.step_seconds or 0.0)
    done = f"{how}, epochs of {epoch_seconds:.0f} s"
    finding = audit(stage, "30", done=done, budget=1, epochs=epochs)
    expected = -signal.SIGKILL if number == signal.SIGKILL else 130
    finding.check(set(codes[:-1]) == {expected}, f"workers ended with {codes}")
    finding.check(codes[-1] == 0, f"the last worker ended with {codes[-1]}")
    fewest = math.ceil(epochs * STEPS_AN_EPOCH / steps)
    finding.check(len(codes) >= fewest, f"only {len(codes)} attempts: too short")
    return finding


def _preempt(stage: Stage, zygote: Zygote, number: signal.Signals, steps: int) -> Iterator[int]:
    """The workers' exit codes, until one finds nothing left to do."""
    for _ in range(MOST_ATTEMPTS):
        worker = zygote.start("worker", "--study", STUDY)
        wait_for("it trains or ends", lambda: _is_far(stage, worker, steps), seconds=240)  # noqa: B023
        if worker.code is None:
            worker.send(number)
            stage.num_kills += number == signal.SIGKILL
            stage.num_signals += number != signal.SIGKILL
        yield worker.wait(60)
        if worker.code == 0:
            return
    raise Overdue(f"no end after {MOST_ATTEMPTS} workers: the training makes no progress")


def _is_far(stage: Stage, worker: Forked, steps: int) -> bool:
    own = sum(line["pid"] == worker.pid for line in stage.witness("step"))
    return own >= steps or worker.code is not None


def _trained_again(stage: Stage, epochs: int) -> int:
    """Optimizer steps beyond those that a training without an interruption has."""
    done = Counter(line["trial_id"] for line in stage.witness("step"))
    return sum(done.values()) - len(done) * epochs * STEPS_AN_EPOCH
