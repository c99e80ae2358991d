"""The command line: parse, call one function, print. Imports no torch."""

if __name__ == "__main__":  # python -m hpo.cli: before anything is imported from where it stands
    from hpo.__main__ import run as run_isolated

    run_isolated()

import atexit
import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from hpo.arguments import Earlier, Modules, Pruner, Sampler, Settings, Tries
from hpo.errors import ExitCode, UsageError, exit_code, one_line
from hpo.imports import import_all
from hpo.signals import interrupt_by_exception, leave_at_once
from hpo.terminal import LineFormatter, guard_output, say, say_lines

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    help="From a set of labelled images to the best classifier that this hardware can find.",
)

Study = Annotated[str | None, typer.Option("--study", metavar="NAME", help="Name of the study.")]
Storage = Annotated[
    str | None,
    typer.Option(
        "--storage",
        metavar="URL",
        help="postgresql://USER@HOST:PORT/DATABASE, else HPO_STORAGE, else the embedded Postgres.",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]


def _version(wanted: bool) -> None:
    if wanted:
        import importlib.metadata

        say(f"hpo {importlib.metadata.version('hpo-vision')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Options before any command."""


@app.command()
def launch(
    study: Study = None,
    data: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|PATH",
            help="digits, fashion-mnist, cifar10, another set of torchvision's, a folder of "
            "pictures, FILE.csv, Label Studio's FILE.json or lightning:PACKAGE:CLASS, a DataModule."
            "  [default: digits]",
        ),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="Side that pictures are scaled to.  [default: by the data]")
    ] = None,
    max_broken: Annotated[
        float | None, typer.Option(help="Share of pictures left out if broken.  [default: 0.01]")
    ] = None,
    max_memory: Annotated[
        str | None, typer.Option(metavar="2G", help="Of pictures, in a worker's memory at once.")
    ] = None,
    trials: Annotated[
        int | None, typer.Option(help="The study's whole budget.  [default: 50]")
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help="Of a trial that isn't stopped.  [default: by the data]")
    ] = None,
    workers: Annotated[
        str,
        typer.Option(
            metavar="N|auto",
            help="auto: as many on each GPU as together train most, without one one on each core.",
        ),
    ] = "auto",
    devices: Annotated[
        str | None, typer.Option(metavar="cuda:0,...", help="Devices to use.  [default: all]")
    ] = None,
    space: Annotated[
        Path | None, typer.Option(metavar="FILE.toml", help="Fields to search or to fix.")
    ] = None,
    backbone: Annotated[
        str | None, typer.Option(metavar="A,B", help="Backbones to choose among.")
    ] = None,
    module: Modules = None,
    weights: Annotated[
        Path | None,
        typer.Option(metavar="EXPORT|FILE", help="Start each trial from these weights."),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the study.  [default: 0]")] = None,
    folds: Annotated[
        int | None,
        typer.Option(
            metavar="K",
            help="Validate on K parts of train and validation in turn, at K times the cost.  "
            "[default: one split]",
        ),
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="accuracy, balanced_accuracy or macro_f1, on validation.  [default: accuracy]",
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Of all trainings: fp32, bf16, or auto, the fastest by measurement; the same seed "
            "gives the same values only with the same precision.  [default: auto]",
        ),
    ] = None,
    timeout: Annotated[
        str | None, typer.Option(metavar="2h", help="Stop after 90s, 30m or 2h.")
    ] = None,
    max_params: Annotated[
        float | None, typer.Option(help="Of the model's weights.  [default: any number]")
    ] = None,
    max_megabytes: Annotated[
        float | None, typer.Option(help="Of float32 weights.  [default: any size]")
    ] = None,
    max_latency_ms: Annotated[
        float | None, typer.Option(help="For one image on a worker.  [default: any]")
    ] = None,
    sampler: Sampler = None,
    pruner: Pruner = None,
    tries: Tries = None,
    earlier: Earlier = None,
    settings: Settings = None,
    detach: Annotated[
        bool, typer.Option("--detach", help="Leave it running in the background.")
    ] = False,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Search: create a study or go on with it, until its budget of trials is used up."""
    from hpo.executors.local import warm_up

    if not detach:  # it takes longest: all else is done beside it
        warm_up(for_modules=module is not None)
    import_all(["hpo.launch"])

    from hpo import launch as launching
    from hpo.limits import Limits
    from hpo.options import LaunchOptions
    from hpo.progress import reading_bar
    from hpo.quantities import parse_bytes, parse_duration
    from hpo.search import SearchOptions
    from hpo.status import how_to_go_on, launch_command, status_json

    options = LaunchOptions(
        study=study,
        data=data,
        image_size=image_size,
        max_broken=max_broken,
        max_memory_bytes=(None if max_memory is None else parse_bytes("--max-memory", max_memory)),
        trials=trials,
        epochs=epochs,
        space=space,
        backbones=backbone,
        modules=module,
        weights=weights,
        seed=seed,
        folds=folds,
        objective=objective,  # type: ignore[arg-type]  # LaunchOptions checks the name
        precision=precision,
        workers=workers,
        devices=devices,
        timeout_seconds=(None if timeout is None else parse_duration("--timeout", timeout)),
        limits=Limits(
            max_params=max_params, max_megabytes=max_megabytes, max_latency_ms=max_latency_ms
        ),
        search=SearchOptions(
            sampler=sampler,
            pruner=pruner,
            tries=tuple(tries or ()),
            earlier=earlier,
            settings=tuple(settings or ()),
        ),
    )
    import_all(["trainer.device", "trainer.data.registry"])
    launching.check_options(options)
    database = _open(storage)
    with reading_bar(sys.stderr) as progress:
        record = launching.prepare_study(database, options, progress)
    watch = _watch(database, record, options, storage=storage, command=launch_command(record.name))
    if detach:
        log = launching.detach(record, options, storage_url=storage)
        say(f"{record.name} runs in the background, log: {log}", err=True)
        return
    ended = watch.run()
    if as_json:
        _print_json(status_json(record.name, ended))
        return
    say(watch.view.line(ended))
    if ended.num_finished < ended.budget:
        say(f"stopped: {how_to_go_on(ended, launch_command(record.name))}")


@app.command()
def worker(
    study: Annotated[str, typer.Option(metavar="NAME", help="Name of the study.")],
    device: Annotated[
        str | None, typer.Option(metavar="cuda:0", help="[default: the first one there is]")
    ] = None,
    storage: Storage = None,
) -> None:
    """Run one worker here, for a study launched anywhere."""
    import_all(["hpo.worker"])

    from hpo.executors.local import cores_of_all_workers, settle_down
    from hpo.worker import Worker

    logging.getLogger().setLevel(logging.INFO)
    given_id = os.environ.get("HPO_WORKER_ID")
    cores_of_all_workers()  # what it raises is no trial's fault
    working = Worker(
        _database(storage),
        study,
        device=device if device and given_id else settle_down(device),
        given_id=given_id,
        place=os.environ.get("HPO_WORKER_PLACE"),
    )
    raise typer.Exit(working.run())


@app.command()
def status(
    study: Study = None,
    watch: Annotated[bool, typer.Option("--watch", help="Until Ctrl-C.")] = False,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """How far a study is."""
    import time

    from hpo.progress import ProgressView
    from hpo.status import sick_lines, status_json
    from storage.leases import reap
    from storage.snapshots import snapshot

    database = _open(storage)
    record = _the_study(database, study)
    reap(database, record.study_id)
    num_epochs = int(record.spec["space"]["epochs"])
    view = ProgressView(record.name, num_epochs=num_epochs, stream=sys.stdout)
    if watch:
        with view:
            while True:
                view.show(snapshot(database, record.study_id))
                time.sleep(1.0)
    now = snapshot(database, record.study_id)
    if as_json:
        _print_json(status_json(record.name, now))
        return
    say(view.line(now))
    for line in sick_lines(now):
        say(line)


@app.command()
def trials(study: Study = None, storage: Storage = None, as_json: AsJson = False) -> None:
    """The trials of a study, their values and why they ended."""
    from hpo.progress import params_text
    from hpo.status import trials_json
    from storage.snapshots import snapshot

    database = _open(storage)
    now = snapshot(database, _the_study(database, study).study_id)
    if as_json:
        _print_json(trials_json(now))
        return
    for trial in now.trials:
        value = "-" if trial.value is None else f"{trial.value:.4f}"
        reason = trial.attributes.get("reason", "")
        say(f"{trial.number:4d} {trial.state:8s} {value:>6s}  {params_text(trial)}  {reason}")


@app.command()
def studies(storage: Storage = None, as_json: AsJson = False) -> None:
    """The studies of a database."""
    from hpo.status import status_json
    from storage.snapshots import snapshot
    from storage.studies import find_studies

    database = _open(storage)
    found = [
        status_json(record.name, snapshot(database, record.study_id))
        for record in find_studies(database)
    ]
    if as_json:
        _print_json(found)
        return
    for row in found:
        best = "-" if row["best"] is None else f"{row['best']['value']:.4f}"
        finished = row["complete"] + row["pruned"]
        say(f"{row['study']}: {finished}/{row['budget']} trials, best {best}")


@app.command()
def stop(study: Study = None, storage: Storage = None) -> None:
    """Stop a study's workers, on every machine; `hpo launch` goes on."""
    from hpo.status import how_to_go_on, launch_command
    from storage.snapshots import snapshot
    from storage.studies import request_stop

    database = _open(storage)
    record = _the_study(database, study)
    request_stop(database, record.study_id)
    now = snapshot(database, record.study_id)
    if now.num_finished >= now.budget:
        say(f"all {now.budget} trials of {record.name} have ended: no worker is left to stop")
        return
    go_on = how_to_go_on(now, launch_command(record.name))
    say(f"its workers leave within moments: {go_on}")


