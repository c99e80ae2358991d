"""Rows 25 and 33: `hpo best --export` killed on its way; a best trial that changes meanwhile."""

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.chaos.audit import STEPS_PER_EPOCH, Finding
from benchmarks.chaos.faults import VARIABLE, Fault, FaultPlan
from benchmarks.chaos.stage import STUDY, Arena, Command, Overdue, Stage, wait_for

POINTS = (
    ("before export", 1), ("after leg", 2), ("in export", 1), ("in export", 4), ("in export", 6),
    ("in sync", 1), ("in sync", 5), ("in sync", 9), ("after export", 1),
)  # fmt: skip
"""Point, and at which passing: of the retraining, of each file, before and after the rename."""
OF_A_WORKER = ("after leg",)
"""Points of the retraining, which a worker of the command does."""
AGAIN = (("in export", 2), ("in sync", 3), ("in sync", 9))
"""Where an older export is there already."""
EXPORT_SECONDS = 240.0
BATCH_SIZE = 64
BEFORE_THE_END = 9
"""Optimizer steps that are left where the retraining is killed; an epoch has 23."""
RETRAINING = {"step_seconds": 0.0, "constants": {"hpo.objective.CHECKPOINT_SECONDS": 0}}
"""Each optimizer step is noted, and what was trained is saved before the next one."""
NUM_FORMATS = 4


def export_killed(arena: Arena, long: bool) -> Iterator[Finding]:
    """Row 25."""
    with arena.stage() as stage:
        code = stage.launch(trials=3, workers=2, epochs=2).wait(240)
        if code != 0:
            raise Overdue(f"the study to export from ended with {code}")
        done = "`best --export` killed at {} points, then repeated"
        yield _killed(stage, POINTS if long else (POINTS[1], POINTS[4], POINTS[-1]), done=done)
        done = "the same at {} points, over an older export"
        yield _killed(stage, AGAIN if long else AGAIN[-1:], done=done)
        if long:
            yield _killed_at_random(stage, 12)
        yield _best_changes(stage)


def _killed(stage: Stage, points: tuple[tuple[str, int], ...], *, done: str) -> Finding:
    started = time.monotonic()
    finding = Finding(row="25", done=done.format(len(points)))
    out, best = stage.home / "model", _best(stage)["number"]
    older = out.exists()
    found = []
    for name, passing in points:
        of_a_worker = name in OF_A_WORKER
        target = out.with_name("went-on") if of_a_worker else out
        plan = _plan(stage, Fault(point=name, after=passing, command=not of_a_worker))
        code = _export(stage, target, plan).wait(EXPORT_SECONDS)
        stage.num_kills += 1
        finding.check(_lines(plan, "fault"), f"nobody passed {name}, {passing}")
        # a worker's retraining goes on in the next worker
        expected = 0 if of_a_worker else -signal.SIGKILL
        finding.check(code == expected, f"killed {name}, {passing}: it ended with {code}")
        state = _look(finding, target, trial=best, after=f"{name}, {passing}")
        if of_a_worker:
            finding.check(state == "whole", f"after {name}, {passing} the export is {state}")
        else:
            found.append(state)
    finding.check(older or "absent" in found, "never absent: nothing was tried before its end")
    finding.check("whole" in found, "never there: nothing was tried after its end")
    if older:
        finding.check("absent" not in found, "an older export is gone")
    finding.notes.append(f"absent {found.count('absent')}, whole {found.count('whole')} times")
    _repeat(finding, stage, out, best)
    finding.seconds = time.monotonic() - started
    return finding


