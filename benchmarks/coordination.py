"""What the coordination costs: reports, decisions, claims, many workers, short trials.

    python -m benchmarks.coordination    writes benchmarks/coordination.json and prints a table

A Postgres of its own with Postgres's default of 100 connections, over TCP on this machine. The
calls are the product's own (leases, OpenStudy, TrialRun, Worker); the training is simulated: it
waits, and its accuracy comes from the trial's learning rate. About five minutes.
"""

import contextlib
import json
import math
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psycopg2
import sqlalchemy
from optuna.trial import TrialState

from benchmarks.chaos.__main__ import arena
from benchmarks.chaos.stage import query
from hpo.measured import machine
from hpo.objective import TrialRun
from hpo.rungs import judge
from hpo.space import Range, SearchSpace
from hpo.spec import StudySpec
from storage import leases
from storage.database import Database
from storage.leases import Lease
from storage.schema import ensure_tables
from storage.studies import OpenStudy, StudyRecord, create_study
from tests.parts import PASSWORD, TcpPostgres
from trainer.config import TrainConfig
from trainer.data.dataset import ImageDataset
from trainer.data.registry import load
from trainer.device import DevicePlan
from trainer.reports import ProgressReport

NUM_TRIALS, NUM_REPORTS = 1_000, 50
NUM_MEASURED_TRIALS, NUM_MEASURED_REPORTS = 30, 300
NUM_WORKERS, EPOCH_SECONDS, NUM_EPOCHS, TRIALS_PER_WORKER = 64, 2.0, 10, 2
NUM_SHORT_TRIALS, NUM_SHORT_WORKERS, SHORT_TRIAL_SECONDS = 500, 4, 1.0
TO_HOLD = {
    "report and decision, p95, s": 0.010,
    "claim, ask and tell, median, s": 0.150,
    "64 workers: report, p95, s": 0.250,
    "64 workers: errors": 0,
    "64 workers: connections a worker": 1.2,
    "500 short trials: time over the ideal": 1.2,
}
"""The figures to hold; connections come with a storage of our own."""


def make_study(url: str, *, budget: int, epochs: int, first_rung: int) -> tuple[StudyRecord, Any]:
    """A study with the default space, in an empty database."""
    database = Database(url)
    database.open()
    ensure_tables(database)
    data = load("digits", seed=0)
    fields = {
        "lr": Range(low=1e-4, high=1e-1, log=True),
        "batch_size": (32, 64, 128),
        "backbone": ("smallcnn", "resnet8"),
        "weight_decay": Range(low=1e-5, high=1e-1, log=True),
        "epochs": epochs,
    }
    spec = StudySpec(
        data="digits",
        fingerprint=data.fingerprint,
        space=SearchSpace(fields=fields),
        seed=0,
        first_rung=first_rung,
    )
    record = create_study(database, "study", spec=spec.to_json(), budget=budget)
    database.engine.dispose()
    return record, data


