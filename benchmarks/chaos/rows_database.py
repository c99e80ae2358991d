"""Rows 8, 9, 14, 15, 31, 36: the database goes and comes, workers come and go."""

import contextlib
import math
import random
import signal
import time
from collections.abc import Iterator

from benchmarks.chaos.audit import Finding, audit
from benchmarks.chaos.faults import FaultPlan
from benchmarks.chaos.stage import STUDY, Arena, Command, Stage, repeat, wait_for
from benchmarks.chaos.zygote import Forked, Zygote
from hpo.errors import ExitCode
from hpo.spec import StudySpec
from storage.leases import MOST_FRUITLESS_ATTEMPTS
from tests.parts import TcpPostgres, free_port

BUDGET = 50
MOST_CONNECTIONS = 20


def postgres_restarted(arena: Arena, long: bool) -> Iterator[Finding]:
    """Row 8."""
    budget, workers, every = (200, 4, 7) if long else (20, 4, 4)
    with arena.stage(FaultPlan(folder="", leg_seconds=1.0)) as stage:
        launcher = stage.launch(trials=budget, workers=workers, epochs=5)
        # a launcher that finds no database for ten seconds at its start says so and ends
        wait_for("a trial has begun", lambda: stage.witness("bound"), seconds=240)
        modes = iter(("fast", "immediate") * 1000)
        repeat(
            lambda: stage.restart_postgres(next(modes)),
            every=every, until=launcher, seconds=900 if long else 300,
        )  # fmt: skip
        done = (
            f"Postgres restarted every {every} s, fast and immediate; {workers} workers, simulated"
        )
        finding = audit(stage, "8", done=done, budget=budget, epochs=5)
        finding.check(launcher.code == 0, f"launch ended with {launcher.code}")
        finding.check(stage.num_restarts > 2, f"only {stage.num_restarts} restarts: too short")
        _nobody_left(finding, stage, workers)
        yield finding


def postgres_down(arena: Arena, long: bool) -> Iterator[Finding]:
    """Row 9."""
    for seconds in (6.0, 60.0) if long else (6.0,):
        stage_variables = {"HPO_STALL_SECONDS": "4"}
        with arena.stage(FaultPlan(folder="", leg_seconds=0.3), **stage_variables) as stage:
            launcher = stage.launch(trials=16, workers=2, epochs=5)
            wait_for("a trial has ended", lambda: stage.witness("ended"), seconds=240)
            stage.restart_postgres("immediate", down_seconds=seconds)
            launcher.wait(180)
            done = f"Postgres down for {seconds:.0f} s, longer than a lease and than a stall (4 s)"
            finding = audit(stage, "9", done=done, budget=16, epochs=5)
            finding.check(launcher.code == 0, f"launch ended with {launcher.code}")
            finding.check(finding.counts and finding.counts.attempts == 16, "a lease was stolen")
            _nobody_left(finding, stage, 2)
            yield finding


def away_for_long(arena: Arena, long: bool) -> Iterator[Finding]:
    """Row 31. The launcher's own patience is that of its user."""
    patience, away, budget = 5, 60.0 if long else 25.0, 40
    patient = {"storage.database.OUTAGE_SECONDS": patience}
    with arena.stage(FaultPlan(folder="", leg_seconds=0.3, constants=patient)) as stage:
        launcher = stage.launch("--pruner", "none", trials=budget, workers=2, epochs=5)
        wait_for("a worker trains", lambda: stage.witness("begin"), seconds=240)
        alone = stage.start("worker", "--study", STUDY)
        wait_for("all train", lambda: len(_trainers(stage)) == 3, seconds=240)
        before = _trainers(stage)
        stage.restart_postgres("immediate", down_seconds=away)
        # each worker that has left cuts a part of an epoch
        stage.num_signals += len(before)
        left = alone.wait(240)
        code = launcher.wait(240)
        done = f"Postgres away for {away:.0f} s, a worker's patience of {patience} s; simulated"
        finding = audit(stage, "31", done=done, budget=budget, epochs=5)
        finding.check(code == 0, f"launch ended with {code}: {launcher.stderr[-200:]}")
        finding.check(left == ExitCode.GIVEN_BACK, f"the worker alone ended with {left}")
        new = _trainers(stage) - before
        finding.check(len(new) == 2, f"{len(new)} workers came after the outage, not 2")
        finding.check("waiting for the database" in launcher.stderr, "launch doesn't say it waits")
        yield finding


def _trainers(stage: Stage) -> set[int]:
    return {line["pid"] for line in stage.witness("leg")}


