"""Where the product's commands run under faults: a database, a home and a witness of their own."""

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import psycopg2
import sqlalchemy

from benchmarks.chaos.faults import VARIABLE, Fault, FaultPlan
from storage.leases import MOST_FRUITLESS_ATTEMPTS
from tests.parts import PASSWORD, TcpPostgres

ROOT = Path(__file__).parents[2]
STUDY = "digits"
LEASE_SECONDS = 2.0


class Overdue(Exception):
    """Something did not happen in its time: the message says what."""


@dataclass
class Command:
    """A command of the product, running or ended, its output in files."""

    name: str
    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def code(self) -> int | None:
        """None while it runs; negative for the signal that ended it."""
        return self.process.poll()

    def send(self, number: signal.Signals) -> None:
        """Unless it has ended."""
        self.process.send_signal(number)

    def wait(self, seconds: float) -> int:
        """Its exit code. Raises Overdue."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise Overdue(f"{self.name} has not ended within {seconds:.0f} s") from error

    @property
    def stdout(self) -> str:
        return self.out.read_text()

    @property
    def stderr(self) -> str:
        return self.err.read_text()


@dataclass
class Stage:
    """One study in one database, and all processes that have to do with it."""

    folder: Path
    server: TcpPostgres
    database: str
    plan: FaultPlan
    variables: dict[str, str] = field(default_factory=dict)
    chance: random.Random = field(default_factory=lambda: random.Random(0))
    num_kills: int = 0
    """By the stage; what processes do to themselves stands in the witness."""
    num_signals: int = 0
    num_restarts: int = 0
    started: float = field(default_factory=time.monotonic)
    _num_commands: int = 0
    _processes: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def home(self) -> Path:
        """HPO_HOME."""
        return self.folder / "home"

    @property
    def url(self) -> str:
        """With the password in it."""
        url = sqlalchemy.make_url(self.server.url).set(database=self.database)
        return url.render_as_string(hide_password=False)

    @property
    def environment(self) -> dict[str, str]:
        """Of each command."""
        return {
            **os.environ,
            "HPO_HOME": str(self.home),
            "HPO_STORAGE": self.url,
            "HPO_LEASE_SECONDS": f"{LEASE_SECONDS:g}",
            "PYTHONPATH": f"{ROOT / 'benchmarks' / 'chaos' / 'inside'}{os.pathsep}{ROOT}",
            VARIABLE: self.plan.to_json(),
            **self.variables,
        }

    def start(self, *args: str, **variables: str) -> Command:
        """A command, in a session of its own, as a user's shell would start it."""
        out, err = self.output_files()
        with out.open("wb") as stdout, err.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "hpo.cli", *args],
                stdin=subprocess.DEVNULL,
                stdout=stdout,
                stderr=stderr,
                env={**self.environment, **variables},
                cwd=self.home,
                start_new_session=True,
            )
        self._processes.append(process)
        return Command(f"hpo {args[0]}", process, out, err)

    def output_files(self) -> tuple[Path, Path]:
        """For the next command."""
        self._num_commands += 1
        name = f"{self._num_commands:03d}"
        return self.folder / f"out-{name}.txt", self.folder / f"err-{name}.txt"

    def launch(self, *args: str, trials: int, workers: int, epochs: int = 3,
               **variables: str) -> Command:  # fmt: skip
        """hpo launch of the stage's study."""
        return self.start(
            "launch", "--trials", str(trials), "--workers", str(workers),
            "--epochs", str(epochs), "--backbone", "smallcnn", *args, **variables,
        )  # fmt: skip

    def make_study(self, *args: str, trials: int, epochs: int = 3) -> None:
        """The study without a worker: its launcher is killed when it has made it."""
        fault = Fault(point="after relaunch", command=True)
        plan = replace(self.plan, faults=(fault,))
        launcher = self.launch(
            *args, trials=trials, workers=1, epochs=epochs, **{VARIABLE: plan.to_json()}
        )
        if launcher.wait(240) != -signal.SIGKILL:
            raise Overdue(f"hpo launch says: {launcher.stderr[-300:]}")

    def json(self, command: str) -> Any:
        """What `hpo COMMAND --json` prints."""
        shown = self.start(command, "--json", **{VARIABLE: FaultPlan(folder=".").to_json()})
        if shown.wait(240) != 0:
            raise Overdue(f"hpo {command} says: {shown.stderr[-300:]}")
        return json.loads(shown.stdout)

    def query(self, statement: str) -> list[tuple[Any, ...]]:
        """Rows of a statement on the stage's database."""
        return query(self.server, self.database, statement)

    def witness(self, *kinds: str) -> list[dict[str, Any]]:
        """The lines of the log, oldest first."""
        log = self.folder / "witness.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        found = map(json.loads, lines)
        return [line for line in found if not kinds or line["kind"] in kinds]

    def workers(self, *, most_fruitless: int = 1_000) -> list[int]:
        """The pids of workers that the database knows and that live in this stage.

        most_fruitless: attempts in a row that came no further which their trial may have had.
        """
        no_answer = psycopg2.OperationalError, psycopg2.errors.UndefinedTable
        with contextlib.suppress(*no_answer):
            rows = self.query(
                "SELECT pid FROM hpo_workers LEFT JOIN hpo_leases USING (worker_id)"
                f" WHERE coalesce(fruitless_attempts, 0) <= {most_fruitless} ORDER BY worker_id"
            )
            return [pid for (pid,) in rows if self.is_ours(pid)]
        return []

    def kill_a_worker(self) -> None:
        """With SIGKILL, if there is one.

        One in the third attempt in a row without a report is spared: its death ends the trial, as
        it is to (row 3), and on a slow machine a kill a second comes to that.
        """
        found = self.workers(most_fruitless=MOST_FRUITLESS_ATTEMPTS - 1)
        if found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.chance.choice(found), signal.SIGKILL)
                self.num_kills += 1

    def restart_postgres(self, mode: str, *, down_seconds: float = 0.0) -> None:
        """mode: fast or immediate."""
        self.server.stop(mode)
        time.sleep(down_seconds)
        self.server.start()
        self.num_restarts += 1

    def is_ours(self, pid: int) -> bool:
        """Whether the process lives and has this stage's home in its environment."""
        try:
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return False
        return os.fsencode(f"HPO_HOME={self.home}") in variables and state != "Z"

    def processes(self) -> list[int]:
        """All that live in this stage, forked ones too."""
        pids = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
        return [pid for pid in pids if pid != os.getpid() and self.is_ours(pid)]

    def close(self) -> None:
        """End all processes, however deep and wherever they hang."""
        deadline = time.monotonic() + 20
        while (left := self.processes()) and time.monotonic() < deadline:
            for pid in left:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        for process in self._processes:
            process.wait(10)


