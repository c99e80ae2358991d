"""Rows 5 to 7: signals, workers that are stopped, workers that hang."""

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.chaos.audit import Finding, audit, take_over_seconds
from benchmarks.chaos.faults import VARIABLE, Fault, FaultPlan
from benchmarks.chaos.stage import LEASE_SECONDS, STUDY, Arena, Command, Stage, slowness, wait_for
from benchmarks.chaos.zygote import Zygote

LEAVE = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
STOPPING_POINTS = ("after claim", "after bind", "before folder", "after leg", "before checkpoint",
                   "before report", "after report", "before tell")  # fmt: skip
STALL_SECONDS = 2.0


def told_to_leave(arena: Arena, long: bool) -> Iterator[Finding]:
    """Row 5."""
    with arena.stage(FaultPlan(folder="", leg_seconds=0.3)) as stage:
        stage.make_study(trials=8, epochs=5)
        done = "SIGTERM, SIGINT, SIGHUP to a worker, then to a launcher; simulated training"
        wrong = []
        for number in LEAVE:
            wrong.append(_leaves(stage, stage.start("worker", "--study", STUDY), number))
        for number in LEAVE if long else LEAVE[1:2]:
            launcher = stage.launch(trials=8, workers=2, epochs=5)
            wrong.append(_leaves(stage, launcher, number))
        code = stage.launch(trials=8, workers=2, epochs=5).wait(240)
        finding = audit(stage, "5", done=done, budget=8, epochs=5)
        finding.violations += filter(None, wrong)
        finding.check(code == 0, f"launch ended with {code}")
        yield finding
    yield _told_twice(arena)


def _leaves(stage: Stage, command: Command, number: signal.Signals) -> str | None:
    """What is wrong with how it leaves, once it or its worker has trained for a while."""
    is_launch = command.name == "hpo launch"
    before = len(stage.witness("leg"))

    def trains() -> bool:
        legs = stage.witness("leg")
        return any(line["pid"] == command.pid for line in legs) or (
            is_launch and len(legs) > before + 1
        )

    wait_for(f"{command.name} trains", trains, seconds=240)
    started = time.monotonic()
    command.send(number)
    stage.num_signals += 2 if is_launch else 1  # its workers are told, too
    code = command.wait(120)
    seconds = time.monotonic() - started
    if seconds > 10 * slowness():
        return f"{command.name} leaves {seconds:.1f} s after {number.name}"
    if code != 130:
        return f"{command.name} ends with {code} after {number.name}, not with 130"
    if is_launch and "go on with: hpo launch" not in command.stderr:
        return f"{command.name} does not say how to go on: {command.stderr[-200:]}"
    held = stage.query("SELECT worker_id FROM hpo_leases WHERE worker_id IS NOT NULL")
    if is_launch and held:
        return f"{command.name} has left, leases are held by {held}"
    if not is_launch and command.pid not in {line["pid"] for line in stage.witness("released")}:
        return f"{command.name} has not given its trial back after {number.name}"
    return None


def _told_twice(arena: Arena) -> Finding:
    """A worker in the middle of what it can't leave; the second signal ends it."""
    well = FaultPlan(folder="", leg_seconds=0.1)
    sick = FaultPlan(folder="", leg_seconds=0.1, sick={"*": "hang"})
    with arena.stage(sick) as stage:
        stage.make_study(trials=4)
        commands = [stage.start("worker", "--study", STUDY),
                    stage.launch(trials=4, workers=1)]  # fmt: skip
        wait_for("both train", lambda: len(stage.witness("begin")) > 1, seconds=240)
        time.sleep(1)
        wrong = []
        for command in commands:
            command.send(signal.SIGTERM)
            time.sleep(1)
            if command.code is not None:
                wrong.append(f"{command.name} hung and left at the first signal: nothing was tried")
            started = time.monotonic()
            command.send(signal.SIGTERM)
            stage.num_signals += 1
            code = command.wait(120)
            seconds = time.monotonic() - started
            if seconds > slowness() or code != 130:
                wrong.append(f"{command.name} left with {code} {seconds:.1f} s after the second")
        left = stage.workers()
        if left:
            wrong.append(f"workers {left} live on after the second signal")
        plan = FaultPlan(**{**vars(well), "folder": str(stage.folder)})
        code = stage.start("launch", **{VARIABLE: plan.to_json()}).wait(240)
        finding = audit(stage, "5", done="SIGTERM twice to a worker and a launcher that hang",
                        budget=4)  # fmt: skip
        finding.violations += wrong
        finding.check(code == 0, f"launch ended with {code}")
        return finding


