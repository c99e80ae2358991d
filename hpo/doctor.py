"""What would go wrong in the night, found in the minute before."""

import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from sqlalchemy import text

from hpo.errors import ExitCode, exit_code
from hpo.executors.local import num_cores
from hpo.forecast import Forecast, Pace, forecast
from hpo.launch import DEFAULT_BUDGET, devices_of_workers
from hpo.logs import check_log_folder
from hpo.module_space import unheard
from hpo.options import LaunchOptions
from hpo.progress import duration
from hpo.settle import check_backbones, settle
from hpo.space import Range
from hpo.spec import StudySpec
from hpo.speeds import Crew
from storage.database import Database
from storage.home import home
from storage.schema import ensure_tables
from trainer.config import DataError, DeviceBusy, TrainConfig, TrainingFailure
from trainer.data.options import Progress
from trainer.data.registry import settled_source

if TYPE_CHECKING:
    from hpo.folding import EpochWork
    from trainer.data.dataset import ImageDataset
    from trainer.speed import Speed

PROBE_SECONDS = 1.5
"""Of training for each backbone."""
_PINGS = 20
_SLOW_PING_MS = 20.0
_CROOKED = 10.0
"""Images of the largest class over those of the smallest, from which it is said."""
_FEW_IMAGES = 20
_LITTLE_DISK_BYTES = 5 * 2**30

Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One thing that was looked at. code: what a launch would end with, if it is a problem."""

    about: str
    level: Level
    text: str
    code: ExitCode = ExitCode.DONE

    def to_json(self) -> dict[str, Any]:
        """As `hpo doctor --json` prints it."""
        return {"about": self.about, "level": self.level, "text": self.text}


def examine(
    open_database: Callable[[], Database], options: LaunchOptions, progress: Progress
) -> Iterator[Finding]:
    """Look at the database, the hardware, the data, the space; forecast the study's end.

    Each finding comes as soon as it is known. What can't be looked at is a finding, too.
    """
    yield from _guarded("database", lambda: _database(open_database))
    yield from _guarded("disk", _disk)
    settled: list[tuple[StudySpec, ImageDataset]] = []

    def data() -> Iterator[Finding]:
        fields = options.given_fields()
        check_backbones(fields)
        source = settled_source(options.data or "digits")
        settled.append(settle(source, fields, options, progress))
        yield from _data(settled[0][1])

    yield from _guarded("data", data)
    if settled:
        from hpo.folding import work_of_an_epoch

        spec, dataset = settled[0]
        work = work_of_an_epoch(dataset, folds=spec.folds, seed=spec.seed)
        yield from _folds(spec, work)
        yield from _space(spec, dataset, work)
        yield from _guarded("speed", lambda: _speed(spec, options, dataset, work))


def _guarded(about: str, look: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    """What a user can cause is a finding; a bug is raised."""
    try:
        yield from look()
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        kind = "data" if isinstance(error, DataError) else about
        yield Finding(about=kind, level="problem", text=str(error).strip(), code=code)


def _database(open_database: Callable[[], Database]) -> Iterator[Finding]:
    database = open_database()
    ensure_tables(database)
    with database.engine.connect() as connection:
        version = connection.execute(text("SHOW server_version")).scalar()
        most, used = connection.execute(_CONNECTIONS).one()
        pings = []
        for _ in range(_PINGS):
            started = time.perf_counter()
            connection.execute(text("SELECT 1")).scalar()
            pings.append(1000 * (time.perf_counter() - started))
    ping = statistics.median(pings)
    yield Finding(
        about="database",
        level="warning" if ping > _SLOW_PING_MS else "ok",
        text=f"{database.name}, PostgreSQL {version}, a round trip takes {ping:.2g} ms, "
        f"{used} of {most} connections are in use",
    )


_CONNECTIONS = text("""
    SELECT current_setting('max_connections')::int, count(*) FROM pg_stat_activity
    WHERE backend_type = 'client backend'
