"""Compares a stage's tables with its witness: the invariants I1 to I6 of docs/faults.md."""

import itertools
import time
from collections import Counter, defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from benchmarks.chaos.stage import Stage
from tests.parts import PASSWORD

STEPS_PER_EPOCH = 4


@dataclass(frozen=True, kw_only=True)
class Counts:
    """What a stage's study came to."""

    kills: int
    signals: int
    restarts: int
    complete: int
    pruned: int
    failed: int
    attempts: int
    epochs: float
    """In the witness, all attempts together."""
    epochs_twice: float
    """Run to their end more than once."""
    legs_cut: int
    """Parts of an epoch that were begun and not ended."""
    lost: int
    doubled: int
    running: int
    """Trials left RUNNING or WAITING."""


@dataclass(kw_only=True)
class Finding:
    """One line of the table."""

    row: str
    done: str
    counts: Counts | None = None
    seconds: float = 0.0
    notes: list[str] = field(default_factory=list)
    violations: list[str] = field(default_factory=list)

    def check(self, holds: Any, otherwise: str) -> None:
        """Note a violation unless it holds."""
        if not holds:
            self.violations.append(otherwise)


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What the database has in the end."""

    trials: Sequence[tuple[int, int, str, bool, int]]
    """(trial_id, number, state, has a lease, attempts)"""
    values: Mapping[int, Mapping[int, float]]
    """trial_id -> step -> value"""
    num_doubled_reports: int
    num_open_leases: int

    def count(self, *states: str) -> int:
        """Trials in one of these states."""
        return sum(state in states for _, _, state, _, _ in self.trials)


def read_tables(stage: Stage) -> Tables:
    """In Optuna's own words: RUNNING is not yet turned into waiting."""
    values: dict[int, dict[int, float]] = defaultdict(dict)
    rows = stage.query(
        "SELECT trial_id, step, intermediate_value FROM trial_intermediate_values"
        " ORDER BY trial_id, step"
    )
    for trial_id, step, value in rows:
        values[trial_id][step] = value
    trials: Any = stage.query(
        "SELECT t.trial_id, number, state::text, lease_id IS NOT NULL, coalesce(attempts, 0)"
        " FROM trials t LEFT JOIN hpo_leases USING (trial_id) ORDER BY number"
    )
    return Tables(
        trials=trials,
        values=values,
        num_doubled_reports=len(rows) - sum(map(len, values.values())),
        num_open_leases=stage.query(
            "SELECT count(*) FROM hpo_leases WHERE ended_at IS NULL"
        )[0][0],
    )  # fmt: skip


