"""Rows 16, 17, 20, 21: trainings that fail, clocks, workers of another version."""

import importlib.metadata
import math
import signal
from collections.abc import Iterator

from benchmarks.chaos.audit import Finding, audit
from benchmarks.chaos.faults import VARIABLE, FaultPlan
from benchmarks.chaos.stage import STUDY, Arena, Stage, wait_for


def sick_trainings(arena: Arena, _long: bool) -> Iterator[Finding]:
    """Row 16."""
    sick = {"2": "raise", "4": "oom", "6": "nan", "8": "inf"}
    with arena.stage(FaultPlan(folder="", leg_seconds=0.1, sick=sick)) as stage:
        launcher = stage.launch(trials=12, workers=2)
        launcher.wait(240)
        # a training that raises cuts its part of an epoch, and is tried in two processes
        stage.num_signals += len(sick) + 1
        done = "one training raises, one has no memory, one comes to NaN, one to infinity"
        finding = audit(stage, "16", done=done, budget=12, failed=1, tracebacks=True)
        finding.check(launcher.code == 0, f"launch ended with {launcher.code}")
        begun = stage.witness("begin")
        pids = {line["pid"] for line in begun}
        finding.check(len(pids) <= 4, f"{len(pids)} workers, not 4: more than two were replaced")
        tried = [line["pid"] for line in begun if line["number"] == 2]
        finding.check(len(tried) == len(set(tried)) == 2, f"processes that tried trial 2: {tried}")
        best = stage.json("status")["best"]
        finding.check(best and math.isfinite(best["value"]), f"the best is {best}")
        trials = stage.json("trials")
        expected = {2: ("FAIL", "broken"), 4: ("PRUNED", "memory"), 6: ("PRUNED", "nan"),
                    8: ("PRUNED", "inf")}  # fmt: skip
        for number, (state, word) in expected.items():
            found = trials[number]["state"], str(trials[number]["reason"])
            finding.check(
                found[0] == state and word in found[1], f"trial {number} ended as {found}"
            )
        yield finding


def only_sick_trainings(arena: Arena, _long: bool) -> Iterator[Finding]:
    """Row 17."""
    with arena.stage(FaultPlan(folder="", leg_seconds=0.1, sick={"*": "raise"})) as stage:
        launcher = stage.launch(trials=50, workers=2)
        code = launcher.wait(240)
        states = [state for (state,) in stage.query("SELECT state::text FROM trials")]
        finding = Finding(row="17", done="every training raises")
        finding.check(code == 6, f"launch ended with {code}")
        finding.check(set(states) == {"FAIL"}, f"trials ended as {sorted(set(states))}")
        finding.check(3 <= len(states) <= 6, f"{len(states)} trials were tried")
        last = launcher.stderr.strip().splitlines()[-1:]
        finding.check(last and "broken" in last[0], f"the reason is not in {last}")
        finding.check("Traceback" not in launcher.stderr, "a traceback")
        finding.notes.append(f"{len(states)} trials were tried")
        yield finding


def other_clocks(arena: Arena, _long: bool) -> Iterator[Finding]:
    """Row 20."""
    east = {"TZ": "Pacific/Kiritimati", "PGTZ": "America/New_York"}
    west = {"TZ": "Pacific/Pago_Pago", "PGTZ": "Asia/Tokyo"}
    with arena.stage(FaultPlan(folder="", leg_seconds=0.3)) as stage:
        launcher = stage.launch(trials=40, workers=2, epochs=5, **east)
        wait_for("a worker trains", lambda: stage.witness("begin"), seconds=240)
        other = stage.start("worker", "--study", STUDY, **west)
        wait_for(
            "the other worker trains",
            lambda: any(line["pid"] == other.pid for line in stage.witness("leg")),
            seconds=60,
        )
        other.send(signal.SIGKILL)
        stage.num_kills += 1
        launcher.wait(240)
        done = "workers whose TZ is 25 hours apart, PGTZ otherwise; one is killed"
        finding = audit(stage, "20", done=done, budget=40, epochs=5)
        finding.check(launcher.code == 0, f"launch ended with {launcher.code}")
        assert finding.counts is not None
        finding.check(finding.counts.attempts == 41, "trials were taken over without a fault")
        seconds = stage.json("status")["seconds"]
        finding.check(0 < seconds < finding.seconds, f"the study took {seconds} s by its clock")
        wrong = stage.query(
            "SELECT number, datetime_complete - datetime_start FROM trials WHERE"
            " datetime_complete - datetime_start NOT BETWEEN '0 s' AND '5 min'"
        )
        finding.check(not wrong, f"trials that took, by Optuna's columns: {wrong}")
        yield finding


def other_versions(arena: Arena, _long: bool) -> Iterator[Finding]:
    """Row 21."""
    with arena.stage(FaultPlan(folder="", leg_seconds=0.1)) as stage:
        stage.launch(trials=2, workers=1).wait(240)
        finding = Finding(
            row="21",
            done="workers and launchers of another code, space or Optuna; another patch release",
        )
        major, minor, patch = importlib.metadata.version("hpo-vision").split(".")
        plans = {
            "Optuna": FaultPlan(folder="", versions={"optuna": "9.9.9"}),
            "hpo": FaultPlan(folder="", versions={"hpo-vision": f"{major}.{int(minor) + 1}.0"}),
            "spec": FaultPlan(folder="", constants={"hpo.spec.VERSION": 99}),
            "tables": FaultPlan(folder="", constants={"storage.schema.VERSION": 99}),
        }
        for name, plan in plans.items():
            chaos = {VARIABLE: FaultPlan(**{**vars(plan), "folder": str(stage.folder)}).to_json()}
            _refused(finding, stage, name, "worker", "--study", STUDY, **chaos)
            _refused(finding, stage, name, "launch", "--trials", "3", **chaos)
        _refused(finding, stage, "space", "launch", "--trials", "3", "--epochs", "7")
        _refused(finding, stage, "seed", "launch", "--trials", "3", "--seed", "7")
        (trials,) = stage.query("SELECT count(*) FROM trials")
        finding.check(trials == (2,), f"{trials[0]} trials: somebody who was refused has worked")
        other_patch = FaultPlan(
            folder=str(stage.folder),
            versions={"hpo-vision": f"{major}.{minor}.{int(patch) + 1}"},
            leg_seconds=0.1,
        )
        code = stage.launch(
            trials=3, workers=1, epochs=3, **{VARIABLE: other_patch.to_json()}
        ).wait(240)
        status = stage.json("status")
        ended = status["complete"] + status["pruned"]
        finding.check((code, ended) == (0, 3), f"a launch of another patch: {code}, {ended} trials")
        yield finding


def _refused(finding: Finding, stage: Stage, name: str, *command: str, **variables: str) -> None:
    refused = stage.start(*command, **variables)
    code, said = refused.wait(240), refused.stderr.strip().splitlines()
    what = f"hpo {command[0]} with another {name}"
    finding.check(code in (2, 3), f"{what} ended with {code}")
    finding.check(len(said) == 1, f"{what} said {len(said)} lines: {said[-1:]}")
    finding.seconds += 1
