"""Rows 28, 29, 32: networks that kill, workers that can't work, data that take long to load."""

import contextlib
import json
import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks.chaos import ill_networks
from benchmarks.chaos.audit import Finding, audit, read_tables
from benchmarks.chaos.faults import FaultPlan
from benchmarks.chaos.rows_disk import MOST_FILE_BYTES, SAID, small_disk
from benchmarks.chaos.stage import LEASE_SECONDS, STUDY, Arena, Command, Stage, wait_for
from storage.leases import MOST_FRUITLESS_ATTEMPTS

NETWORKS = "networks_of_a_user"
ALWAYS_SAVING = {"hpo.objective.CHECKPOINT_SECONDS": 0}
STALL_SECONDS = 3.0
KINDS = {
    "killed": "by signal 9 (SIGKILL",
    "leaving": "with exit code 1",
    "hanging": f"no optimizer step in {STALL_SECONDS:.0f} s",
}
"""Network -> what stands in the reason of a trial of it."""
STARTING_SECONDS = 2
LOAD_SECONDS = 8.0
DATA = "pictures"


def _networks(stage: Stage) -> None:
    """In the folder that commands are started in."""
    shutil.copyfile(str(ill_networks.__file__), stage.home / f"{NETWORKS}.py")


def poison(arena: Arena, long: bool) -> Iterator[Finding]:
    """Row 28."""
    yield _only_poison(arena, FaultPlan(folder=""), how="saved after each epoch")
    plan = FaultPlan(folder="", constants=ALWAYS_SAVING)
    if long:
        yield _only_poison(arena, plan, how="saved before each step")
    yield _one_of_eight(arena, plan)


def _only_poison(arena: Arena, plan: FaultPlan, *, how: str) -> Finding:
    """Three networks: one that is killed, one that leaves, one that hangs; a trial of each."""
    with arena.stage(plan, HPO_STALL_SECONDS=f"{STALL_SECONDS:g}") as stage:
        _networks(stage)
        names = ",".join(f"{NETWORKS}:{kind}" for kind in KINDS)
        launcher = stage.start(
            "launch", "--trials", "3", "--epochs", "5", "--backbone", names, "--workers", "1",
            "--pruner", "none", "--set", "batch_size=64", "--set", "lr=0.01",
            "--set", "weight_decay=0.0", "--sampler", "grid",
        )  # fmt: skip
        code = launcher.wait(300)
        stage.num_kills += 3 * (MOST_FRUITLESS_ATTEMPTS + 1)
        done = f"a network that kills, one that leaves, one that hangs at step 60, {how}; real"
        finding = audit(stage, "28", done=done, budget=0, epochs=5, failed=3)
        finding.check(code == 6, f"launch ended with {code}: {launcher.stderr[-200:]}")
        trials = stage.json("trials")
        said = launcher.stderr.strip().splitlines()[-1]
        finding.check(trials[-1]["reason"][:50] in said, f"the reason is not in {said!r}")
        for trial in trials:
            _ended_as_poison(finding, trial)
        return finding


def _ended_as_poison(finding: Finding, trial: Mapping[str, Any]) -> None:
    """One attempt came to the step, three came no further."""
    kind = str(trial["params"].get("backbone", "")).partition(":")[2]
    found = trial["state"], trial["attempts"], trial["steps"][-1:]
    expected = "FAIL", MOST_FRUITLESS_ATTEMPTS + 1, [12]
    finding.check(found == expected, f"trial {trial['number']} ({kind}) ended as {found}")
    reason = str(trial["reason"])
    finding.check(KINDS.get(kind, "?") in reason, f"the reason of {kind} is {reason!r}")


def _one_of_eight(arena: Arena, plan: FaultPlan) -> Finding:
    """The study goes on with the others."""
    with arena.stage(plan) as stage:
        _networks(stage)
        names = ["killed", *(f"well_{number}" for number in range(1, 8))]
        space = stage.home / "space.toml"
        space.write_text(
            f"[space]\nbackbone = {json.dumps([f'{NETWORKS}:{name}' for name in names])}\n"
            "batch_size = 64\nepochs = 5\n"
        )
        launcher = stage.start(
            "launch", "--space", str(space), "--trials", "8", "--sampler", "random",
            "--pruner", "none", "--seed", "3", "--workers", "2",
        )  # fmt: skip
        code = launcher.wait(300)
        trials = stage.json("trials")
        failed = [trial for trial in trials if trial["state"] == "FAIL"]
        stage.num_kills += sum(trial["attempts"] for trial in failed)
        done = "one network of eight kills its process at step 60, saved before each step; real"
        finding = audit(stage, "28", done=done, budget=8, epochs=5, failed=len(failed))
        finding.check(code == 0, f"launch ended with {code}: {launcher.stderr[-200:]}")
        finding.check(failed, "no trial of that network: nothing was tried")
        for trial in failed:
            _ended_as_poison(finding, trial)
        return finding


