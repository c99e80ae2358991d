"""Rows 10 to 13: connections that are cut, silent, slow or refused."""

import contextlib
import itertools
import re
import statistics
import time
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import psycopg2
import sqlalchemy

from benchmarks.chaos.audit import Finding, audit
from benchmarks.chaos.faults import FaultPlan
from benchmarks.chaos.stage import STUDY, Arena, Overdue, Stage, repeat, wait_for
from tests.parts import PASSWORD
from tests.tcp_proxy import Fault, Strike, TcpProxy

WITHIN = {
    "ask": "SET trial_id = (SELECT max(trial_id)",
    "report": "SET reported_at = now(), images_per_second",
    "tell": "SET ended_at = now(), worker_id = NULL",
}
"""Operation -> what its transaction holds (storage/leases.py)."""
CUTS = (Fault.CUT_BEFORE, Fault.CUT_MEANWHILE, Fault.CUT_AFTER)
HOLE_SECONDS = 30.0
GIVE_UP_SECONDS = 25.0
ROUND_TRIPS = (0.0, 0.001, 0.02, 0.1)
MOST_CONNECTIONS = 100
"""Postgres's own default, which the arena's server has."""


def _through(stage: Stage, proxy: TcpProxy) -> str:
    url = sqlalchemy.make_url(stage.url).set(port=proxy.port)
    return url.render_as_string(hide_password=False)


def cut_in_a_commit(arena: Arena, long: bool) -> Iterator[Finding]:
    """Row 10."""
    rounds = 4 if long else 1
    plan = FaultPlan(folder="", leg_seconds=0.05)
    with TcpProxy(("127.0.0.1", arena.server.port)) as proxy, arena.stage(plan) as stage:
        budget = 15 * rounds
        launcher = stage.launch(trials=budget, workers=2, HPO_STORAGE=_through(stage, proxy))
        strikes = {
            (name, fault.name, round_): Strike(
                proxy, fault, statement="COMMIT", within=WITHIN[name]
            )
            for round_ in range(rounds)
            for name in WITHIN
            for fault in CUTS
        }

        def missed() -> list[tuple[str, str, int]]:
            return [what for what, strike in strikes.items() if not strike.happened.is_set()]

        def arm_next() -> None:
            left = missed()
            proxy.arm(strikes[left[0]] if left else None)

        repeat(arm_next, every=0.02, until=launcher, seconds=300)
        done = (
            f"the COMMIT of ask, report, tell cut before, while and after the server does it, "
            f"{rounds} times each; 2 workers, simulated"
        )
        finding = audit(stage, "10", done=done, budget=budget)
        finding.check(launcher.code == 0, f"launch ended with {launcher.code}")
        finding.check(not missed(), f"not tried: {missed()}")
        _undisturbed(finding, stage, budget=budget, workers=2)
        finding.notes.append(f"{len(strikes)} connections cut")
        yield finding


def _undisturbed(finding: Finding, stage: Stage, *, budget: int, workers: int) -> None:
    """No worker left, no trial was taken over."""
    assert finding.counts is not None
    attempts = finding.counts.attempts
    finding.check(attempts == budget, f"{attempts} attempts at {budget} trials")
    pids = {line["pid"] for line in stage.witness("begin")}
    finding.check(len(pids) <= workers, f"{len(pids) - workers} workers left and were replaced")


def black_hole(arena: Arena, _long: bool) -> Iterator[Finding]:
    """Row 11."""
    plan = FaultPlan(folder="", leg_seconds=0.3)
    with TcpProxy(("127.0.0.1", arena.server.port)) as proxy, arena.stage(plan) as stage:
        launcher = stage.launch(trials=12, workers=2, epochs=5, HPO_STORAGE=_through(stage, proxy))
        wait_for("a trial has ended", lambda: stage.witness("ended"), seconds=120)
        proxy.hold()
        held_at = time.time()
        time.sleep(HOLE_SECONDS)
        during = [line for line in stage.witness("reported") if line["at"] > held_at + 1]
        proxy.go_on()
        launcher.wait(240)
        # its lease expires meanwhile: whoever wakes first may take over what the other has
        stage.num_signals += 2
        done = f"nothing passes and nothing closes for {HOLE_SECONDS:.0f} s; 2 workers, simulated"
        finding = audit(stage, "11", done=done, budget=12, epochs=5)
        finding.check(launcher.code == 0, f"launch ended with {launcher.code}")
        finding.check(not during, f"{len(during)} reports came through the hole")
        _gives_up_in_time(finding, stage, held_at)
        pids = {line["pid"] for line in stage.witness("begin")}
        finding.check(len(pids) <= 2, f"{len(pids) - 2} workers left and were replaced")
        yield finding


def _gives_up_in_time(finding: Finding, stage: Stage, held_at: float) -> None:
    """By the times in the workers' logs."""
    first = []
    for log in (stage.home / "logs").rglob("worker-*.log"):
        said = re.findall(r"^([-\d]+ [:\d]+),(\d+) .*no answer in", log.read_text(), re.MULTILINE)
        times = [datetime.fromisoformat(at).timestamp() + int(ms) / 1000 for at, ms in said]
        first += [min(at for at in times if at > held_at) - held_at] if times else []
    finding.check(len(first) == 2, f"{len(first)} of 2 workers have noticed the hole")
    if first:
        finding.check(max(first) <= GIVE_UP_SECONDS, f"a call gave up after {max(first):.1f} s")
        finding.notes.append(f"calls gave up within {max(first):.1f} s")


