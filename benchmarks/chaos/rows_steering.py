"""Rows 22 and 24: studies that are stopped, deleted or edited, launches that are interrupted."""

import contextlib
import signal
import time
from collections.abc import Iterator

import optuna

from benchmarks.chaos.audit import Finding, audit
from benchmarks.chaos.faults import VARIABLE, Fault, FaultPlan
from benchmarks.chaos.stage import LEASE_SECONDS, STUDY, Arena, Command, Stage, wait_for

LAUNCH_POINTS = ("before tables", "after tables", "before create", "after create",
                 "after relaunch", "after start")  # fmt: skip
TRAINING = FaultPlan(folder="", leg_seconds=0.3)


def steered(arena: Arena, _long: bool) -> Iterator[Finding]:
    """Row 22."""
    # the one that is deleted must not end before
    for steer, trials in ((_stopped, 10), (_deleted, 100), (_edited, 10)):
        with arena.stage(TRAINING) as stage:
            launcher = stage.launch(trials=trials, workers=2, epochs=5)
            wait_for("both workers train", lambda: len(stage.witness("leg")) > 3, seconds=240)
            yield steer(stage, launcher)


def _stopped(stage: Stage, launcher: Command) -> Finding:
    told = stage.start("stop").wait(120)
    started = time.monotonic()
    code = launcher.wait(120)
    seconds = time.monotonic() - started
    status = stage.json("status")
    stage.num_signals += 2  # each worker may cut a part of an epoch
    again = stage.launch(trials=10, workers=2, epochs=5).wait(240)
    finding = audit(stage, "22", done="the study is stopped, then launched again", budget=10,
                    epochs=5)  # fmt: skip
    finding.check((told, code, again) == (0, 0, 0), f"commands ended with {told, code, again}")
    finding.check("stopped" in launcher.stdout, f"launch says {launcher.stdout[-200:]!r}")
    finding.check(seconds < LEASE_SECONDS + 2, f"workers left after {seconds:.1f} s")
    shown = status["running"], status["workers"]
    finding.check(shown == (0, []), f"status of the stopped study: {shown}")
    return finding


def _deleted(stage: Stage, launcher: Command) -> Finding:
    finding = Finding(row="22", done="the study is deleted by Optuna's own API while it runs")
    storage = _optuna(stage)
    optuna.delete_study(study_name=STUDY, storage=storage)
    started = time.monotonic()
    storage.engine.dispose()
    wait_for("its workers leave", lambda: not _training(stage), seconds=30)
    finding.seconds = time.monotonic() - started
    code = launcher.wait(120)
    finding.notes.append(f"launch ends with {code}: {launcher.stderr.strip().splitlines()[-1:]}")
    finding.check(finding.seconds < LEASE_SECONDS + 2, f"they left after {finding.seconds:.1f} s")
    finding.check(code in (0, 2), f"launch ended with {code}")
    logs = [launcher.err, *(stage.home / "logs").rglob("*.log")]
    finding.check(not any("Traceback" in log.read_text() for log in logs), "a traceback")
    return finding


def _training(stage: Stage) -> bool:
    log = stage.folder / "witness.jsonl"
    return time.time() - log.stat().st_mtime < 1 or bool(stage.workers())


def _edited(stage: Stage, launcher: Command) -> Finding:
    storage = _optuna(stage)
    study = optuna.load_study(study_name=STUDY, storage=storage)
    running = [
        trial.number for trial in study.get_trials(states=(optuna.trial.TrialState.RUNNING,))
    ]
    study.tell(running[0], 0.125)
    study.tell(running[1], state=optuna.trial.TrialState.FAIL)
    storage.remove_session()
    storage.engine.dispose()
    code = launcher.wait(240)
    stage.num_signals += 2
    done = "two running trials are ended by Optuna's own API, one as COMPLETE, one as FAIL"
    finding = audit(stage, "22", done=done, budget=10, epochs=5, failed=1, edited=running[:2])
    finding.check(code == 0, f"launch ended with {code}")
    kept = stage.json("trials")[running[0]]
    finding.check((kept["state"], kept["value"]) == ("COMPLETE", 0.125), f"it became {kept}")
    return finding


def _optuna(stage: Stage) -> optuna.storages.RDBStorage:
    url = stage.url.replace("postgres:", "postgresql+psycopg2:", 1)
    return optuna.storages.RDBStorage(url)


def launch_interrupted(arena: Arena, _long: bool) -> Iterator[Finding]:
    """Row 24."""
    with arena.stage(TRAINING) as stage:
        wrong = []
        for name in LAUNCH_POINTS:
            for number in ("SIGKILL", "SIGINT"):
                if name.endswith("create"):
                    _forget(stage)  # one that is there is not made
                code = _interrupted_at(stage, name, number)
                if code != (-signal.SIGKILL if number == "SIGKILL" else 130):
                    wrong.append(f"launch ended with {code} after {number} {name}")
        launcher = stage.launch(trials=10, workers=2, epochs=5)
        code = launcher.wait(240)
        # a killed launcher's workers leave after their trial, an interrupted one's at once
        stage.num_signals += 2
        done = f"launch killed and interrupted at {len(LAUNCH_POINTS)} of its steps, and repeated"
        finding = audit(stage, "24", done=done, budget=10, epochs=5)
        finding.violations += wrong
        finding.check(code == 0, f"launch ended with {code}")
        studies = stage.query("SELECT o.study_name, s.budget FROM hpo_studies s"
                              " JOIN studies o USING (study_id)")  # fmt: skip
        finding.check(studies == [(STUDY, 10)], f"studies and budgets: {studies}")
        yield finding


def _forget(stage: Stage) -> None:
    """Delete the study, if there is one."""
    storage = _optuna(stage)
    with contextlib.suppress(KeyError):
        optuna.delete_study(study_name=STUDY, storage=storage)
    storage.remove_session()
    storage.engine.dispose()


def _interrupted_at(stage: Stage, name: str, number: str) -> int:
    fault = Fault(point=name, command=True, signal="SIGKILL" if number == "SIGKILL" else "SIGINT")
    folder = stage.folder / f"{name}-{number}".replace(" ", "-")
    folder.mkdir()
    (folder / "witness.jsonl").symlink_to(stage.folder / "witness.jsonl")
    plan = FaultPlan(**{**vars(TRAINING), "faults": (fault,), "folder": str(folder)})
    launcher = stage.launch(trials=10, workers=2, epochs=5, **{VARIABLE: plan.to_json()})
    return launcher.wait(240)
