"""Settle what a new study is: its data is looked at, and what was left out is chosen by it."""

import itertools
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.errors import UsageError
from hpo.executors.local import num_cores
from hpo.limits import Limits
from hpo.module_space import check_modules, settled_for_modules
from hpo.options import LaunchOptions
from hpo.own_modules import find_own_folders, is_own
from hpo.quantities import parse_duration
from hpo.rungs import first_rung
from hpo.space import SearchSpace, default_space
from hpo.spec import StudySpec
from trainer.config import MODULE, TrainConfig, is_module
from trainer.data.options import DataOptions, Progress

if TYPE_CHECKING:
    from trainer.data.dataset import ImageDataset


def check_backbones(fields: Mapping[str, Any]) -> None:
    """Raises ConfigError for a backbone that there is not."""
    from trainer.backbones import find_backbone

    find_own_folders(_choices(fields, "backbone"))
    for name in _choices(fields, "backbone"):
        find_backbone(name)


def settle(
    data: str, fields: Mapping[str, Any], options: LaunchOptions, progress: Progress
) -> tuple[StudySpec, "ImageDataset"]:
    """The spec of a new study, and the data that it was settled by.

    fields: of the space, as options give them. Raises UsageError, ConfigError or DataError.
    """
    from hpo.folding import work_of_an_epoch
    from trainer.balance import imported_smote
    from trainer.data.registry import load
    from trainer.device import available_devices
    from trainer.weights import digest

    import_paths = find_own_folders([data, *_choices(fields, "backbone")])
    seed = options.seed or 0
    data_options = DataOptions(**options.given_data_options())
    dataset = load(data, seed=seed, options=data_options, progress=progress)
    weights = {path: digest(Path(path)) for path in _choices(fields, "weights") if path}
    work = work_of_an_epoch(dataset, folds=options.folds, seed=seed)
    _check_memory(work.image_bytes, options)
    space = default_space(
        input_size=dataset.input_size,
        num_train=work.num_train,
        flips=dataset.flips,
        num_cores=num_cores() if available_devices() == ["cpu"] else None,
    )
    space = settled_for_modules(space, fields)
    space = space.replace(**_by_weights(weights, fields), **fields)
    space.check_together()
    check_modules(space, dataset)
    if "smote" in space.choices("balance"):
        imported_smote()
    _check_weights(space, dataset)
    _check_limits(options.limits, space, dataset)
    spec = StudySpec(
        data=data,
        import_paths=import_paths,
        data_options=data_options,
        fingerprint=dataset.fingerprint,
        space=space,
        seed=seed,
        folds=options.folds,
        objective=options.objective or "accuracy",
        precision=options.precision or StudySpec.precision,
        limits=options.limits,
        weights=weights,
        sampler=options.search.sampler or StudySpec.sampler,
        pruner=options.search.pruner or StudySpec.pruner,
        earlier=options.search.earlier,
        first_rung=first_rung(
            num_train=work.num_train, largest_batch=int(space.largest("batch_size"))
        ),
        lease_seconds=_seconds("HPO_LEASE_SECONDS", StudySpec.lease_seconds),
        stall_seconds=_seconds("HPO_STALL_SECONDS", StudySpec.stall_seconds),
    )
    return spec, dataset


def _choices(fields: Mapping[str, Any], name: str) -> tuple[Any, ...]:
    chosen = fields.get(name, ())
    return chosen if isinstance(chosen, tuple) else (chosen,)


def _by_weights(weights: Mapping[str, str], fields: Mapping[str, Any]) -> dict[str, Any]:
    """What the weights, and a frozen network, make of fields that nobody has set."""
    from trainer.weights import backbone_of

    chosen: dict[str, Any] = {}
    backbones = {backbone_of(Path(path)) for path in weights}
    for name in filter(None, backbones):
        if is_own(name) and "backbone" not in fields:  # a file doesn't decide what code runs
            option = "--module" if is_module(name) else "--backbone"
            raise UsageError(
                f"the weights are of a network of somebody's own code: {option} "
                f"{name.removeprefix(MODULE)[:80]!r}, if it is yours, has it run"
            )
    if len(backbones) == 1 and None not in backbones:
        chosen["backbone"] = tuple(backbones)
    if fields.get("trainable") == "head":  # the same pictures each epoch: features are kept
        chosen |= {"flip": False, "translate": 0}
    return {name: value for name, value in chosen.items() if name not in fields}


def _check_weights(space: SearchSpace, data: "ImageDataset") -> None:
    """Raises ConfigError if a backbone of the space can't start from the weights."""
    from trainer.backbones import build

    for backbone, weights, pretrained in itertools.product(
        *(space.choices(name) for name in ("backbone", "weights", "pretrained"))
    ):
        if bool(weights) != bool(pretrained):
            config = TrainConfig(backbone=backbone, weights=weights, pretrained=pretrained)
            build(config, input_size=data.input_size, num_classes=data.num_classes)


def _check_memory(image_bytes: int, options: LaunchOptions) -> None:
    """Raises UsageError if folds, which can't be mapped, are larger than what a user allows."""
    most = options.max_memory_bytes
    if options.folds is not None and most is not None and image_bytes > most:
        raise UsageError(
            f"--folds keeps {image_bytes / 2**20:,.0f} MiB of images in each worker's memory, more "
            f"than --max-memory: a smaller --image-size, or leave one of the two out"
        )


def _check_limits(limits: Limits, space: SearchSpace, data: "ImageDataset") -> None:
    """Raises UsageError if no backbone of the space is small enough; latency is for workers."""
    from trainer.footprint import measure_footprint

    sizes = replace(limits, max_latency_ms=None)
    if not sizes.given():
        return
    complaints = {}
    for backbone in space.choices("backbone"):
        if is_module(backbone):  # its size is a matter of its arguments: for workers
            return
        footprint = measure_footprint(
            TrainConfig(backbone=backbone),
            input_size=data.input_size,
            num_classes=data.num_classes,
            device="cpu",
            times_latency=False,
        )
        complaint = sizes.complaint(footprint)
        if complaint is None:
            return
        complaints[backbone] = complaint
    said = ". ".join(f"{name}: {complaint}" for name, complaint in complaints.items())
    raise UsageError(f"no backbone of the space keeps the limits. {said}")


def _seconds(variable: str, default: float) -> float:
    text = os.environ.get(variable)
    return default if text is None else parse_duration(variable, text)
