"""Create or continue a study, start workers, watch them, end with an exit code."""

import logging
import os
import re
import signal
import subprocess
import sys
import time
import types
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hpo.errors import ExitCode, Interrupted, StudyFailsError, UsageError, WorkersDie
from hpo.executors.local import LocalExecutor, LocalWorker, num_cores, worker_devices
from hpo.progress import ProgressView
from hpo.rungs import first_rung
from hpo.space import SearchSpace, default_space, read_space
from hpo.spec import StudySpec, check_study_name
from storage import leases
from storage.database import OUTAGE_SECONDS, Database
from storage.errors import DatabaseUnreachable, StudyNotFound
from storage.home import home
from storage.snapshots import StudySnapshot, snapshot
from storage.studies import StudyRecord, create_study, find_study, relaunch
from trainer.config import ConfigError
from trainer.data.registry import settled_source, source_name

logger = logging.getLogger(__name__)
DEFAULT_BUDGET = 50
_POLL_SECONDS = 0.5
_LEAVING_SECONDS = 15.0
_MOST_DEATHS_IN_A_ROW = 5
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, kw_only=True)
class LaunchOptions:
    """What `hpo launch` was told; None is what was left out."""

    study: str | None = None
    data: str | None = None
    trials: int | None = None
    epochs: int | None = None
    space: Path | None = None
    backbones: str | None = None
    seed: int | None = None
    workers: str = "auto"
    devices: str | None = None
    timeout_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.trials is not None and not 1 <= self.trials <= 1_000_000:
            raise UsageError(f"--trials must be between 1 and 1000000, got {self.trials}")
        if self.epochs is not None and not 1 <= self.epochs <= 100_000:
            raise UsageError(f"--epochs must be between 1 and 100000, got {self.epochs}")
        if self.study is not None:
            check_study_name(self.study)

    def given_fields(self) -> dict[str, Any]:
        """Fields of the space that an option or the space file sets."""
        fields = dict(read_space(self.space).fields) if self.space else {}
        if self.backbones is not None:
            names = [name.strip() for name in self.backbones.split(",")]
            fields["backbone"] = SearchSpace.from_json({"backbone": names}).fields["backbone"]
        if self.epochs is not None:
            fields["epochs"] = self.epochs
        return fields


def prepare_study(database: Database, options: LaunchOptions) -> StudyRecord:
    """The study of these options, made if there is none. Raises UsageError if it differs.

    Imports torch: the data is looked at before a study is made of it.
    """
    name, data = _name_and_data(database, options)
    fields = options.given_fields()
    _check_backbones(fields)
    try:
        record = find_study(database, name)
    except StudyNotFound:
        spec = _new_spec(data, fields, seed=options.seed or 0)
        budget = options.trials or DEFAULT_BUDGET
        record = create_study(database, name, spec=spec.to_json(), budget=budget)
    spec = StudySpec.from_json(record.spec)
    given = {**fields, "data": data if options.data else None, "seed": options.seed}
    known = {key: value for key, value in given.items() if value is not None}
    differences = spec.differences(known)
    if differences:
        raise UsageError(
            f"study {name!r} exists with another spec: {'; '.join(differences)}; "
            "leave that option out to continue it, or give another --study"
        )
    relaunch(
        database,
        record.study_id,
        budget=options.trials,
        timeout_seconds=options.timeout_seconds,
    )
    return find_study(database, name)


def _name_and_data(database: Database, options: LaunchOptions) -> tuple[str, str]:
    if options.study is not None and options.data is None:
        try:  # going on with a study needs no more than its name
            record = find_study(database, options.study)
            return options.study, str(record.spec["data"])
        except StudyNotFound:
            pass
    data = settled_source(options.data or "digits")
    return check_study_name(options.study or source_name(data)), data


def _check_backbones(fields: Mapping[str, Any]) -> None:
    from trainer.backbones import BACKBONES
    from trainer.config import unknown_name

    named = fields.get("backbone", ())
    for name in named if isinstance(named, tuple) else (named,):
        if name not in BACKBONES:
            raise ConfigError(unknown_name("backbone", name, BACKBONES))


def _new_spec(data: str, fields: Mapping[str, Any], *, seed: int) -> StudySpec:
    from trainer.data.registry import load
    from trainer.device import available_devices

    dataset = load(data, seed=seed)
    space = default_space(
        input_size=dataset.input_size,
        num_train=len(dataset.train),
        flips=dataset.flips,
        num_cores=num_cores() if available_devices() == ["cpu"] else None,
    )
    space = space.replace(**fields)
    return StudySpec(
        data=data,
        fingerprint=dataset.fingerprint,
        space=space,
        seed=seed,
        first_rung=first_rung(
            num_train=len(dataset.train), largest_batch=int(space.largest("batch_size"))
        ),
        lease_seconds=_seconds("HPO_LEASE_SECONDS", StudySpec.lease_seconds),
        stall_seconds=_seconds("HPO_STALL_SECONDS", StudySpec.stall_seconds),
    )


def _seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable)
    return default if text is None else parse_duration(variable, text)