def calls_of_one_worker(url: str) -> dict[str, Any]:
    """Seconds of each call, beside a study of NUM_TRIALS x NUM_REPORTS."""
    budget = NUM_TRIALS + NUM_MEASURED_TRIALS + 1
    record, data = make_study(url, budget=budget, epochs=NUM_REPORTS, first_rung=4)
    database = Database(url)
    spec, study = StudySpec.from_json(record.spec), OpenStudy(database, record)
    times: dict[str, list[float]] = {"first": []}

    def timed(name: str, call: Callable[[], Any]) -> Any:
        started = time.perf_counter()
        result = call()
        times.setdefault(name, []).append(time.perf_counter() - started)
        return result

    def a_trial(num_reports: int) -> None:
        lease = timed("claim", lambda: leases.claim(database, record.study_id, "w",
                                                    lease_seconds=30))  # fmt: skip
        assert isinstance(lease, Lease), lease
        run = timed("ask", lambda: TrialRun(study, spec, lease, data, device="cpu",
                                            pulse=lambda: None))  # fmt: skip
        timed("suggest", run._suggest)
        trial_id = run._trial_id
        for step in range(4, 4 * num_reports + 4, 4):
            value = 0.5 + step / 1000

            def report(step: int = step, value: float = value) -> None:
                study.report(lease, step, value, images_per_second=1.0)

            def decide(step: int = step, value: float = value) -> None:
                found = study.standing(step, value, except_trial_id=trial_id)
                judge(
                    step=step, value=value, num_better=found.num_better,
                    num_others=found.num_others, num_epochs=NUM_REPORTS, eta=4,
                )  # fmt: skip

            timed("report", report)
            timed("decision", decide)
        timed("tell", lambda: study.end(lease, TrialState.COMPLETE, value=0.5,
                                        reason="measured"))  # fmt: skip

    a_trial(1)  # makes the parameters' names known to the filled trials
    _fill(database, record)
    fresh = OpenStudy(database, record)
    study = fresh
    started = time.perf_counter()
    a_trial(1)
    times = {"first": [time.perf_counter() - started]}
    num_reports = math.ceil(NUM_MEASURED_REPORTS / (NUM_MEASURED_TRIALS - 1))
    for _ in range(NUM_MEASURED_TRIALS - 1):
        a_trial(num_reports)
    database.engine.dispose()
    both = [a + b for a, b in zip(times["report"], times["decision"], strict=True)]
    parts = [times[name] for name in ("claim", "ask", "suggest", "tell")]
    whole = [sum(each) for each in zip(*parts, strict=True)]
    return {
        "report and decision, p95, s": percentile(both, 0.95),
        "claim, ask and tell, median, s": statistics.median(whole),
        "first trial of a process, s": times["first"][0],
        "medians, s": {name: round(statistics.median(each), 4) for name, each in times.items()},
    }


def _fill(database: Database, record: StudyRecord) -> None:
    """NUM_TRIALS finished trials like the study's first one, with a curve each."""
    first = "(SELECT min(trial_id) FROM trials)"
    given = {"study": record.study_id, "trials": NUM_TRIALS, "reports": NUM_REPORTS}
    statements = (
        "INSERT INTO trials (number, study_id, state, datetime_start, datetime_complete)"
        " SELECT n, :study, 'COMPLETE', now() - interval '1 h', now()"
        " FROM generate_series(1, :trials) n",
        "INSERT INTO trial_params (trial_id, param_name, param_value, distribution_json)"
        " SELECT t.trial_id, param_name,"
        "  CASE WHEN param_name IN ('lr', 'weight_decay')"
        "   THEN param_value * exp(random() - 0.5) ELSE param_value END, distribution_json"
        f" FROM trials t, trial_params p WHERE p.trial_id = {first} AND t.number > 0",
        "INSERT INTO trial_values (trial_id, objective, value, value_type)"
        " SELECT trial_id, 0, random(), 'FINITE' FROM trials WHERE number > 0",
        "INSERT INTO trial_intermediate_values"
        " (trial_id, step, intermediate_value, intermediate_value_type)"
        " SELECT trial_id, 4 * n, random(), 'FINITE'"
        " FROM trials, generate_series(1, :reports) n WHERE number > 0",
        "INSERT INTO hpo_leases (study_id, trial_id, token, reported_at, ended_at)"
        " SELECT :study, trial_id, nextval('hpo_tokens'), now(), now() - interval '1 h'"
        " FROM trials WHERE number > 0",
    )
    with database.engine.begin() as connection:
        for statement in statements:
            connection.execute(sqlalchemy.text(statement), given)
    with database.engine.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").exec_driver_sql("ANALYZE")


