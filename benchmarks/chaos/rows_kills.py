"""Rows 1 to 4, 18: kill -9, anywhere."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.chaos.audit import Finding, audit
from benchmarks.chaos.faults import Fault, FaultPlan
from benchmarks.chaos.stage import STUDY, Arena, Stage, repeat, slowness, wait_for
from storage.checkpoints import TrialCheckpoints

SEARCHED = ("lr", "batch_size", "backbone", "weight_decay")
TAKE_OVER_POINTS = ("before take-over", "in take-over", "before removal", "after take-over")
POINTS = (
    "before claim", "before reap", "in reap", "after claim", "after ask", "after bind",
    *(f"after suggest {name}" for name in SEARCHED),
    "after leg", "before checkpoint", "in checkpoint", "after checkpoint",
    "before report", "after report", "before tell", "after tell",
    *TAKE_OVER_POINTS,
)  # fmt: skip
LEAVING_POINTS = ("before release", "after release")
MOST_SECONDS_BETWEEN_KILLS = 1.5


def killed_at_random(arena: Arena, long: bool) -> Iterator[Finding]:
    """Row 1."""
    budget, workers, leg_seconds = (200, 8, 0.5) if long else (20, 3, 0.3)
    with arena.stage(FaultPlan(folder="", leg_seconds=leg_seconds)) as stage:
        launcher = stage.launch(trials=budget, workers=workers, epochs=5)
        # however slow the machine is: the pauses of a simulated training stay as they are
        every = 1.0 if long else min(slowness(), MOST_SECONDS_BETWEEN_KILLS)
        repeat(stage.kill_a_worker, every=every, until=launcher, seconds=1200 if long else 300)
        done = f"{workers} workers, a random one killed every {every:.1f} s; simulated training"
        finding = audit(stage, "1", done=done, budget=budget, epochs=5)
        finding.check(launcher.code == 0, f"launch ended with {launcher.code}")
        finding.check(stage.num_kills > 5, f"only {stage.num_kills} kills: too short")
        yield finding
    if long:
        yield _killed_and_restarted(arena)
    budget = 16 if long else 5
    with arena.stage() as stage:
        launcher = stage.launch(trials=budget, workers=2, epochs=20)
        every = 5.0 if long else 2 * slowness()  # five trials are trained in seconds
        repeat(stage.kill_a_worker, every=every, until=launcher, seconds=600 if long else 300)
        done = f"2 workers, a random one killed every {every:.1f} s; real training"
        finding = audit(stage, "1", done=done, budget=budget, epochs=20)
        finding.check(launcher.code == 0, f"launch ended with {launcher.code}")
        finding.check(stage.num_kills > 0, "no kills: too short")
        yield finding


def _killed_and_restarted(arena: Arena) -> Finding:
    """The figure to hold: 8 workers x 200 trials, kill every second, restart every 10 s."""
    with arena.stage(FaultPlan(folder="", leg_seconds=0.5)) as stage:
        launcher = stage.launch(trials=200, workers=8, epochs=5)
        seconds = iter(range(1, 10_000))

        def fault() -> None:
            stage.kill_a_worker()
            if next(seconds) % 10 == 0:
                stage.restart_postgres("immediate")

        repeat(fault, every=1, until=launcher, seconds=1800)
        done = "8 workers, one killed each second, Postgres restarted every 10 s; simulated"
        finding = audit(stage, "1+8", done=done, budget=200, epochs=5)
        finding.check(launcher.code == 0, f"launch ended with {launcher.code}")
        return finding


def killed_at_each_point(arena: Arena, long: bool) -> Iterator[Finding]:
    """Row 2."""
    budget = 30
    kills = tuple(Fault(point=name) for name in POINTS)
    with arena.stage(FaultPlan(folder="", faults=kills, leg_seconds=0.05)) as stage:
        launcher = stage.launch(trials=budget, workers=3, epochs=5)
        launcher.wait(300)
        done = f"killed once at each of {len(POINTS)} points, one study; simulated training"
        finding = audit(stage, "2", done=done, budget=budget, epochs=5)
        finding.check(launcher.code == 0, f"launch ended with {launcher.code}")
        missed = set(POINTS) - _points_hit(stage)
        finding.check(not missed, f"nobody passed {sorted(missed)}: nothing was tried there")
        yield finding
    yield _killed_at(arena, *LEAVING_POINTS)
    for name in POINTS if long else ():
        yield _killed_at(arena, name)


def _killed_at(arena: Arena, *names: str) -> Finding:
    """Twice at each, with real training."""
    faults = [Fault(point=name, times=2) for name in names]
    if names[0] in TAKE_OVER_POINTS:
        faults.append(Fault(point="after report", times=2))
    if names == LEAVING_POINTS:  # a trial each, for none may be killed more than twice
        faults = [Fault(point=name, times=2, trial=trial) for trial, name in enumerate(names)]
        faults.append(Fault(point="after leg", signal="SIGTERM", times=8))
    with arena.stage(FaultPlan(folder="", faults=tuple(faults))) as stage:
        launcher = stage.launch(trials=3, workers=2, epochs=3)
        launcher.wait(300)
        done = f"killed {' and '.join(names)}, twice each; real training"
        finding = audit(stage, "2", done=done, budget=3)
        finding.check(launcher.code == 0, f"launch ended with {launcher.code}")
        missed = set(names) - _points_hit(stage)
        finding.check(not missed, f"nobody passed {sorted(missed)}: nothing was tried there")
        return finding


def _points_hit(stage: Stage) -> set[str]:
    return {line["point"] for line in stage.witness("fault") if line["signal"] == "SIGKILL"}


def reaper_killed(arena: Arena, _long: bool) -> Iterator[Finding]:
    """Row 3."""
    exhausting = Fault(point="after suggest lr", times=3, trial=0)
    reaping = [Fault(point=name, times=2) for name in ("before reap", "in reap", "in fail")]
    asking = Fault(point="before fail", command=True)
    faults = (exhausting, *reaping)
    plan = FaultPlan(folder="", faults=faults, most_hits=9, leg_seconds=0.1)
    with arena.stage(plan) as stage:
        launcher = stage.launch(trials=5, workers=2)
        code = launcher.wait(240)
        done = "a trial that dies three times, and whoever reaps it killed at each point"
        finding = audit(stage, "3", done=done, budget=5, failed=1)
        finding.check(code == 0, f"launch ended with {code}")
        finding.check("in fail" in _points_hit(stage), "nobody was killed while he reaped")
        yield finding
    with arena.stage(FaultPlan(folder="", faults=(asking,), leg_seconds=0.1)) as stage:
        stage.launch(trials=3, workers=2).wait(240)
        _ask_and_forget(stage)
        reaper = stage.start("status")
        code = reaper.wait(240)
        again = stage.launch(trials=4, workers=1).wait(240)
        done = "a trial asked for by a process that has gone; `hpo status` killed while it reaps"
        finding = audit(stage, "3", done=done, budget=4)
        finding.check((code, again) == (-9, 0), f"status ended with {code}, launch with {again}")
        yield finding


def _ask_and_forget(stage: Stage) -> None:
    import optuna

    storage = optuna.storages.RDBStorage(stage.url.replace("postgres:", "postgresql+psycopg2:", 1))
    optuna.load_study(study_name=STUDY, storage=storage).ask()
    storage.remove_session()
    storage.engine.dispose()


def all_killed(arena: Arena, long: bool) -> Iterator[Finding]:
    """Row 4."""
    pause = 60.0 if long else 4.0
    with arena.stage(FaultPlan(folder="", leg_seconds=0.3)) as stage:
        launcher = stage.launch(trials=12, workers=3, epochs=5)
        wait_for("two trials have ended", lambda: len(stage.witness("ended")) > 1, seconds=240)
        launcher.send(signal.SIGKILL)
        for pid in stage.workers():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
                stage.num_kills += 1
        launcher.wait(10)
        before = {trial["number"]: trial for trial in stage.json("trials")
                  if trial["state"] in ("COMPLETE", "PRUNED")}  # fmt: skip
        time.sleep(pause)
        code = stage.launch(trials=12, workers=3, epochs=5).wait(240)
        done = f"launcher and all workers killed, launched again after {pause:.0f} s; simulated"
        finding = audit(stage, "4", done=done, budget=12, epochs=5)
        after = {trial["number"]: trial for trial in stage.json("trials")}
        touched = [number for number in before if after[number] != before[number]]
        finding.check(not touched, f"finished trials have changed: {touched}")
        finding.check(code == 0, f"launch ended with {code}")
        finding.check(len(before) > 1, "nothing had ended before the kill")
        yield finding


def killed_while_saving(arena: Arena, long: bool) -> Iterator[Finding]:
    """Row 18."""
    yield _killed_writers(arena.folder / "checkpoints", 200 if long else 40)
    yield _corrupted(arena.folder / "corrupted", 100)
    faults = (Fault(point="after checkpoint", times=6, after=2),)
    plan = FaultPlan(folder="", faults=faults, torn=True, leg_seconds=0.1)
    with arena.stage(plan) as stage:
        code = stage.launch(trials=8, workers=2, epochs=5).wait(300)
        done = "killed after a checkpoint, which is truncated: resumed from the one before"
        finding = audit(stage, "18", done=done, budget=8, epochs=5)
        bad = [line for line in stage.witness("read") if not line["valid"]]
        finding.check(bad, "no truncated checkpoint was met: nothing was tried")
        finding.check(code == 0, f"launch ended with {code}")
        yield finding


def _killed_writers(root: Path, num_kills: int) -> Finding:
    """One attempt after another writes until it is killed; the next one reads."""
    started, chance = time.monotonic(), random.Random(0)
    finding = Finding(row="18", done=f"{num_kills} writers of checkpoints killed while they write")
    unreadable = lost = torn = 0
    for token in range(1, num_kills + 1):
        command = [sys.executable, "-P", str(Path(__file__).with_name("writer.py"))]
        writer = subprocess.Popen([*command, str(root), str(token)], stdout=subprocess.PIPE)
        assert writer.stdout is not None
        try:
            writer.stdout.readline()
            time.sleep(chance.uniform(0, 0.06))
        finally:
            writer.kill()
            said = [int(line) for line in writer.stdout.read().split()]
            writer.wait()
            writer.stdout.close()
        torn += len(list(root.rglob("*.partial")))
        reader = TrialCheckpoints(root, study_key=1, trial_number=1, token=token + 1)
        found = reader.take_over()
        step = -1 if found is None else int.from_bytes(found[:8], "big")
        unreadable += found is None and bool(said)
        lost += bool(said) and step < max(said)
    finding.seconds = time.monotonic() - started
    finding.notes.append(f"{torn} were in the middle of a file")
    finding.check(unreadable == 0, f"{unreadable} times nothing could be read")
    finding.check(lost == 0, f"{lost} times a checkpoint that was saved was gone")
    finding.check(torn > num_kills / 20, f"only {torn} were in the middle of a file")
    return finding


def _corrupted(root: Path, num_times: int) -> Finding:
    """Newest file truncated, bit-flipped, emptied, removed, or put together from others."""
    started, chance = time.monotonic(), random.Random(0)
    loaded_bad = not_before = 0
    for time_ in range(num_times):
        kept = TrialCheckpoints(root, study_key=1, trial_number=time_, token=1)
        kept.take_over()
        payloads = [chance.randbytes(5000) for _ in range(2)]
        for step, payload in enumerate(payloads):
            kept.save(step, payload)
        path = root / "1" / f"{time_}" / "1" / "1.ckpt"
        _corrupt(path, kind=time_ % 5, chance=chance)
        reader = TrialCheckpoints(root, study_key=1, trial_number=time_, token=2)
        found = reader.take_over()
        loaded_bad += found not in (None, *payloads)
        not_before += found != payloads[0]
    finding = Finding(row="18", done=f"{num_times} corrupted checkpoints read")
    finding.seconds = time.monotonic() - started
    finding.check(loaded_bad == 0, f"{loaded_bad} corrupted ones were loaded")
    finding.check(not_before == 0, f"{not_before} times it was not the one before that was read")
    return finding


def _corrupt(path: Path, *, kind: int, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if kind == 0:
        del content[chance.randrange(len(content)) :]
    elif kind == 1:
        content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    elif kind == 2:
        content.clear()
    elif kind == 3:
        path.unlink()
        return
    else:
        content += b"more"
    path.write_bytes(content)