def _killed_at_random(stage: Stage, num_times: int) -> Finding:
    """Within the time that a whole one takes."""
    finding = Finding(row="25", done=f"`best --export` killed at {num_times} random moments")
    out, best, chance = stage.home / "random", _best(stage)["number"], random.Random(0)
    begun = time.monotonic()
    _repeat(finding, stage, stage.home / "timed", best)
    usual = time.monotonic() - begun
    killed = 0
    for index in range(num_times):
        command = _export(stage, out, _plan(stage))
        with contextlib.suppress(Overdue):
            command.wait(usual * chance.uniform(0.2, 1.0))
        killed += command.code is None
        command.send(signal.SIGKILL)
        command.wait(10)
        stage.num_kills += 1
        _look(finding, out, trial=best, after=f"random moment {index}")
    finding.check(killed > 0, "it had ended each time: nothing was tried")
    finding.notes.append(f"{killed} times in time, of {usual:.0f} s")
    _repeat(finding, stage, out, best)
    finding.seconds = time.monotonic() - begun
    return finding


def _best_changes(stage: Stage) -> Finding:
    """Another trial becomes the best one while the old one is retrained."""
    started = time.monotonic()
    finding = Finding(row="25", done="another trial becomes the best during the retraining")
    before, out = _best(stage), stage.home / "changed"
    plan = _plan(stage, Fault(point="after leg", signal="SIGSTOP", after=2))
    command = _export(stage, out, plan)
    stopped = wait_for("it stops in the retraining", lambda: _lines(plan, "fault"), seconds=120)
    other = (
        "(SELECT max(trial_id) FROM trials JOIN studies USING (study_id)"
        f" WHERE study_name = '{STUDY}' AND number <> {before['number']})"
    )
    stage.query(f"UPDATE trials SET state = 'COMPLETE' WHERE trial_id = {other}")
    stage.query(f"UPDATE trial_values SET value = 1.0 WHERE trial_id = {other}")
    os.kill(stopped[0]["pid"], signal.SIGCONT)
    code = command.wait(EXPORT_SECONDS)
    finding.check(code == 0, f"best --export ended with {code}: {command.stderr[-200:]}")
    after = _best(stage)["number"]
    finding.check(after != before["number"], "the best trial is the same: nothing was tried")
    found = _look(finding, out, trial=before["number"], after="the change")
    finding.check(found == "whole", f"the export is {found}")
    with contextlib.suppress(OSError, KeyError):
        manifest = _json(out / "manifest.json")
        told, trained = manifest["trial"]["params"], manifest["config"]
        same = all(trained[name] == value for name, value in told.items())
        finding.check(same, f"it names {told}, and holds {trained}")
    finding.seconds = time.monotonic() - started
    return finding