@dataclass(frozen=True, kw_only=True)
class Simulated:
    """In a worker's process: the training waits, and each report is timed."""

    folder: Path
    data: ImageDataset
    epoch_seconds: float
    times: list[float] = field(default_factory=list)

    def install(self) -> None:
        """Instead of the product's own training and data; nothing else is replaced."""
        import hpo.objective

        report = OpenStudy.report

        def timed(*args: Any, **kwargs: Any) -> None:
            started = time.perf_counter()
            report(*args, **kwargs)
            self.times.append(time.perf_counter() - started)

        for owner, name, value in (
            (OpenStudy, "report", timed),
            (hpo.objective, "train", self.train),
            (hpo.objective, "choose_plan", lambda *_, **__: DevicePlan(device="cpu")),
            (StudySpec, "load_data", lambda *_, **__: self.data),
        ):
            assert hasattr(owner, name), name
            setattr(owner, name, value)

    def train(
        self, config: TrainConfig, _data: Any, _plan: Any, *, resume: Any,
        pulse: Callable[[], None], **_: Any,
    ) -> Generator[ProgressReport, None, None]:  # fmt: skip
        """Reports at a quarter of an epoch and after each; never resumed."""
        assert resume is None
        steps = [1, *range(4, 4 * config.epochs + 1, 4)]
        before = 0
        for step in steps:
            deadline = time.monotonic() + (step - before) / 4 * self.epoch_seconds
            while (left := deadline - time.monotonic()) > 0:
                time.sleep(min(left, 0.1))
                pulse()
            before = step
            accuracy = 0.9 - abs(math.log10(config.lr) + 2.5) / 10 - 0.2 / step
            yield ProgressReport(
                step=step, epoch=step / 4, images_seen=step, train_loss=1.0, val_loss=1.0,
                val_accuracy=accuracy, val_balanced_accuracy=accuracy, val_macro_f1=accuracy,
                seconds=1.0, images_per_second=1.0,
                finished=step == steps[-1], state=_NO_STATE,
            )  # fmt: skip


class _NoState:
    def to_bytes(self) -> bytes:
        """Of no use, and small."""
        return b"simulated"


_NO_STATE: Any = _NoState()


def many(
    server: TcpPostgres, url: str, folder: Path, *, workers: int, budget: int, epochs: int,
    epoch_seconds: float, first_rung: int,
) -> dict[str, Any]:  # fmt: skip
    """A study run by so many workers: seconds, errors, connections, the reports' times."""
    record, data = make_study(url, budget=budget, epochs=epochs, first_rung=first_rung)
    name = str(sqlalchemy.make_url(url).database)
    simulated = Simulated(folder=folder, data=data, epoch_seconds=epoch_seconds)
    folder.mkdir()
    started = time.monotonic()
    processes = [
        multiprocessing.get_context("fork").Process(target=_work, args=(simulated, url, index))
        for index in range(workers)
    ]
    with _connections(server, name) as connections:
        for process in processes:
            process.start()
        for process in processes:
            process.join(600)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    logs = [path.read_text() for path in folder.glob("*.log")]
    begun = query(server, name, "SELECT extract(epoch FROM min(claimed_at)) FROM hpo_leases")
    ended = query(server, name, "SELECT extract(epoch FROM max(ended_at)) FROM hpo_leases")
    trials = query(server, name, "SELECT count(*) FROM trials WHERE state IN"
                                 " ('COMPLETE', 'PRUNED')")  # fmt: skip
    times = [each for path in folder.glob("*.json") for each in json.loads(path.read_text())]
    return {
        "seconds": float(ended[0][0]) - float(begun[0][0]),
        "seconds with the start of the workers": time.monotonic() - started,
        "trials": trials[0][0],
        "reports": len(times),
        "report, median, s": statistics.median(times),
        "report, p95, s": percentile(times, 0.95),
        "exit codes": sorted({code for code in codes if code != 0}, key=str),
        "errors": sum(len(re.findall("WARNING|ERROR|Traceback", log)) for log in logs)
        + sum(code != 0 for code in codes),
        "connections": max(connections),
        "connections a worker": max(connections) / workers,
        "attempts": query(server, name, "SELECT sum(attempts) FROM hpo_leases")[0][0],
        "study": record.name,
    }


