"""Create or continue a study, and say where its workers are to run."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, cast

from hpo.claims import least_used
from hpo.errors import UsageError
from hpo.executors.local import LocalExecutor, num_cores, worker_devices
from hpo.logs import check_log_folder, open_log
from hpo.module_space import unheard
from hpo.options import LaunchOptions
from hpo.own_modules import is_own
from hpo.points import add_points, check_room
from hpo.samplers import grid_size
from hpo.settle import check_backbones, settle
from hpo.sharing import Say, shared
from hpo.spec import StudySpec, check_study_name
from hpo.warm_start import starting_points
from storage.database import Database
from storage.errors import StudyNotFound
from storage.leftovers import logs_of, remove_leftovers
from storage.snapshots import snapshot
from storage.studies import (
    StudyRecord,
    check_checkpoint_place,
    create_study,
    find_study,
    relaunch,
)
from trainer.config import Precision
from trainer.data.options import Progress, no_progress
from trainer.data.registry import settled_source, source_name

logger = logging.getLogger(__name__)
DEFAULT_BUDGET = 50


def check_options(options: LaunchOptions) -> None:
    """All that can be checked without the database, so that a refusal leaves no trace in it.

    Raises UsageError, ConfigError or StorageError. Imports torch.
    """
    from trainer.device import available_devices

    check_checkpoint_place()
    devices = worker_devices(available_devices(), options.devices, options.workers)
    if options.precision is not None:
        _check_precision(options.precision, devices)
    # where a study's own networks lie stands with the study
    named = options.given_fields().get("backbone", ())
    names = named if isinstance(named, tuple) else (named,)
    check_backbones({"backbone": tuple(name for name in names if not is_own(name))})
    if options.data is not None:
        settled_source(options.data)
    if options.study is None:
        check_study_name(source_name(settled_source(options.data or "digits")))
    check_log_folder()


def _check_precision(precision: str, devices: Iterable[str]) -> None:
    """Raises ConfigError if workers on one of these devices can't train in the precision."""
    from trainer.device import check_precision

    if precision != "auto":
        for device in set(devices):
            check_precision(cast(Precision, precision), device)


def prepare_study(
    database: Database, options: LaunchOptions, progress: Progress = no_progress
) -> StudyRecord:
    """The study of these options, made if there is none; nothing is written before all is checked.

    progress: is told how far the reading of pictures is. Raises UsageError if the study is there
    and differs from the options. Imports torch: the data is looked at before a study is made of it.
    """
    from trainer.device import available_devices

    check_options(options)
    name, data = _name_and_data(database, options)
    fields = options.given_fields()
    record = _found(database, name)
    if record is None:
        check_backbones(fields)
        spec, _ = settle(data, fields, options, progress)
        for reason in (*spec.space.idle(), *unheard(spec.space)):
            logger.warning("%s: here it changes nothing", reason)
    else:
        spec = StudySpec.from_json(record.spec)
        check_backbones(fields)  # the study knows where own ones lie
    given = {
        **fields,
        **options.limits.given(),
        **options.given_data_options(),
        **options.search.given(),
        "data": data if options.data else None,
        "seed": options.seed,
        "folds": options.folds,
        "objective": options.objective,
        "precision": options.precision,
    }
    given = {key: value for key, value in given.items() if value is not None}
    if record is not None:
        _check_same(record, given)
        available = available_devices()
        _check_precision(
            spec.precision, worker_devices(available, options.devices, options.workers)
        )
    budget = options.trials or (DEFAULT_BUDGET if record is None else record.budget)
    budget = within_grid(spec, budget)
    if record is not None and budget < record.budget:
        raise UsageError(
            f"study {name!r} has a budget of {record.budget} trials, which can grow but not shrink "
            f"to {budget}: leave --trials out to go on, or end the study with hpo stop"
        )
    if record is not None and snapshot(database, record.study_id).num_finished < budget:
        _look_at_files(spec, progress)
    points = starting_points(database, name, spec, options.search)
    if record is None:
        check_room(points, num_there=0, budget=budget)
        record = create_study(database, name, spec=spec.to_json(), budget=budget)
        _check_same(record, given)  # another launch may have made it meanwhile
    add_points(database, record, points, budget=budget)
    relaunch(
        database,
        record.study_id,
        budget=budget if options.trials else None,
        timeout_seconds=options.timeout_seconds,
    )
    for folder in remove_leftovers(database):
        logger.info("removed %s of a study that was deleted", folder)
    return find_study(database, name)


