"""hpo pretrain: weights for studies to start from, learnt from images without their labels."""

import contextlib
import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hpo.errors import UsageError, one_line
from hpo.own_modules import find_own_folders
from storage.checkpoints import TrialCheckpoints, checkpoint_root, checkpoint_url
from storage.errors import LeaseLost
from storage.home import home
from trainer.data.options import DataOptions, Progress
from trainer.data.registry import settled_source

if TYPE_CHECKING:
    from trainer.data.dataset import ImageDataset
    from trainer.pretraining import PretrainConfig, PretrainReport

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class PretrainOptions:
    """What `hpo pretrain` was told. fields: of PretrainConfig, those that were given."""

    data: str
    out: Path
    data_options: DataOptions
    fields: dict[str, Any]
    device: str | None = None


def pretrain_to_folder(options: PretrainOptions, say: Say, progress: Progress) -> dict[str, Any]:
    """Pretrain on all images but the test split's; the manifest of the folder that was written.

    The same command goes on from where an earlier one was cut. Raises ConfigError, DataError,
    UsageError.
    """
    from trainer.data.registry import load
    from trainer.device import available_devices, choose_plan
    from trainer.export.publish import MADE_BY, check_out, new_folder
    from trainer.export.safetensors import weights_to_bytes
    from trainer.pretraining import PretrainConfig, pretrain

    check_out(options.out)
    config = PretrainConfig(**options.fields)
    source = settled_source(options.data)
    find_own_folders([source, config.backbone])
    data = load(source, seed=0, options=options.data_options, progress=progress)
    data = data.with_validation_in_training()
    plan = choose_plan(
        config.train_config,
        input_size=data.input_size,
        num_classes=data.num_classes,
        device=options.device or available_devices()[0],
        data_bytes=data.train.images.nbytes,
    )
    plan = dataclasses.replace(plan, micro_batch=None)  # contrast needs the batch as a whole
    checkpoints = _checkpoints(config, data)
    try:
        resume = checkpoints.take_over()
    except OSError as error:
        raise UsageError(
            f"no checkpoints can be kept: {one_line(error)}; set HPO_CHECKPOINTS or HPO_HOME"
        ) from error
    if resume is not None:
        say("going on where an earlier pretraining was cut")
    last: PretrainReport | None = None
    with _told_apart(), contextlib.closing(pretrain(config, data, plan, resume=resume)) as reports:  # type: ignore[type-var]
        for last in reports:
            say(
                f"epoch {last.epoch} of {config.epochs}: loss {last.loss:.4f}, "
                f"{last.images_per_second:,.0f} images/s"
            )
            try:
                checkpoints.save(last.epoch, last.state.to_bytes())
            except LeaseLost as error:
                raise UsageError("the same pretraining was started elsewhere: leaving") from error
    assert last is not None
    manifest = {
        "made_by": MADE_BY,
        "kind": "pretrained weights",
        "config": {"backbone": config.backbone},
        "pretraining": dataclasses.asdict(config),
        "input_size": list(data.input_size),
        "data": {"source": data.name, "fingerprint": data.fingerprint,
                 "images": len(data.train)},
        "loss": last.loss,
        "seconds": last.seconds,
    }  # fmt: skip
    with new_folder(options.out) as folder:
        content = weights_to_bytes(last.state.backbone, mean=data.mean, std=data.std)
        (folder / "model.safetensors").write_bytes(content)
        (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    checkpoints.remove()
    return manifest


@contextlib.contextmanager
def _told_apart() -> Iterator[None]:
    """What a training raises, with the way out."""
    from trainer.config import CheckpointError, OutOfMemory, TrainingDiverged

    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}: another --seed begins a new one") from error
    except TrainingDiverged as error:
        raise TrainingDiverged(f"{error}: give a smaller --lr") from error
    except OutOfMemory as error:
        raise OutOfMemory(f"{error}: give a smaller --batch-size") from error


def _checkpoints(config: "PretrainConfig", data: "ImageDataset") -> TrialCheckpoints:
    """A place of its own for each pretraining; whoever comes last has it."""
    root = checkpoint_root() if checkpoint_url() is None else home() / "checkpoints"
    about = json.dumps([dataclasses.asdict(config), data.fingerprint], sort_keys=True)
    key = int.from_bytes(hashlib.sha256(about.encode()).digest()[:7], "big")
    return TrialCheckpoints(root, study_key=key, trial_number=0, token=time.time_ns())