def stopped_past_the_lease(arena: Arena, _long: bool) -> Iterator[Finding]:
    """Row 6."""
    for name in STOPPING_POINTS:
        fault = Fault(point=name, signal="SIGSTOP", after=2 if name == "after leg" else 1)
        with arena.stage(FaultPlan(folder="", faults=(fault,), leg_seconds=0.3)) as stage:
            stage.make_study(trials=3)
            zygote = Zygote(stage)
            try:
                yield _stopped(stage, zygote, name)
            finally:
                zygote.close()


def _stopped(stage: Stage, zygote: Zygote, name: str) -> Finding:
    workers = [zygote.start("worker", "--study", STUDY)]
    stop = wait_for("the worker stops", lambda: _stops(stage), seconds=240)[0]
    bound = stop["trial_id"] is not None
    workers.append(zygote.start("worker", "--study", STUDY))
    time.sleep(LEASE_SECONDS + 1.5)

    def taken() -> bool:
        done = stage.witness("leg", "ended")
        return any(line["token"] > stop["token"] and line["trial_id"] == stop["trial_id"]
                   for line in done) or not bound  # fmt: skip

    wait_for("somebody else goes on with the trial", taken, seconds=10)
    woken = time.time()
    with contextlib.suppress(ProcessLookupError):
        os.kill(workers[0].pid, signal.SIGCONT)
    codes = [worker.wait(240) for worker in workers]
    finding = audit(stage, "6", done=f"stopped {name} past the lease, then woken", budget=3)
    finding.check(codes == [0, 0], f"workers ended with {codes}")
    late = [line for line in stage.witness() if line["at"] > woken]
    for line in late:
        if line["kind"] in ("reported", "ended") and line["token"] == stop["token"]:
            finding.violations.append(f"the old attempt wrote: {line}")
        if line["kind"] == "read" and line["file_token"] == stop["token"]:
            finding.violations.append("a file of the old attempt was read")
    claims = [line for line in stage.witness("claim") if line["trial_id"] == stop["trial_id"]]
    if bound:
        most = max(line["attempts"] for line in claims)
        finding.check(most == 2, f"the trial took {most} attempts: the woken one disturbed it")
        delay = take_over_seconds(stage.witness("claim", "fault"))
        finding.check(min(delay, default=0) <= LEASE_SECONDS + 2, f"taken over after {delay} s")
    return finding


def _stops(stage: Stage) -> list[dict[str, Any]]:
    return [line for line in stage.witness("fault") if line["signal"] == "SIGSTOP"]


def hanging(arena: Arena, _long: bool) -> Iterator[Finding]:
    """Row 7."""
    for kind, how in (("hang", "sleeps"), ("hang-child", "waits for a stuck child")):
        plan = FaultPlan(folder="", leg_seconds=0.1, sick={"1": kind, "3": kind})
        with arena.stage(plan, HPO_STALL_SECONDS=f"{STALL_SECONDS:g}") as stage:
            launcher = stage.launch(trials=8, workers=3)
            launcher.wait(240)
            stage.num_kills += 2  # two hung: each may cost a part of an epoch
            done = f"the training of two trials {how} for ever"
            finding = audit(stage, "7", done=done, budget=8)
            finding.check(launcher.code == 0, f"launch ended with {launcher.code}")
            again = [line for line in stage.witness("claim") if line["attempts"] > 1]
            finding.check(len(again) == 2, f"{len(again)} trials were run again, not 2")
            slowest = max(take_over_seconds(stage.witness()), default=0.0)
            longest = STALL_SECONDS + LEASE_SECONDS + 1
            finding.check(slowest <= longest, f"noticed after {slowest:.1f} s")
            yield finding