@app.command()
def dashboard(
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8080,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    token_file: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Holds the token; else one is made up.")
    ] = None,
    no_token: Annotated[
        bool, typer.Option("--no-token", help="Let in every user of this machine.")
    ] = False,
    storage: Storage = None,
) -> None:
    """Watch studies in the browser."""
    from hpo.dashboard import serve
    from storage.schema import optuna_storage

    serve(
        optuna_storage(_open(storage)),
        host=host,
        port=port,
        token_file=token_file,
        no_token=no_token,
        ready=lambda link: say(f"dashboard: {link}"),
    )


@app.command()
def best(
    study: Study = None,
    export: Annotated[
        bool, typer.Option("--export", help="Retrain it, test it once, export it.")
    ] = False,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="[default: export-STUDY]")] = None,
    top_k: Annotated[int, typer.Option(help="Candidates to train again before one is chosen.")] = 3,
    seeds: Annotated[int, typer.Option(help="Fresh seeds for each; 0: no re-check.")] = 3,
    formats: Annotated[
        str | None,
        typer.Option(metavar="A,B", help="Of the export.  [default: all that need no extra]"),
    ] = None,
    workers: Annotated[
        str, typer.Option(metavar="N|auto", help="That train again, as for launch.")
    ] = "auto",
    devices: Annotated[
        str | None, typer.Option(metavar="cuda:0,...", help="As for launch.")
    ] = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """The best trial; with --export re-checked, retrained on all but the test, tested, exported."""
    from hpo import best as choosing
    from hpo.executors.local import worker_devices
    from hpo.options import LaunchOptions

    if export:
        from trainer.device import available_devices

        worker_devices(available_devices(), devices, workers)  # refused before anything is done
    database = _open(storage)
    record = _the_study(database, study)
    if export:
        report = choosing.export_best(
            database,
            record,
            choosing.BestOptions(
                out=out or Path(f"export-{record.name}"),
                top_k=top_k,
                num_seeds=seeds,
                formats=None if formats is None else tuple(formats.split(",")),
            ),
            run_workers=lambda child, alone=False: _watch(
                database,
                child,
                LaunchOptions(workers="1" if alone else workers, devices=devices),
                storage=storage,
                command=f"hpo best --export --study {record.name}",
                alone=alone,
            ).run(),
            say=_tell,
        )
    else:
        report = choosing.known_best(database, record, top_k=top_k, num_seeds=seeds)
    if as_json:
        _print_json(report.to_json())
    else:
        say_lines(report.lines())