def retraining_killed(arena: Arena, _long: bool) -> Iterator[Finding]:
    """Row 33."""
    started = time.monotonic()
    finding = Finding(row="33", done="a retraining killed in its last epoch, with its command")
    with arena.stage() as stage:
        options = ("--set", f"batch_size={BATCH_SIZE}", "--pruner", "none")
        code = stage.launch(*options, trials=2, workers=2, epochs=3).wait(240)
        if code != 0:
            raise Overdue(f"the study to export from ended with {code}")
        undisturbed, out = stage.home / "undisturbed", stage.home / "model"
        plan = FaultPlan(**{**vars(_plan(stage)), **RETRAINING})
        code = _export(stage, undisturbed, plan).wait(EXPORT_SECONDS)
        finding.check(code == 0, f"undisturbed, best --export ended with {code}")
        steps = len(_lines(plan, "step"))
        stop = Fault(point="after step", after=steps - BEFORE_THE_END, signal="SIGSTOP")
        plan = FaultPlan(**{**vars(_plan(stage, stop)), **RETRAINING})
        command = _export(stage, out, plan)
        wait_for("it stops in the retraining", lambda: _lines(plan, "fault"), seconds=120)
        epochs = {line["step"] // STEPS_PER_EPOCH for line in _lines(plan, "leg")}
        finding.check(
            max(epochs, default=0) == 2, f"stopped after epochs {epochs}, not in the last"
        )
        for pid in stage.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        command.wait(10)
        stage.num_kills += 1
        finding.check(not out.exists(), "there is an export already")
        again = FaultPlan(**{**vars(_plan(stage)), **RETRAINING})
        code = _export(stage, out, again).wait(EXPORT_SECONDS)
        finding.check(code == 0, f"repeated, best --export ended with {code}")
        trained = len(_lines(plan, "step")) + len(_lines(again, "step"))
        finding.check(
            trained <= steps + 1, f"{trained} optimizer steps, not {steps}: it was begun again"
        )
        found = _look(finding, out, trial=_best(stage)["number"], after="the repetition")
        finding.check(found == "whole", f"repeated, the export is {found}")
        weights = [(path / "model.safetensors").read_bytes() for path in (undisturbed, out)]
        finding.check(weights[0] == weights[1], "the two exports have other weights")
        finding.notes.append(f"{len(_lines(again, 'step'))} of {steps} steps after the kill")
    finding.seconds = time.monotonic() - started
    yield finding


def _lines(plan: FaultPlan, kind: str) -> list[dict[str, Any]]:
    """Of the witness of one command and its workers."""
    log = Path(plan.folder) / "witness.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    return [found for found in map(json.loads, lines) if found["kind"] == kind]


def _plan(stage: Stage, *faults: Fault) -> FaultPlan:
    """Of one command, whose faults are counted for themselves."""
    folder = stage.folder / f"export-{time.monotonic_ns()}"
    folder.mkdir()
    return FaultPlan(folder=str(folder), faults=faults)


def _export(stage: Stage, out: Path, plan: FaultPlan) -> Command:
    return stage.start(
        "best", "--export", "--out", str(out), *_without_rechecks(), **{VARIABLE: plan.to_json()}
    )


def _without_rechecks() -> list[str]:
    """What keeps the export from training for long before the point, if there is such a thing."""
    from typer.main import get_command

    from hpo.cli import app

    known = {name for each in get_command(app).commands["best"].params for name in each.opts}  # type: ignore[attr-defined]
    given = ["--top-k", "1", "--seeds", "0"]
    return given if {"--top-k", "--seeds"} <= known else []


def _repeat(finding: Finding, stage: Stage, out: Path, trial: int) -> None:
    """Once more, and undisturbed."""
    again = _export(stage, out, _plan(stage))
    code = again.wait(EXPORT_SECONDS)
    finding.check(code == 0, f"repeated, it ended with {code}: {again.stderr[-200:]}")
    found = _look(finding, out, trial=trial, after="the repetition")
    finding.check(found == "whole", f"repeated, it is {found}")
    left = [path.name for path in out.parent.iterdir() if path.name.startswith(f".{out.name}.")]
    finding.check(not left, f"repeated, it left {left}")


def _look(finding: Finding, out: Path, *, trial: int, after: str) -> str:
    """absent, whole or torn; the last one is noted as a violation."""
    if not out.exists():
        return "absent"
    try:
        manifest = _json(out / "manifest.json")
        named = manifest["trial"]["number"]
        finding.check(named == trial, f"after {after} it names trial {named}, not {trial}")
        sizes = {each["file"]: each["bytes"] for each in manifest["formats"].values()}
        real = {name: (out / name).stat().st_size for name in sizes}
        _json(out / "metrics.json")
        picture = (out / "confusion_matrix.png").read_bytes()
        whole = sizes == real and len(sizes) >= NUM_FORMATS and b"IEND" in picture[-12:]
    except (OSError, ValueError, KeyError) as error:
        finding.violations.append(f"after {after} the export is torn: {error}")
        return "torn"
    finding.check(whole, f"after {after} the export holds {real}, says {sizes}")
    return "whole" if whole else "torn"


def _json(path: Path) -> Any:
    return json.loads(path.read_text())


def _best(stage: Stage) -> Mapping[str, Any]:
    found: Mapping[str, Any] = stage.json("best")["trial"]
    return found