def parse_duration(option: str, text: str) -> float:
    """Seconds of '90s', '30m', '2h' or '90'. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text.strip())
    seconds = float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600}[match[2]] if match else 0.0
    if seconds <= 0:
        raise UsageError(f"{option} takes a time above 0, like 90s, 30m or 2h, got {text!r}")
    return seconds


def make_executor(
    record: StudyRecord, options: LaunchOptions, *, storage_url: str | None
) -> LocalExecutor:
    """Where this study's workers run. Raises UsageError for devices that aren't there."""
    from trainer.device import available_devices

    devices = worker_devices(available_devices(), options.devices, options.workers)
    if devices.count("cpu") > num_cores():
        logger.warning("%d workers on %d cores: slower than one a core", len(devices), num_cores())
    return LocalExecutor(
        record.name,
        study_key=record.checkpoint_key,
        devices=devices,
        storage_url=storage_url,
    )


def detach(record: StudyRecord, options: LaunchOptions, *, storage_url: str | None) -> Path:
    """Leave a launcher running in the background; returns its log file."""
    log = home() / "logs" / f"{record.checkpoint_key:d}" / "launch.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-P", "-m", "hpo.cli", "launch", "--study", record.name]
    command += ["--workers", options.workers]
    if options.devices:
        command += ["--devices", options.devices]
    if options.timeout_seconds:
        command += ["--timeout", f"{options.timeout_seconds}s"]
    environment = {**os.environ, **({"HPO_STORAGE": storage_url} if storage_url else {})}
    with log.open("ab") as output:
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    return log


@dataclass
class Watch:
    """Keeps a study's workers alive until there is no work, and shows how it goes."""

    database: Database
    record: StudyRecord
    executor: LocalExecutor
    num_workers: int
    view: ProgressView
    _workers: list[LocalWorker] = field(default_factory=list)
    _received: signal.Signals | None = None
    _deaths_in_a_row: int = 0

    def run(self) -> StudySnapshot:
        """The study when its workers have left, each with nothing more to do.

        Raises Interrupted after a signal, StudyFailsError, WorkersDie, DatabaseUnreachable.
        """
        self.database.patience_seconds = OUTAGE_SECONDS
        before = {number: signal.signal(number, self._on_signal) for number in _SIGNALS}
        try:
            study = snapshot(self.database, self.record.study_id)
            if study.num_finished < study.budget:
                self._workers = [self.executor.start(index) for index in range(self.num_workers)]
            with self.view:
                while self._workers and self._received is None:
                    self._look()
                    time.sleep(_POLL_SECONDS)
            if self._received is not None:
                raise Interrupted(f"interrupted: {self._left()}")
            return snapshot(self.database, self.record.study_id)
        finally:
            self._end_workers()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _look(self) -> None:
        for worker in list(self._workers):
            code = worker.process.poll()
            if code is None:
                continue
            self._workers.remove(worker)
            if code == ExitCode.STUDY_FAILS:
                raise StudyFailsError(self._why_it_fails())
            if code != ExitCode.DONE:
                self._replace(worker, code)
        self.view.show(snapshot(self.database, self.record.study_id))

    def _replace(self, worker: LocalWorker, code: int) -> None:
        leases.forget_worker(self.database, worker.id)
        lived = time.monotonic() - worker.started_at
        self._deaths_in_a_row = 1 if lived > 60 else self._deaths_in_a_row + 1
        ended = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        if self._deaths_in_a_row > max(_MOST_DEATHS_IN_A_ROW, 2 * self.num_workers) and code > 0:
            raise WorkersDie(f"workers end {ended}: {last_line(worker.log)} (see {worker.log})")
        logger.warning("worker %s ended %s: starting another", worker.id, ended)
        self._workers.append(self.executor.start(worker.index))

    def _why_it_fails(self) -> str:
        trials = snapshot(self.database, self.record.study_id).trials
        reasons = [trial.attributes.get("reason") for trial in trials if trial.state == "FAIL"]
        return f"{len(reasons)} trials failed, the last one: {reasons[-1] if reasons else '-'}"

    def _left(self) -> str:
        try:
            self.database.patience_seconds = 5.0
            study = snapshot(self.database, self.record.study_id)
        except DatabaseUnreachable as error:
            return f"{error}"
        return how_to_go_on(self.record.name, study)

    def _end_workers(self) -> None:
        """Ask them to leave; those that don't are killed, and their trials are free at once."""
        self.executor.signal(self._workers, signal.SIGTERM)
        deadline = time.monotonic() + _LEAVING_SECONDS
        for worker in self._workers:
            try:
                worker.process.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                worker.process.kill()
                worker.process.wait()
                leases.forget_worker(self.database, worker.id)
        self._workers = []

    def _on_signal(self, number: int, _frame: types.FrameType | None) -> None:
        if self._received is not None:
            for worker in self._workers:
                worker.process.kill()
            os._exit(ExitCode.INTERRUPTED)
        self._received = signal.Signals(number)


def how_to_go_on(name: str, study: StudySnapshot) -> str:
    """What is left, and the command that goes on."""
    left = study.budget - study.num_finished
    return f"{left} of {study.budget} trials are left; go on with: hpo launch --study {name}"


def last_line(log: Path) -> str:
    """The last line of a log file that says anything."""
    try:
        lines: Sequence[str] = log.read_text(errors="replace").splitlines()
    except OSError:
        return "no log"
    return next((line for line in reversed(lines) if line.strip()), "nothing in its log")