def _look_at_files(spec: StudySpec, progress: Progress) -> None:
    """Raises UsageError or DataError if the study's files have changed, or are gone.

    Its workers trust what the launch that made the study has read, for as long as the cache holds
    it. Data by name don't change; a DataModule is taken at its word, since it may take minutes.
    """
    if os.path.isabs(spec.data):
        spec.load_data(looks_anew=True, progress=progress)


def within_grid(spec: StudySpec, budget: int) -> int:
    """The budget, or the size of the study's grid if that is smaller. Raises UsageError."""
    if spec.sampler != "grid":
        return budget
    size = grid_size(spec.space)
    if size < budget:
        logger.warning("the grid has %d points: %d trials are enough", size, size)
    return min(size, budget)


def _found(database: Database, name: str) -> StudyRecord | None:
    try:
        return find_study(database, name)
    except StudyNotFound:
        return None


def _check_same(record: StudyRecord, given: Mapping[str, Any]) -> None:
    """Raises UsageError if the study is not what the options say."""
    differences = StudySpec.from_json(record.spec).differences(given)
    if differences:
        raise UsageError(
            f"study {record.name!r} exists with another spec: {'; '.join(differences)}; "
            "leave that option out to continue it, or give another --study"
        )


def _name_and_data(database: Database, options: LaunchOptions) -> tuple[str, str]:
    if options.study is not None and options.data is None:
        try:  # going on with a study needs no more than its name
            record = find_study(database, options.study)
            return options.study, str(record.spec["data"])
        except StudyNotFound:
            pass
    data = settled_source(options.data or "digits")
    return check_study_name(options.study or source_name(data)), data


def devices_of_workers(spec: StudySpec, options: LaunchOptions, say: Say) -> list[str]:
    """A device for each worker of this study, GPUs that other launches use least before others.

    Raises UsageError for devices that aren't there, ConfigError for those that don't compute in the
    study's precision. say: is told of what is measured. Imports torch.
    """
    from trainer.device import available_devices

    devices = worker_devices(least_used(available_devices()), options.devices, options.workers)
    _check_precision(spec.precision, devices)
    if options.workers == "auto" and any(device.startswith("cuda") for device in devices):
        return shared(spec, devices, say)
    return devices


def make_executor(
    record: StudyRecord,
    options: LaunchOptions,
    *,
    storage_url: str | None,
    command_line: Callable[[list[str]], None],
    say: Say,
    alone: bool = False,
) -> LocalExecutor:
    """Where this study's workers run. Raises as devices_of_workers.

    alone: a worker on a CPU has all cores, not one.
    """
    devices = devices_of_workers(StudySpec.from_json(record.spec), options, say)
    if devices.count("cpu") > num_cores():
        logger.warning("%d workers on %d cores: slower than one a core", len(devices), num_cores())
    return LocalExecutor(
        record.name,
        study_key=record.checkpoint_key,
        devices=devices,
        storage_url=storage_url,
        command_line=command_line,
        pins=not alone,
    )


def detach(record: StudyRecord, options: LaunchOptions, *, storage_url: str | None) -> Path:
    """Leave a launcher running in the background; returns its log file."""
    log = logs_of(record.checkpoint_key) / "launch.log"
    command = [sys.executable, "-P", "-m", "hpo", "launch", "--study", record.name]
    command += ["--workers", options.workers]
    if options.devices:
        command += ["--devices", options.devices]
    if options.timeout_seconds:
        command += ["--timeout", f"{options.timeout_seconds}s"]
    environment = {**os.environ, **({"HPO_STORAGE": storage_url} if storage_url else {})}
    with open(open_log(log), "ab") as output:
        subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            env=environment,
            start_new_session=True,
        )
    return log