def slow_network(arena: Arena, long: bool) -> Iterator[Finding]:
    """Row 12. The overhead is that of one worker, so that nobody waits for anybody's lock."""
    budget = 8 if long else 4
    costs: dict[float, tuple[float, float]] = {}
    for seconds in ROUND_TRIPS:
        plan = FaultPlan(folder="", leg_seconds=0.05)
        with TcpProxy(("127.0.0.1", arena.server.port)) as proxy, arena.stage(plan) as stage:
            stage.make_study(trials=budget, epochs=4)
            proxy.delay_seconds = seconds / 2
            worker = stage.start("worker", "--study", STUDY, HPO_STORAGE=_through(stage, proxy))
            code = worker.wait(300)
            done = f"round trips of {1000 * seconds:g} ms; one worker, simulated"
            finding = audit(stage, "12", done=done, budget=budget, epochs=4)
            finding.check(code == 0, f"the worker ended with {code}")
            _undisturbed(finding, stage, budget=budget, workers=1)
            costs[seconds] = _costs(stage.witness())
            a_trial, a_report = costs[seconds]
            finding.notes.append(
                f"beside its training a trial takes {a_trial:.2f} s and a report "
                f"{1000 * a_report:.0f} ms (medians)"
            )
            if seconds >= 0.02:
                trips = [(now - then) / seconds for now, then in
                         zip(costs[seconds], costs[0.0], strict=True)]  # fmt: skip
                finding.notes.append(f"about {trips[0]:.0f} and {trips[1]:.0f} round trips")
            yield finding


def _costs(log: Sequence[dict[str, Any]]) -> tuple[float, float]:
    """Medians in seconds: from a claim to the first leg and from the last one to the next claim;
    from the end of a leg to the beginning of the next."""
    reports, trials = [], []
    for before, after in itertools.pairwise(
        line for line in log if line["kind"] in ("claim", "begin", "leg")
    ):
        kinds = before["kind"], after["kind"]
        seconds = after["at"] - before["at"]
        if kinds == ("leg", "begin"):
            reports.append(seconds)
        elif kinds == ("claim", "begin"):
            trials.append(seconds)
        elif kinds == ("leg", "claim"):
            trials[-1] += seconds
    return statistics.median(trials), statistics.median(reports)


def crowded(arena: Arena, _long: bool) -> Iterator[Finding]:
    """Row 13."""
    budget = 60
    with arena.stage(FaultPlan(folder="", leg_seconds=0.5)) as stage:
        launcher = stage.launch(trials=budget, workers=2, epochs=5)
        wait_for("a trial has ended", lambda: stage.witness("ended"), seconds=120)
        others = _take_all(stage)
        full_at = time.time()
        try:
            refused = stage.start("worker", "--study", STUDY)
            code = refused.wait(240)
            waiting = stage.start("worker", "--study", STUDY)
            wait_for("a new worker says that it waits",
                     lambda: "waiting for the database" in waiting.stderr, seconds=240)  # fmt: skip
        finally:
            for other in others:
                other.close()
        crowded_seconds = time.time() - full_at
        codes = launcher.wait(240), waiting.wait(240)
        done = (
            f"all {len(others) + 3} connections taken for {crowded_seconds:.0f} s; 2 workers run, "
            "one comes and is refused, one comes and waits"
        )
        finding = audit(stage, "13", done=done, budget=budget, epochs=5)
        finding.check(codes == (0, 0), f"launch and the worker that waited ended with {codes}")
        said = refused.stderr.strip().splitlines()
        finding.check(code == 3 and "too many clients" in said[-1],
                      f"a worker that found no place ended with {code}: {said[-1:]}")  # fmt: skip
        finding.check(any(line["pid"] == waiting.pid for line in stage.witness("begin")),
                      "the worker that waited found nothing to do: nothing was tried")  # fmt: skip
        _undisturbed(finding, stage, budget=budget, workers=3)
        _same_pace(finding, stage, full_at, full_at + crowded_seconds)
        yield finding


def _same_pace(finding: Finding, stage: Stage, start: float, end: float) -> None:
    """Of those who ran before."""
    old = {line["pid"] for line in stage.witness("begin") if line["at"] < start}
    legs = [line for line in stage.witness("leg") if line["pid"] in old]
    during = sum(start < line["at"] < end for line in legs) / (end - start)
    after_end = max((line["at"] for line in legs), default=end)
    before = [line["at"] for line in legs if line["at"] < start]
    rest = len([line for line in legs if line["at"] > end]) / max(after_end - end, 1.0)
    finding.notes.append(f"{during:.1f} parts of an epoch a second meanwhile, {rest:.1f} after")
    finding.check(before, "nobody trained before: nothing was tried")
    finding.check(during > rest / 2, "those that ran became slow")


def _take_all(stage: Stage) -> list[Any]:
    """Every connection that the server still gives, also to a superuser."""
    others: list[Any] = []
    with contextlib.suppress(psycopg2.OperationalError):
        while True:
            others.append(psycopg2.connect(
                host="127.0.0.1", port=stage.server.port, user="postgres", password=PASSWORD,
                dbname=stage.database, connect_timeout=5,
            ))  # fmt: skip
    if len(others) < MOST_CONNECTIONS / 2:
        raise Overdue(f"only {len(others)} connections could be taken")
    return others