def _work(simulated: Simulated, url: str, index: int) -> None:
    """One worker, in a process forked for it."""
    import logging

    from hpo.worker import Worker

    log = os.open(simulated.folder / f"{index}.log", os.O_WRONLY | os.O_CREAT)
    os.dup2(log, sys.stderr.fileno())
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    os.environ["HPO_CHECKPOINTS"] = str(simulated.folder / "checkpoints")
    simulated.install()
    code = Worker(Database(url), "study", device="cpu").run()
    (simulated.folder / f"{index}.json").write_text(json.dumps(simulated.times))
    os._exit(code)


@contextlib.contextmanager
def _connections(server: TcpPostgres, name: str) -> Iterator[list[int]]:
    """How many there are to this database, twice a second, over one that was there before."""
    found: list[int] = []
    ended = threading.Event()
    own = psycopg2.connect(
        host="127.0.0.1", port=server.port, user="postgres", password=PASSWORD, dbname=name
    )
    own.autocommit = True

    def sample() -> None:
        with contextlib.closing(own), own.cursor() as cursor:
            while not ended.wait(0.5):
                with contextlib.suppress(psycopg2.OperationalError):  # 64 workers come first
                    cursor.execute(
                        "SELECT count(*) FROM pg_stat_activity"
                        " WHERE datname = current_database() AND pid <> pg_backend_pid()"
                    )
                    found.append(cursor.fetchone()[0])

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def percentile(values: Sequence[float], share: float) -> float:
    """The value that this share of them does not exceed."""
    return sorted(values)[min(len(values) - 1, math.ceil(share * len(values)) - 1)]


def measure() -> dict[str, Any]:
    """All of it, in turn, each in a database of its own."""
    with arena(None) as where, tempfile.TemporaryDirectory() as folder:
        server = where.server

        def new(name: str) -> str:
            query(server, "postgres", f"CREATE DATABASE {name}")
            url = sqlalchemy.make_url(server.url).set(database=name)
            return url.render_as_string(hide_password=False)

        one = calls_of_one_worker(new("one"))
        never = 4 * NUM_EPOCHS
        crowd = many(
            server, new("crowd"), Path(folder, "crowd"), workers=NUM_WORKERS,
            budget=NUM_WORKERS * TRIALS_PER_WORKER, epochs=NUM_EPOCHS,
            epoch_seconds=EPOCH_SECONDS, first_rung=never,
        )  # fmt: skip
        short = many(
            server, new("short"), Path(folder, "short"), workers=NUM_SHORT_WORKERS,
            budget=NUM_SHORT_TRIALS, epochs=1, epoch_seconds=SHORT_TRIAL_SECONDS,
            first_rung=4,
        )  # fmt: skip
    ideal = NUM_SHORT_TRIALS * SHORT_TRIAL_SECONDS / NUM_SHORT_WORKERS
    return {
        "report and decision, p95, s": one["report and decision, p95, s"],
        "claim, ask and tell, median, s": one["claim, ask and tell, median, s"],
        "64 workers: report, p95, s": crowd["report, p95, s"],
        "64 workers: errors": crowd["errors"],
        "64 workers: connections a worker": crowd["connections a worker"],
        "500 short trials: time over the ideal": short["seconds"] / ideal,
        "details": {"one worker": one, "64 workers": crowd, "500 short trials": short},
    }


def main() -> None:
    """Measure, write, print."""
    found = measure()
    result = {"machine": machine(), "n": 1, **found}
    text = json.dumps(result, indent=1, default=float)
    Path(__file__).with_suffix(".json").write_text(text + "\n")
    print(f"{'figure':40s} {'found':>9s} {'to hold':>9s}")
    for name, limit in TO_HOLD.items():
        print(f"{name:40s} {found[name]:9.3f} {limit:9.3f}{'' if found[name] <= limit else '  no'}")


if __name__ == "__main__":
    main()
