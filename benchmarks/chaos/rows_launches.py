"""Rows 34 and 35: a launch beside another one, launches that are refused."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.chaos.audit import Finding, audit
from benchmarks.chaos.faults import FaultPlan
from benchmarks.chaos.stage import STUDY, Arena, Command, Stage, wait_for
from benchmarks.chaos.zygote import Forked, Zygote

LIMIT_SECONDS = 3600
EARLY: tuple[tuple[str, ...], ...] = (
    ("--workers", "none"),
    ("--devices", "cuda:7"),
    ("--trials", "0"),
    ("--data", "./no/such/folder"),
    ("--backbone", "resnet9"),
    ("--backbone", "no_package:net"),
    ("--space", "unknown.toml"),
    ("--timeout", "0"),
    ("--max-megabytes", "0.0001"),
    ("--try", "lr=100"),
    ("--from", "no-such-study"),
    ("--study", "a b"),
)
"""Refused whatever there is, by the command line or after the data was looked at."""
LATE: tuple[tuple[str, ...], ...] = (
    ("--seed", "5"),
    ("--epochs", "7"),
    ("--trials", "2"),
    ("--sampler", "random"),
    ("--folds", "2"),
    ("--from", STUDY),
)
"""Refused where the study is there."""


def second_launch(arena: Arena, _long: bool) -> Iterator[Finding]:
    """Row 34."""
    budget = 24
    with arena.stage(FaultPlan(folder="", leg_seconds=0.3)) as stage:
        first = stage.launch("--timeout", f"{LIMIT_SECONDS}s", trials=budget, workers=1, epochs=5)
        wait_for("its worker trains", lambda: stage.witness("leg"), seconds=240)
        limits = _limits(stage)
        second = stage.start("launch", "--study", STUDY, "--workers", "1")
        wait_for("both launches' workers train", lambda: len(_training(stage)) > 1, seconds=240)
        cores = [os.sched_getaffinity(pid) for pid in _training(stage)]
        smaller = stage.start("launch", "--study", STUDY, "--trials", "2")
        codes = smaller.wait(240), first.wait(240), second.wait(240)
        done = f"a launch without --trials and --timeout beside one with {budget}; simulated"
        finding = audit(stage, "34", done=done, budget=budget, epochs=5)
        finding.check(codes == (2, 0, 0), f"the smaller, the first, the second ended with {codes}")
        finding.check(_limits(stage) == limits, f"limits {limits} became {_limits(stage)}")
        finding.check(limits[0][1] is not None, "the study has no time limit: nothing was tried")
        assert finding.counts is not None
        finding.check(finding.counts.attempts == budget, "a trial was begun again")
        if len(os.sched_getaffinity(0)) > 1:
            apart = len(cores) > 1 and all(len(each) == 1 for each in cores)
            finding.check(apart and len(set.union(*cores)) == len(cores), f"cores: {cores}")
        else:
            finding.notes.append("a machine of one core: theirs were not compared")
        yield finding


def _limits(stage: Stage) -> list[tuple[Any, ...]]:
    return stage.query("SELECT budget, deadline FROM hpo_studies")


def _training(stage: Stage) -> list[int]:
    """Workers that have trained, and live."""
    pids = {line["pid"] for line in stage.witness("leg")}
    return [pid for pid in stage.workers() if pid in pids]


def refused_launches(arena: Arena, _long: bool) -> Iterator[Finding]:
    """Row 35."""
    started = time.monotonic()
    with arena.stage(FaultPlan(folder="", leg_seconds=0.1)) as stage:
        (stage.home / "unknown.toml").write_text("[space]\nspeed = 2\n")
        finding = Finding(
            row="35", done=f"{len(EARLY)} launches refused on no study, {len(EARLY + LATE)} on one"
        )
        zygote = Zygote(stage)
        try:
            _refused(finding, stage, zygote, EARLY)
            (studies,) = stage.query("SELECT to_regclass('studies')::text")
            made = studies[0] and stage.query("SELECT study_name FROM studies")
            finding.check(not made, f"a study was made: {made}")
            code = stage.launch("--timeout", "1h", trials=3, workers=1).wait(240)
            finding.check(code == 0, f"the launch that is not refused ended with {code}")
            before = _content(stage)
            _refused(finding, stage, zygote, (*EARLY, *LATE))
            finding.check(_content(stage) == before, "the tables have changed")
        finally:
            zygote.close()
    finding.seconds = time.monotonic() - started
    yield finding


def _refused(
    finding: Finding, stage: Stage, zygote: Zygote, launches: tuple[tuple[str, ...], ...]
) -> None:
    before = _files(stage)
    for options in launches:
        _said_in_a_line(finding, zygote.start("launch", *options), " ".join(options))
    made = _files(stage) - before
    finding.check(not made, f"files were made: {sorted(map(str, made))[:3]}")


def _said_in_a_line(finding: Finding, refused: Command | Forked, what: str) -> None:
    code, said = refused.wait(240), refused.err.read_text().strip().splitlines()
    finding.check(code in (2, 5), f"{what} ended with {code}: {said[-1:]}")
    usage = any(line.startswith("Usage:") for line in said)  # the command line's own refusal
    finding.check(len(said) == 1 or usage, f"{what}: said {len(said)} lines: {said[-1:]}")


def _content(stage: Stage) -> list[list[tuple[Any, ...]]]:
    tables = ("studies", "hpo_studies", "trials", "hpo_leases", "hpo_workers",
              "trial_user_attributes")  # fmt: skip
    return [stage.query(f"SELECT t::text FROM {table} t ORDER BY 1") for table in tables]


def _files(stage: Stage) -> set[Path]:
    """Of the product, not of the harness."""
    return {path for path in stage.home.rglob("*") if path.is_file()}