def sick_workers(arena: Arena, _long: bool) -> Iterator[Finding]:
    """Row 29."""
    with arena.stage(FaultPlan(folder="", step_seconds=0.3)) as stage:
        _networks(stage)
        data = _pictures(stage)
        launcher = stage.start(
            "launch", "--study", STUDY, "--data", f"./{DATA}", "--trials", "8", "--epochs", "8",
            "--backbone", f"{NETWORKS}:well", "--pruner", "none", "--workers", "1",
            "--set", "batch_size=64",
        )  # fmt: skip
        wait_for("a worker trains", lambda: stage.witness("leg"), seconds=240)
        join = ("worker", "--study", STUDY)
        with small_disk(stage.folder / "disk") as mounted:
            full = stage.start(*join, HPO_CHECKPOINTS=str(stage.folder / "disk"))
            if not mounted:
                limits = (MOST_FILE_BYTES, MOST_FILE_BYTES)
                resource.prlimit(full.pid, resource.RLIMIT_FSIZE, limits)
            wait_for("it trains", lambda: _trains(stage, full), seconds=240)
            ill = {
                "unknown device 'cuda:7'": stage.start(*join, "--device", "cuda:7"),
                "No module named 'einops'": stage.start(*join, WITHOUT_A_PACKAGE="1"),
            }
            codes = [worker.wait(240) for worker in ill.values()]
            away = data.rename(data.with_name("away"))
            # on another machine: here the study's data are in the cache
            ill["pictures"] = stage.start(*join, HPO_HOME=str(stage.folder / "elsewhere"))
            codes.append(ill["pictures"].wait(240))
            away.rename(data)
            sick = stage.json("status")["sick"]
            code = launcher.wait(300)
            with contextlib.suppress(ProcessLookupError):
                full.wait(60)
        done = "workers without device, package, data or disk join a healthy one; slow"
        finding = audit(stage, "29", done=done, budget=8, epochs=8)
        finding.check(code == 0, f"launch ended with {code}: {launcher.stderr[-200:]}")
        finding.check(codes == [2, 2, 5], f"the sick workers ended with {codes}")
        assert finding.counts is not None
        finding.check(finding.counts.attempts == 8, f"{finding.counts.attempts} attempts at 8")
        for said, worker in ill.items():
            last = worker.stderr.strip().splitlines()[-1:]
            finding.check(last and said in last[0], f"{said!r} is not in {last}")
            named = any(said in each["reason"] for each in sick)
            finding.check(named, f"status doesn't name {said!r} among {sick}")
        finding.check(len(SAID.findall(full.stderr)) == 1, "the full disk was not said once")
        finding.check(full.code == 0, f"the worker on a full disk ended with {full.code}")
        yield finding


def _trains(stage: Stage, command: Command) -> bool:
    return any(line["pid"] == command.pid for line in stage.witness("leg"))


def _pictures(stage: Stage) -> Path:
    """A folder of two classes."""
    chance, folder = np.random.default_rng(0), stage.home / DATA
    for index, name in enumerate(("dark", "light")):
        (folder / name).mkdir(parents=True)
        for number in range(150):
            pixels = chance.integers(120 * index, 120 * index + 120, (8, 8), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


def slow_data(arena: Arena, long: bool) -> Iterator[Finding]:
    """Row 32."""
    seconds = 10 * LOAD_SECONDS if long else LOAD_SECONDS
    starting = {} if long else {"hpo.watch._STARTING_SECONDS": STARTING_SECONDS}
    plan = FaultPlan(folder="", leg_seconds=0.1, load_seconds=seconds, constants=starting)
    with arena.stage(plan) as stage:
        launcher = stage.launch(trials=6, workers=2)
        wait_for("a worker is known", stage.workers, seconds=240)
        known = stage.json("status")["workers"]
        code = launcher.wait(240)
        done = f"{seconds:.0f} s until a worker has its data, a lease of {LEASE_SECONDS:.0f} s"
        finding = audit(stage, "32", done=done, budget=6)
        finding.check(code == 0, f"launch ended with {code}")
        finding.check(known, "status doesn't show the workers that load")
        pids = {line["pid"] for line in stage.witness("begin")}
        finding.check(len(pids) <= 2, f"{len(pids) - 2} workers left and were replaced")
        finding.check("killed" not in launcher.stderr, "a worker that loads was killed")
        finding.check(read_tables(stage).count("FAIL") == 0, "a trial has failed")
        yield finding