@app.command()
def replay(
    trial: Annotated[int, typer.Option(metavar="N", help="Number of the trial.")],
    study: Study = None,
    epochs: Annotated[float, typer.Option(help="To train again, from the first.")] = 1.0,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Train a trial's first epochs again: exit code 0 if they give the same values, else 1."""
    from hpo.replay import replay_trial

    database = _open(storage)
    record = _the_study(database, study)
    replayed = replay_trial(database, record, trial, epochs=epochs, say=_tell)
    if as_json:
        _print_json(replayed.to_json())
    else:
        say_lines(replayed.lines())
    raise typer.Exit(ExitCode.DONE if replayed.is_same else ExitCode.UNEXPECTED)


@app.command()
def doctor(
    data: Annotated[
        str | None, typer.Option(metavar="NAME|PATH", help="As for launch.  [default: digits]")
    ] = None,
    image_size: Annotated[int | None, typer.Option(help="As for launch.")] = None,
    max_broken: Annotated[float | None, typer.Option(help="As for launch.")] = None,
    trials: Annotated[int | None, typer.Option(help="To forecast.  [default: 50]")] = None,
    epochs: Annotated[int | None, typer.Option(help="As for launch.")] = None,
    workers: Annotated[str, typer.Option(metavar="N|auto", help="As for launch.")] = "auto",
    devices: Annotated[
        str | None, typer.Option(metavar="cuda:0,...", help="As for launch.")
    ] = None,
    space: Annotated[Path | None, typer.Option(metavar="FILE.toml", help="As for launch.")] = None,
    backbone: Annotated[str | None, typer.Option(metavar="A,B", help="As for launch.")] = None,
    module: Modules = None,
    weights: Annotated[
        Path | None, typer.Option(metavar="EXPORT|FILE", help="As for launch.")
    ] = None,
    folds: Annotated[int | None, typer.Option(metavar="K", help="As for launch.")] = None,
    precision: Annotated[
        str | None, typer.Option(metavar="NAME", help="As for launch.  [default: auto]")
    ] = None,
    max_params: Annotated[float | None, typer.Option(help="As for launch.")] = None,
    max_megabytes: Annotated[float | None, typer.Option(help="As for launch.")] = None,
    max_latency_ms: Annotated[float | None, typer.Option(help="As for launch.")] = None,
    pruner: Pruner = None,
    settings: Settings = None,
    storage: Storage = None,
    as_json: AsJson = False,
) -> None:
    """Before a night is spent: look at database, hardware, data and space; forecast the end."""
    from hpo.doctor import examine
    from hpo.limits import Limits
    from hpo.options import LaunchOptions
    from hpo.progress import reading_bar
    from hpo.search import SearchOptions

    options = LaunchOptions(
        data=data,
        image_size=image_size,
        max_broken=max_broken,
        trials=trials,
        epochs=epochs,
        workers=workers,
        devices=devices,
        space=space,
        backbones=backbone,
        modules=module,
        weights=weights,
        folds=folds,
        precision=precision,
        limits=Limits(
            max_params=max_params, max_megabytes=max_megabytes, max_latency_ms=max_latency_ms
        ),
        search=SearchOptions(pruner=pruner, settings=tuple(settings or ())),
    )
    found = []
    with reading_bar(sys.stderr) as progress:
        for finding in examine(lambda: _opened(storage), options, progress):
            found.append(finding)
            if not as_json:
                say(f"{finding.level:8s} {finding.about}: {finding.text}")
    if as_json:
        _print_json([finding.to_json() for finding in found])
    raise typer.Exit(next((f.code for f in found if f.level == "problem"), ExitCode.DONE))


@app.command()
def pretrain(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the weights.")],
    data: Annotated[
        str, typer.Option(metavar="NAME|PATH", help="As for launch; labels are not looked at.")
    ] = "digits",
    backbone: Annotated[str, typer.Option(help="The network that learns.")] = "resnet8",
    method: Annotated[str, typer.Option(help="simclr or moco.")] = "simclr",
    epochs: Annotated[int, typer.Option(help="Passes over the images.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Images a step.")] = 256,
    lr: Annotated[float, typer.Option(help="Peak learning rate.")] = 2e-3,
    seed: Annotated[int, typer.Option(help="Of weights, order and views.")] = 0,
    image_size: Annotated[int | None, typer.Option(help="As for launch.")] = None,
    device: Annotated[
        str | None, typer.Option(metavar="cuda:0", help="Device.  [default: the first]")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Learn from images without their labels: weights for launch --weights DIR."""
    from hpo.pretrain import PretrainOptions, pretrain_to_folder
    from hpo.progress import reading_bar
    from trainer.data.options import DataOptions

    fields = {"backbone": backbone, "method": method, "epochs": epochs, "batch_size": batch_size,
              "lr": lr, "seed": seed}  # fmt: skip
    sized = {} if image_size is None else {"image_size": image_size}
    options = PretrainOptions(
        data=data, out=out, data_options=DataOptions(**sized), fields=fields, device=device
    )
    with reading_bar(sys.stderr) as progress:
        manifest = pretrain_to_folder(options, _tell, progress)
    if as_json:
        _print_json(manifest)
    else:
        say(f"{out}: start from it with hpo launch --weights {out}")


@app.command()
def space(as_json: AsJson = False) -> None:
    """The fields of a training: what --space and --set can search or fix."""
    from hpo.fields import describe_fields

    found = describe_fields()
    if as_json:
        _print_json([field.to_json() for field in found])
        return
    for field in found:
        say_lines(field.lines())


@app.command()
def predict(
    export_dir: Annotated[Path, typer.Argument(metavar="EXPORT_DIR")],
    images: Annotated[
        list[Path], typer.Argument(metavar="IMAGE...", help="Pictures, or folders of them.")
    ],
    file_format: Annotated[
        str,
        typer.Option("--format", help="Which file: onnx, onnx-fp16, onnx-int8 or tflite."),
    ] = "onnx",
    as_json: AsJson = False,
) -> None:
    """Classify pictures with an export alone."""
    from hpo.predict import predict as classify

    found = classify(export_dir, images, file_format=file_format, say=_tell)
    if as_json:
        _print_json(
            [{"file": p.file, "class": p.class_, "probability": p.probability} for p in found]
        )
        return
    for prediction in found:
        say(f"{prediction.file}: {prediction.class_} ({prediction.probability:.3f})")


def _database(storage: str | None) -> Any:
    from storage.database import Database

    return Database(storage)


def _opened(storage: str | None) -> Any:
    database = _database(storage)
    database.open()
    return database


def _open(storage: str | None) -> Any:
    from storage.schema import ensure_tables

    database = _opened(storage)
    ensure_tables(database)
    return database


def _watch(
    database: Any,
    record: Any,
    options: Any = None,
    *,
    storage: str | None,
    command: str,
    alone: bool = False,
) -> Any:
    """What runs a study's workers, in view. command: what to type after an interruption. alone:
    one worker, which has all cores."""
    from hpo import launch as launching
    from hpo.options import LaunchOptions
    from hpo.progress import ProgressView
    from hpo.watch import Watch

    executor = launching.make_executor(
        record,
        options or LaunchOptions(),
        storage_url=storage,
        command_line=main,
        say=_tell,
        alone=alone,
    )
    num_epochs = int(record.spec["space"]["epochs"])
    return Watch(
        database=database,
        record=record,
        executor=executor,
        view=ProgressView(
            record.name,
            num_epochs=num_epochs,
            stream=sys.stderr,
            shows_best=record.parent_id is None,
        ),
        lease_seconds=float(record.spec["lease_seconds"]),
        command=command,
    )


def _the_study(database: Any, name: str | None) -> Any:
    """The study of this name, or the only one there is."""
    from storage.studies import find_studies

    found = find_studies(database)
    names = ", ".join(record.name for record in found) or "none"
    for record in found:
        if record.name == name or (name is None and len(found) == 1):
            return record
    if name is None:
        raise UsageError(f"which study? Give --study: there is {names}")
    raise UsageError(f"no study {name[:80]!r} here: there is {names}")


def _tell(words: str) -> None:
    """A line of progress."""
    say(words, err=True)


def _print_json(document: Any) -> None:
    # all but ASCII is escaped, as JSON has it
    say_lines(json.dumps(document, indent=1, allow_nan=False).split("\n"))


def _check_current_folder() -> None:
    """Raises UsageError if it was deleted: relative paths mean nothing, and MKL doesn't load."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UsageError("the folder that you stand in was deleted: cd into another") from error


def main(arguments: list[str] | None = None) -> None:
    """Run the command; each error that a user can cause is one line and its exit code.

    arguments: of the process, unless given.
    """
    guard_output()
    handler = logging.StreamHandler()
    handler.setFormatter(LineFormatter("%(asctime)s %(levelname)s %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    try:
        interrupt_by_exception()
        _check_current_folder()
        app(arguments, prog_name="hpo")
    except KeyboardInterrupt:
        sys.exit(ExitCode.INTERRUPTED)
    except Exception as error:
        code = exit_code(error)
        if code is None:
            raise
        say(f"hpo: {one_line(error)}", err=True)
        sys.exit(code)


def run() -> NoReturn:
    """main() as a process of its own, which then ends at once.

    Taking torch apart is a second of work for Python, while a user waits for the prompt.
    """
    try:
        main()
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            raise
        code = end.code or 0
    leave_at_once()
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
    except BrokenPipeError:  # of `hpo trials | head`
        pass
    except OSError as error:
        if not code:
            say(f"hpo: {one_line(error)}", err=True)
            code = ExitCode.UNEXPECTED
    sys.stderr.flush()
    os._exit(code)