def few_connections(arena: Arena, long: bool) -> Iterator[Finding]:
    """Row 36. A worker that waits for a connection is not known to the database for that long."""
    budget, workers = (400, 30) if long else (60, 30)
    starting = {} if long else {"hpo.watch._STARTING_SECONDS": 4}
    plan = FaultPlan(folder="", leg_seconds=1.0, constants=starting)
    with _small_server(arena) as server, Arena(server.folder, server).stage(plan) as stage:
        launcher = stage.launch(trials=budget, workers=workers)
        code = launcher.wait(900 if long else 300)
        done = f"{workers} workers, {MOST_CONNECTIONS} connections; simulated"
        finding = audit(stage, "36", done=done, budget=budget)
        finding.check(code == 0, f"launch ended with {code}: {launcher.stderr[-200:]}")
        log = launcher.stderr
        replaced = log.count("starting another")
        finding.check(replaced == 0, f"{replaced} workers were replaced")
        finding.check("killed" not in log, "workers that wait for a connection were killed")
        assert finding.counts is not None
        finding.check(finding.counts.attempts == budget, f"{finding.counts.attempts} attempts")
        logs = (stage.home / "logs").rglob("worker-*.log")
        waited = sum("waiting for the database" in each.read_text() for each in logs)
        finding.check(waited, "no worker had to wait for a connection: nothing was tried")
        finding.notes.append(f"{waited} workers waited, {len(_trainers(stage))} trained")
        yield finding


@contextlib.contextmanager
def _small_server(arena: Arena) -> Iterator[TcpPostgres]:
    folder = arena.folder / "small"
    folder.mkdir(parents=True)
    server = TcpPostgres(folder, free_port())
    server.make()
    with (folder / "data" / "postgresql.conf").open("a") as settings:
        settings.write(f"max_connections = {MOST_CONNECTIONS}\n")
    server.start()
    try:
        yield server
    finally:
        server.stop("immediate")


def _nobody_left(finding: Finding, stage: Stage, workers: int) -> None:
    pids = {line["pid"] for line in stage.witness("begin")}
    finding.check(len(pids) <= workers, f"{len(pids) - workers} workers left and were replaced")


def empty_database(arena: Arena, long: bool) -> Iterator[Finding]:
    """Row 14. With the product's own lease: 32 processes on few cores can be still for 2 s."""
    lease = f"{StudySpec.lease_seconds:g}"
    plan = FaultPlan(folder="", leg_seconds=0.1)
    with arena.stage(plan, HPO_LEASE_SECONDS=lease) as stage:
        zygote = Zygote(stage)
        try:
            early = [zygote.start("worker", "--study", STUDY) for _ in range(16)]
            codes = [worker.wait(240) for worker in early]
            wrong = _refusals(early, codes, code=2)
            num_launchers = 16 if long else 2
            launchers = [
                stage.launch(trials=BUDGET, workers=16 // num_launchers)
                for _ in range(num_launchers)
            ]
            codes = [launcher.wait(300) for launcher in launchers]
        finally:
            zygote.close()
        done = (
            f"16 workers on an empty database at one moment, then {num_launchers} launchers "
            "with 16 workers together"
        )
        finding = audit(stage, "14", done=done, budget=BUDGET)
        finding.violations += wrong
        finding.check(set(codes) == {0}, f"launchers ended with {codes}")
        (schemas,) = stage.query("SELECT count(*) FROM hpo_schema")
        (studies,) = stage.query("SELECT count(*) FROM studies")
        finding.check((schemas, studies) == ((1,), (1,)), f"{schemas} schemas, {studies} studies")
        yield finding


def _refusals(commands: list[Forked], codes: list[int], *, code: int) -> list[str]:
    wrong = [f"a worker ended with {each}" for each in codes if each != code]
    for command in commands:
        lines = command.err.read_text().strip().splitlines()
        if len(lines) != 1:
            wrong.append(f"a worker said {len(lines)} lines: {lines[-1:]}")
    return wrong[:3]


def coming_and_going(arena: Arena, long: bool) -> Iterator[Finding]:
    """Row 15."""
    for round_ in range(20 if long else 1):
        with arena.stage(FaultPlan(folder="", leg_seconds=0.2)) as stage:
            zygote = Zygote(stage)
            try:
                launcher = stage.launch(trials=BUDGET, workers=2)
                wait_for("a worker trains", lambda: stage.witness("begin"), seconds=240)
                _come_and_go(stage, zygote, launcher, random.Random(round_))
            finally:
                zygote.close()
            done = f"16 workers, budget {BUDGET}, starting and stopping at random: {round_ + 1}"
            finding = audit(stage, "15", done=done, budget=BUDGET)
            finding.check(launcher.code == 0, f"launch ended with {launcher.code}")
            yield finding


def _come_and_go(stage: Stage, zygote: Zygote, launcher: Command, chance: random.Random) -> None:
    """Until the launcher has ended: 14 beside its two, told to go or killed as they train."""
    running: dict[Forked, float] = {}

    def turn() -> None:
        now = time.monotonic()
        claimed = {line["pid"] for line in stage.witness("claim")}
        for worker, until in list(running.items()):
            if worker.code is not None:
                del running[worker]
            elif until == math.inf and worker.pid in claimed:
                running[worker] = now + chance.uniform(0, 3)
            elif now > until:
                number = chance.choice((signal.SIGTERM, signal.SIGINT, signal.SIGKILL))
                if worker.pid not in stage.workers(most_fruitless=MOST_FRUITLESS_ATTEMPTS - 1):
                    number = signal.SIGTERM  # see Stage.kill_a_worker
                stage.num_kills += number == signal.SIGKILL
                stage.num_signals += number != signal.SIGKILL
                worker.send(number)
                del running[worker]
        if len(running) < 14:
            running[zygote.start("worker", "--study", STUDY)] = math.inf

    repeat(turn, every=0.1, until=launcher, seconds=300)
    for worker in running:
        worker.wait(120)
