"""Settle what a new study is: its data is looked at, and what was left out is chosen by it."""

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from hpo.errors import UsageError
from hpo.executors.local import num_cores
from hpo.limits import Limits
from hpo.options import LaunchOptions
from hpo.quantities import parse_duration
from hpo.rungs import first_rung
from hpo.space import SearchSpace, default_space
from hpo.spec import StudySpec
from trainer.config import ConfigError, TrainConfig
from trainer.data.options import DataOptions, Progress

if TYPE_CHECKING:
    from trainer.data.dataset import ImageDataset


def check_backbones(fields: Mapping[str, Any]) -> None:
    """Raises ConfigError for a backbone that there is not."""
    from trainer.backbones import BACKBONES
    from trainer.config import unknown_name

    named = fields.get("backbone", ())
    for name in named if isinstance(named, tuple) else (named,):
        if name not in BACKBONES:
            raise ConfigError(unknown_name("backbone", name, BACKBONES))


def settle(
    data: str, fields: Mapping[str, Any], options: LaunchOptions, progress: Progress
) -> tuple[StudySpec, "ImageDataset"]:
    """The spec of a new study, and the data that it was settled by.

    fields: of the space, as options give them. Raises UsageError, ConfigError or DataError.
    """
    from trainer.data.registry import load
    from trainer.device import available_devices

    seed = options.seed or 0
    data_options = DataOptions(**options.given_data_options())
    dataset = load(data, seed=seed, options=data_options, progress=progress)
    space = default_space(
        input_size=dataset.input_size,
        num_train=len(dataset.train),
        flips=dataset.flips,
        num_cores=num_cores() if available_devices() == ["cpu"] else None,
    )
    space = space.replace(**fields)
    _check_limits(options.limits, space, dataset)
    spec = StudySpec(
        data=data,
        data_options=data_options,
        fingerprint=dataset.fingerprint,
        space=space,
        seed=seed,
        limits=options.limits,
        sampler=options.search.sampler or StudySpec.sampler,
        pruner=options.search.pruner or StudySpec.pruner,
        earlier=options.search.earlier,
        first_rung=first_rung(
            num_train=len(dataset.train), largest_batch=int(space.largest("batch_size"))
        ),
        lease_seconds=_seconds("HPO_LEASE_SECONDS", StudySpec.lease_seconds),
        stall_seconds=_seconds("HPO_STALL_SECONDS", StudySpec.stall_seconds),
    )
    return spec, dataset


def _check_limits(limits: Limits, space: SearchSpace, data: "ImageDataset") -> None:
    """Raises UsageError if no backbone of the space is small enough; latency is for workers."""
    from trainer.footprint import measure_footprint

    sizes = replace(limits, max_latency_ms=None)
    if not sizes.given():
        return
    complaints = {}
    for backbone in space.choices("backbone"):
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
