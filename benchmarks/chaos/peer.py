"""hpo and Optuna alone under the same faults, one after the other.

    python -m benchmarks.chaos.peer      writes benchmarks/chaos-peer.md, at most seven minutes

Four workers, 50 trials of 12 epochs, every 1.5 s one worker killed with -9, every 8 s Postgres
restarted, at most 200 s. Optuna alone is `study.optimize` with heartbeats, its own retry callback
and its own callback for the budget; a loop starts each worker again that does not end with 0. No
trial is stopped early on either side, so that both have the same to do.
"""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import optuna

from benchmarks.chaos.__main__ import arena
from benchmarks.chaos.faults import FaultPlan
from benchmarks.chaos.stage import ROOT, Arena, Overdue, Stage
from hpo.measured import machine
from tests.parts import PASSWORD

BUDGET, WORKERS, EPOCHS, EPOCH_SECONDS = 50, 4, 12, 0.4
KILL_SECONDS, RESTART_SECONDS, MOST_SECONDS = 1.5, 8.0, 200.0
NEVER = 4 * EPOCHS
"""The first rung of a study that stops no trial early."""
COLUMNS = (
    "", "finished", "trials made", "left RUNNING", "kills", "restarts", "crashed workers",
    "epochs run", "of these wasted", "seconds",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A line of the table."""

    name: str
    finished: int
    made: int
    running: int
    kills: int
    restarts: int
    crashed: int
    run: int
    """Epochs, by the witness."""
    wasted: int
    """Those of trials that did not finish, and those run again."""
    seconds: float

    def line(self) -> str:
        """In Markdown."""
        share = f"{self.wasted} ({100 * self.wasted / max(self.run, 1):.0f} %)"
        more = "" if self.finished >= BUDGET else ", broken off"
        cells: Sequence[Any] = (
            self.name, f"{self.finished} of {BUDGET}", self.made, self.running, self.kills,
            self.restarts, self.crashed, self.run, share, f"{self.seconds:.0f}{more}",
        )  # fmt: skip
        return "| " + " | ".join(map(str, cells)) + " |"


def outcome(name: str, stage: Stage, *, crashed: int, seconds: float) -> Outcome:
    """By the tables and the witness."""
    states = stage.query("SELECT trial_id, state::text FROM trials")
    ended = {trial_id for trial_id, state in states if state in ("COMPLETE", "PRUNED")}
    legs = [(line["trial_id"], line["step"]) for line in stage.witness("leg")]
    return Outcome(
        name=name,
        finished=len(ended),
        made=len(states),
        running=sum(state == "RUNNING" for _, state in states),
        kills=stage.num_kills,
        restarts=stage.num_restarts,
        crashed=crashed,
        run=len(legs),
        wasted=len(legs) - len({leg for leg in legs if leg[0] in ended}),
        seconds=seconds,
    )


def under_faults(stage: Stage, kill: Callable[[], None], has_ended: Callable[[], bool]) -> float:
    """Kills and restarts until it has ended or the time is over; the seconds that it took."""
    started = time.monotonic()
    next_kill, next_restart = started + KILL_SECONDS, started + RESTART_SECONDS
    while not has_ended() and time.monotonic() - started < MOST_SECONDS:
        if time.monotonic() > next_kill:
            kill()
            next_kill += KILL_SECONDS
        if time.monotonic() > next_restart:
            stage.restart_postgres("fast")
            next_restart += RESTART_SECONDS
        time.sleep(0.05)
    return time.monotonic() - started


def of_hpo(where: Arena) -> Outcome:
    """hpo launch."""
    with where.stage(FaultPlan(folder="", leg_seconds=EPOCH_SECONDS)) as stage:
        stage.make_study(trials=BUDGET, epochs=EPOCHS)
        stage.query(f"UPDATE hpo_studies SET spec = jsonb_set(spec, '{{first_rung}}', '{NEVER}')")
        launcher = stage.launch(trials=BUDGET, workers=WORKERS, epochs=EPOCHS)
        seconds = under_faults(stage, stage.kill_a_worker, lambda: launcher.code is not None)
        launcher.send(signal.SIGKILL)
        with contextlib.suppress(Overdue):
            launcher.wait(10)
        stage.close()
        crashed = len(re.findall(r"ended (?:with exit code|by signal (?!9\b))", launcher.stderr))
        return outcome("hpo launch", stage, crashed=crashed, seconds=seconds)


@dataclass
class Loop(threading.Thread):
    """`until python peer_worker.py ...; do :; done`"""

    command: Sequence[str]
    environment: dict[str, str]
    log: Path
    ended: threading.Event
    process: subprocess.Popen[bytes] | None = None
    codes: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__(daemon=True)

    __hash__ = threading.Thread.__hash__

    def run(self) -> None:
        """Until one ends with 0."""
        while not self.ended.is_set() and 0 not in self.codes:
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    self.command, env=self.environment, stdout=log, stderr=log,
                    stdin=subprocess.DEVNULL, start_new_session=True,
                )  # fmt: skip
            self.codes.append(self.process.wait())


def of_optuna(where: Arena) -> Outcome:
    """study.optimize in four loops."""
    with where.stage() as stage, _loops(stage) as loops:
        chance = random.Random(0)

        def kill() -> None:
            found = [each for each in loops if each.is_alive() and each.process is not None]
            if found:
                process = chance.choice(found).process
                assert process is not None
                process.kill()
                stage.num_kills += 1

        seconds = under_faults(stage, kill, lambda: not any(each.is_alive() for each in loops))
        crashed = sum(
            code not in (0, -signal.SIGKILL) for each in loops for code in list(each.codes)
        )
        return outcome("`study.optimize`", stage, crashed=crashed, seconds=seconds)


@contextlib.contextmanager
def _loops(stage: Stage) -> Iterator[list[Loop]]:
    """A new study, and its workers' loops, started."""
    environment = {
        **stage.environment,
        "PYTHONPATH": str(ROOT),
        "PGHOST": "127.0.0.1",
        "PGPORT": str(stage.server.port),
        "PGUSER": "postgres",
        "PGPASSWORD": PASSWORD,
        "PGDATABASE": stage.database,
        "OMP_NUM_THREADS": "1",
    }
    make = (
        "import optuna; optuna.create_study(study_name='peer', direction='maximize', "
        "storage='postgresql+psycopg2://')"
    )
    subprocess.run([sys.executable, "-P", "-c", make], env=environment, check=True,
                   capture_output=True)  # fmt: skip
    given = ("peer", BUDGET, EPOCHS, EPOCH_SECONDS)
    command = [sys.executable, "-P", "-m", "benchmarks.chaos.peer_worker", *map(str, given)]
    ended = threading.Event()
    loops = [
        Loop(command, environment, stage.folder / f"loop-{index}.txt", ended)
        for index in range(WORKERS)
    ]
    for loop in loops:
        loop.start()
    try:
        yield loops
    finally:
        ended.set()
        stage.close()
        for loop in loops:
            loop.join(10)


def document(outcomes: Sequence[Outcome]) -> str:
    """The whole file."""
    where = machine()
    return "\n".join(
        [
            "# The same faults on hpo and on Optuna alone",
            "",
            f"Made by `python -m benchmarks.chaos.peer` on {date.today()}: {where['cores']} cores "
            f"of {where['cpu']}, Optuna {optuna.__version__}, one run each (n = 1), "
            f"load average {os.getloadavg()[2]:.0f} with all else that the machine did.",
            "",
            f"{WORKERS} workers, {BUDGET} trials of {EPOCHS} epochs of {EPOCH_SECONDS} s "
            f"(simulated; none is stopped early), one worker killed with -9 every {KILL_SECONDS} "
            f"s, Postgres restarted every {RESTART_SECONDS:.0f} s, broken off after "
            f"{MOST_SECONDS:.0f} s. Optuna alone is `study.optimize` with heartbeat_interval=1, "
            "RetryFailedTrialCallback and MaxTrialsCallback; a loop starts each worker again that "
            "died. Its workers load no torch, which ours do.",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|" + "---|" * len(COLUMNS),
            *(each.line() for each in outcomes),
            "",
        ]
    )


def main() -> None:
    """Both, and the table."""
    with arena(None) as where:
        outcomes = [of_hpo(where), of_optuna(where)]
    text = document(outcomes)
    (Path(__file__).parents[1] / "chaos-peer.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