def audit(
    stage: Stage,
    row: str,
    *,
    done: str,
    budget: int,
    epochs: int = 3,
    failed: int = 0,
    edited: Collection[int] = (),
    tracebacks: bool = False,
) -> Finding:
    """The study of the stage after its end.

    failed: trials that are to end as FAIL; edited: numbers of trials that somebody else ended;
    tracebacks: whether the logs may hold some (of trainings that raise).
    """
    tables, log = read_tables(stage), stage.witness()
    faults = Counter(line["signal"] for line in log if line["kind"] == "fault")
    num_kills = stage.num_kills + faults.pop("SIGKILL", 0)
    num_signals = stage.num_signals + faults.total()
    num_faults = num_kills + num_signals + stage.num_restarts
    finding = Finding(row=row, done=done, seconds=time.monotonic() - stage.started)
    legs = _legs(log)
    num_finished = tables.count("COMPLETE", "PRUNED")
    doubled_ends = _ended_twice(log)
    begun = sum(line["kind"] == "begin" for line in log)
    ended = sum(map(len, legs.values()))
    finding.counts = Counts(
        kills=num_kills,
        signals=num_signals,
        restarts=stage.num_restarts,
        complete=tables.count("COMPLETE"),
        pruned=tables.count("PRUNED"),
        failed=tables.count("FAIL"),
        attempts=sum(attempts for *_, attempts in tables.trials),
        epochs=_epochs(legs, lambda _: 0),
        epochs_twice=_epochs(legs, lambda _: 1),
        legs_cut=begun - ended,
        lost=max(0, budget - num_finished),
        doubled=max(0, num_finished - budget) + len(doubled_ends),
        running=tables.count("RUNNING", "WAITING"),
    )
    finding.check(num_finished == budget, f"I1: {num_finished} of {budget} trials have ended")
    finding.check(not doubled_ends, f"I1: trials {doubled_ends} were ended twice")
    finding.check(finding.counts.running == 0, f"I2: {finding.counts.running} left RUNNING")
    finding.check(tables.num_open_leases == 0, f"I2: {tables.num_open_leases} leases left open")
    with_lease = sum(state == "FAIL" and leased for _, _, state, leased, _ in tables.trials)
    finding.check(with_lease == failed, f"I2: {with_lease} trials failed, not {failed}")
    swept = finding.counts.failed - with_lease
    finding.check(swept <= num_faults, f"I2: {swept} trials swept in {num_faults} faults")
    _check_reports(finding, tables, legs, epochs, edited)
    _check_parameters(finding, log)
    _check_best(finding, stage, tables, legs, edited)
    excess = begun - len(legs)
    finding.check(
        excess <= num_faults,
        f"I6: {excess} parts of an epoch were begun again or cut in {num_faults} faults",
    )
    _check_logs(finding, stage, tracebacks=tracebacks)
    delays = take_over_seconds(log)
    if delays:
        middle = sorted(delays)[len(delays) // 2]
        finding.notes.append(f"taken over in {middle:.1f} s (median), {max(delays):.1f} s (most)")
    return finding


def take_over_seconds(log: Sequence[Mapping[str, Any]]) -> list[float]:
    """From the last sign of each attempt that was cut to the claim of the next one."""
    last_seen: dict[int, float] = {}
    delays = []
    for line in log:
        trial_id = line["trial_id"]
        if line["kind"] == "claim" and line["attempts"] > 1 and trial_id in last_seen:
            delays.append(line["at"] - last_seen[trial_id])
        if trial_id is not None:
            last_seen[trial_id] = line["at"]
    return delays


def _legs(log: Sequence[Mapping[str, Any]]) -> dict[tuple[int, int], list[float]]:
    """(trial_id, step) -> the values that it came to, one for each time that it was run."""
    legs: dict[tuple[int, int], list[float]] = defaultdict(list)
    for line in log:
        if line["kind"] == "leg":
            legs[line["trial_id"], line["step"]].append(line["value"])
    return dict(legs)


def _epochs(legs: Mapping[tuple[int, int], list[float]], first: Any) -> float:
    """Of all runs of each leg from the `first`-th on."""
    total = 0
    for _, group in itertools.groupby(sorted(legs), key=lambda leg: leg[0]):
        before = 0
        for leg in group:
            total += (leg[1] - before) * (len(legs[leg]) - first(leg))
            before = leg[1]
    return total / STEPS_PER_EPOCH


def _ended_twice(log: Sequence[Mapping[str, Any]]) -> list[int]:
    ends: dict[int, set[int]] = defaultdict(set)
    for line in log:
        if line["kind"] == "ended":
            ends[line["trial_id"]].add(line["token"])
    return [trial_id for trial_id, tokens in ends.items() if len(tokens) > 1]


def _check_reports(
    finding: Finding,
    tables: Tables,
    legs: Mapping[tuple[int, int], list[float]],
    epochs: int,
    edited: Collection[int],
) -> None:
    finding.check(
        tables.num_doubled_reports == 0, f"I3: {tables.num_doubled_reports} reports stand twice"
    )
    for (trial_id, step), values in legs.items():
        if len(set(values)) > 1:
            finding.violations.append(f"trial {trial_id}, step {step} came to {values}")
    for trial_id, number, state, _, _ in tables.trials:
        found = dict(tables.values.get(trial_id, {}))
        run = {step: values[0] for (owner, step), values in legs.items() if owner == trial_id}
        if number in edited:
            continue
        strange = {step: value for step, value in found.items() if run.get(step) != value}
        finding.check(not strange, f"I3: trial {number} has reports that nobody made: {strange}")
        if state == "COMPLETE":
            finding.check(found == run, f"I3: trial {number} reported {found}, ran {run}")
            whole = max(run, default=0) == epochs * STEPS_PER_EPOCH
            finding.check(whole, f"I3: trial {number} is complete after step {max(run, default=0)}")


def _check_parameters(finding: Finding, log: Sequence[Mapping[str, Any]]) -> None:
    given: dict[tuple[int, str], set[Any]] = defaultdict(set)
    for line in log:
        if line["kind"] == "param":
            given[line["trial_id"], line["name"]].add(line["value"])
    changed = {key: values for key, values in given.items() if len(values) > 1}
    finding.check(not changed, f"I4: parameters changed: {changed}")


def _check_best(
    finding: Finding,
    stage: Stage,
    tables: Tables,
    legs: Mapping[tuple[int, int], list[float]],
    edited: Collection[int],
) -> None:
    status = stage.json("status")
    shown = (status["complete"], status["pruned"], status["failed"], status["running"],
             status["waiting"])  # fmt: skip
    states = ("COMPLETE", "PRUNED", "FAIL", "RUNNING", "WAITING")
    counted = tuple(tables.count(state) for state in states)
    finding.check(shown == counted, f"status says {shown}, the tables {counted} ({states})")
    final = {
        number: max(
            ((step, values[0]) for (owner, step), values in legs.items() if owner == trial),
            default=(0, 0.0),
        )
        for trial, number, state, _, _ in tables.trials
        if state == "COMPLETE" and number not in edited
    }
    if final and not edited:
        largest = max(value for _, value in final.values())
        best = status["best"]["value"]
        finding.check(best == largest, f"I5: the best is {best}, the largest in the log {largest}")


def _check_logs(finding: Finding, stage: Stage, *, tracebacks: bool) -> None:
    logs = [*stage.folder.glob("*.txt"), *(stage.home / "logs").rglob("*.log")]
    for path in logs:
        text = path.read_text(errors="replace")
        finding.check(PASSWORD not in text, f"the password stands in {path.name}")
        at = text.find("Traceback (most recent call last)")
        if at >= 0 and not tracebacks:
            last = next((row for row in text[at:].splitlines()[1:] if row[:1].strip()), "")
            finding.violations.append(f"a traceback in {path.name}: {last[:200]}")