""")


def _disk() -> Iterator[Finding]:
    check_log_folder()
    folder = home()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    yield Finding(
        about="disk",
        level="warning" if free < _LITTLE_DISK_BYTES else "ok",
        text=f"{free / 2**30:.1f} GiB free for checkpoints and logs",
    )


def _data(data: "ImageDataset") -> Iterator[Finding]:
    size = "x".join(map(str, data.input_size))
    yield Finding(
        about="data",
        level="ok",
        text=f"{data.name}: {len(data.train):,} images of {size} to train on, {len(data.val):,} to "
        f"validate, {data.num_classes} classes",
    )
    counts = [int(n) for n in data.train.labels.bincount(minlength=data.num_classes)]
    least, most = min(counts), max(counts)
    rarest = data.class_names[counts.index(least)]
    if most > _CROOKED * max(1, least) or least < _FEW_IMAGES:
        yield Finding(
            about="classes",
            level="warning",
            text=f"{rarest!r} has {least:,} images to train on, the largest class {most:,}: "
            "accuracy says little of rare classes (--objective macro_f1 judges all classes alike, "
            "the field balance trains them alike)",
        )
    else:
        yield Finding(about="classes", level="ok", text=f"{least:,} to {most:,} images each")
    found = data.findings
    if found.unusable:
        first = found.unusable[0]
        yield Finding(
            about="pictures",
            level="warning",
            text=f"{len(found.unusable)} of {found.num_pictures} can't be read and are left out, "
            f"the first: {first.where!r} ({first.reason})",
        )
    if found.duplicates:
        yield Finding(
            about="duplicates",
            level="warning",
            text=f"{sum(map(len, found.duplicates))} pictures in {len(found.duplicates)} groups of "
            f"the same or nearly the same, kept on one side of the split; {len(found.removed)} "
            f"left out, {len(found.contradictions)} groups with different labels",
        )


def _folds(spec: StudySpec, work: "EpochWork") -> Iterator[Finding]:
    """What validation on parts in turn costs."""
    if spec.folds is not None:
        yield Finding(
            about="folds",
            level="ok",
            text=f"a trial trains {spec.folds} models, each on {work.num_train:,} images or more, "
            f"and is validated on all {work.num_checked:,}: its epochs cost {spec.folds} times "
            "those of one model",
        )


def _space(spec: StudySpec, data: "ImageDataset", work: "EpochWork") -> Iterator[Finding]:
    """Fields that can't matter, batches that can't be."""
    idle = [
        *spec.space.idle(),
        *unheard(spec.space),
        *_without_choice(spec),
        *_beyond_the_data(spec, data, work.num_train),
    ]
    if not spec.space.searched:
        idle.append("nothing is searched: all is fixed")
    for words in idle:
        yield Finding(about="space", level="warning", text=words)
    if not idle:
        yield Finding(about="space", level="ok", text=f"searched: {', '.join(spec.space.searched)}")


def _without_choice(spec: StudySpec) -> Iterator[str]:
    for name, what in spec.space.fields.items():
        if isinstance(what, tuple) and len(what) == 1:
            yield f"{name} has one choice, {what[0]!r}"
        elif isinstance(what, Range) and what.low == what.high:
            yield f"{name} can only be {what.low:g}"


def _beyond_the_data(spec: StudySpec, data: "ImageDataset", num_train: int) -> Iterator[str]:
    space, side = spec.space, min(data.input_size[1:])
    if min(space.choices("patience")) >= spec.epochs:
        yield f"patience is never used up in {spec.epochs} epochs"
    for name, bound in (("translate", side), ("cutout", 2 * side)):
        if space.largest(name) >= bound:
            yield f"{name} of {space.largest(name)} can hide all of an image of {side} pixels"
    largest = int(space.largest("batch_size"))
    if largest > num_train:
        yield f"a batch of {largest} is more than the {num_train} images there are"


def _speed(
    spec: StudySpec, options: LaunchOptions, data: "ImageDataset", work: "EpochWork"
) -> Iterator[Finding]:
    """Images per second of what trials can be, with all workers busy, and when the study ends."""
    devices = devices_of_workers(spec, options, lambda _: None)
    yield from _hardware(devices, work.image_bytes)
    paces: dict[str, Pace] = {}
    num_refused = 0
    trainable = spec.space.choices("trainable")
    with Crew(spec, devices) as crew:
        for backbone in spec.space.choices("backbone"):
            complaint = _above_a_limit(spec, backbone, data, devices[0])
            if complaint is not None:
                num_refused += len(trainable)
                yield Finding(about="speed", level="warning", text=complaint)
                continue
            for parts in trainable:
                what = backbone if len(trainable) == 1 else f"{backbone}, trainable = {parts}"
                try:
                    found = crew.speeds(backbone, seconds=PROBE_SECONDS, trainable=parts)
                except (DeviceBusy, TrainingFailure) as failure:
                    num_refused += 1
                    yield Finding(about="speed", level="problem", text=f"{what}: {failure}",
                                  code=ExitCode.USAGE)  # fmt: skip
                    continue
                paces[what] = _pace_of(spec, found)
                yield _pace(what, paces[what], found, work)
    if paces:
        num_trials = options.trials or DEFAULT_BUDGET
        end = forecast(
            spec,
            num_trials=num_trials,
            num_workers=len(devices),
            num_train=work.num_trained,
            num_val=work.num_checked,
            num_val_early=work.num_checked_early,
            paces=paces,
            num_refused=num_refused,
        )
        yield Finding(about="end", level="ok", text=_end(end, num_trials, len(devices)))


def _above_a_limit(spec: StudySpec, backbone: str, data: "ImageDataset", device: str) -> str | None:
    """Why trials of this backbone train nothing; None if they train."""
    from trainer.footprint import measure_footprint

    if not spec.limits.given():
        return None
    footprint = measure_footprint(
        TrainConfig.from_dict({**spec.space.middle(), "backbone": backbone}),
        input_size=data.input_size,
        num_classes=data.num_classes,
        device=device,
        times_latency=spec.limits.max_latency_ms is not None,
    )
    complaint = spec.limits.complaint(footprint)
    if complaint is None:
        return None
    return f"{backbone} has {complaint}: its trials end before their first epoch"


def _pace_of(spec: StudySpec, found: "Sequence[Speed]") -> Pace:
    """The mean of all workers."""
    features = [speed.features for speed in found if speed.features is not None]
    fields = spec.space.middle()
    return Pace(
        train=statistics.fmean(speed.train for speed in found),
        evaluate=statistics.fmean(speed.evaluate for speed in found),
        features=statistics.fmean(features) if features else None,
        shares_features=bool(fields.get("weights") or fields.get("pretrained")),
    )


def _pace(what: str, pace: Pace, found: "Sequence[Speed]", work: "EpochWork") -> Finding:
    one = found[0]
    layout = " channels_last" if one.channels_last else ""
    split = f", {one.micro_batch} images at once" if one.micro_batch else ""
    once = ""
    if pace.features is not None:
        seconds = (work.num_trained + work.num_checked) / pace.features
        once = f" after {seconds:,.2g} s for the features of all images"
    return Finding(
        about="speed",
        level="ok",
        text=f"{what}: {pace.train:,.0f} images/s a worker with {len(found)} at work, "
        f"{work.num_trained / pace.train:,.0f} s an epoch ({one.precision}{layout}{split}){once}",
    )


def _end(end: Forecast, num_trials: int, num_workers: int) -> str:
    return (
        f"{num_trials} trials take about {duration(end.seconds)} on {num_workers} workers "
        f"({end.num_epochs:.0f} epochs in all)"
    )


def _hardware(devices: Sequence[str], images: int) -> Iterator[Finding]:
    """images: bytes of those that a worker holds."""
    import torch

    for device in dict.fromkeys(devices):
        if device.startswith("cuda"):
            found = torch.cuda.get_device_properties(device)
            driver = torch._C._cuda_getDriverVersion()  # type: ignore[attr-defined]
            words = (
                f"{found.name}, {found.total_memory / 2**30:.0f} GiB, driver for CUDA "
                f"{driver // 1000}.{driver % 1000 // 10}, torch built for {torch.version.cuda}, "
                f"workers on it: {devices.count(device)}"
            )
            yield Finding(about=device, level="ok", text=words)
        else:
            yield Finding(about=device, level="ok", text=f"{platform.machine()}, "
                          f"{num_cores()} cores, torch {torch.__version__}")  # fmt: skip
    if devices.count("cpu") > num_cores():
        words = f"{devices.count('cpu')} workers on {num_cores()} cores are slower than one a core"
        yield Finding(about="workers", level="warning", text=words)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    wanted = len(devices) * (images + 2**30)
    yield Finding(
        about="memory",
        level="warning" if wanted > 0.8 * memory else "ok",
        text=f"{memory / 2**30:.0f} GiB; {len(devices)} workers want about "
        f"{wanted / 2**30:.1f} GiB, {images / 2**20:.0f} MiB of images each",
    )