def wait_for(what: str, holds: Callable[[], Any], *, seconds: float) -> Any:
    """The first true answer. Raises Overdue."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        found = holds()
        if found:
            return found
        time.sleep(0.05)
    raise Overdue(f"not within {seconds:.0f} s: {what}")


def slowness() -> float:
    """At least 1: how many processes share a core here. What takes a second then takes longer."""
    return max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))


def repeat(action: Callable[[], None], *, every: float, until: Command, seconds: float) -> None:
    """Again and again until the command has ended. Raises Overdue."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(Overdue):
            until.wait(every)
            return
        action()
    raise Overdue(f"{until.name} has not ended within {seconds:.0f} s")


def query(server: TcpPostgres, database: str, statement: str) -> list[tuple[Any, ...]]:
    """Rows of a statement, outside of any transaction."""
    connection = psycopg2.connect(
        host="127.0.0.1", port=server.port, user="postgres", password=PASSWORD,
        dbname=database, connect_timeout=5,
    )  # fmt: skip
    with contextlib.closing(connection):
        connection.autocommit = True
        with connection.cursor() as cursor:
            cursor.execute(statement)
            return list(cursor.fetchall()) if cursor.description else []


@dataclass
class Arena:
    """A Postgres, and a folder below which each stage has its own."""

    folder: Path
    server: TcpPostgres
    _num_stages: int = 0

    @contextlib.contextmanager
    def stage(self, plan: FaultPlan | None = None, **variables: str) -> Iterator[Stage]:
        """A new database and home; all processes have ended afterwards."""
        self._num_stages += 1
        name = f"stage_{self._num_stages}"
        folder = self.folder / name
        (folder / "home").mkdir(parents=True)
        query(self.server, "postgres", f"CREATE DATABASE {name}")
        given = {**(vars(plan) if plan else {}), "folder": str(folder)}
        stage = Stage(folder, self.server, name, FaultPlan(**given), variables)
        try:
            yield stage
        finally:
            stage.close()
