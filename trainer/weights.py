"""Weights that a training starts from: torchvision's published ones, an export's, or a file's."""

import dataclasses
import functools
import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from trainer.config import ConfigError, TrainConfig
from trainer.data.dataset import ImageDataset
from trainer.heads import head_name, is_below
from trainer.reading import check_regular, read_small

logger = logging.getLogger(__name__)

Statistics = tuple[tuple[float, ...], tuple[float, ...]]
"""Mean and std of images / 255, a channel."""
_MOST_NAMED = 4


@dataclass(frozen=True, kw_only=True, eq=False)
class Weights:
    """A network's tensors by torch's names, and what its images were normalised with."""

    tensors: Mapping[str, Tensor]
    origin: str
    """For people: where they are from."""
    statistics: Statistics | None
    """None: not known."""


def starting_weights(config: TrainConfig, published: Callable[[], Any] | None) -> Weights | None:
    """What the config starts from; None: random weights.

    published: of this backbone (Backbone.weights). Raises ConfigError if they aren't there or can't
    be read.
    """
    if config.weights:
        return read_weights(Path(config.weights))
    return _published(config.backbone, published) if config.pretrained else None


def with_statistics_of(weights: Weights | None, data: ImageDataset) -> ImageDataset:
    """The data, normalised as the weights are used to be fed; its own statistics if unknown."""
    if weights is None or weights.statistics is None:
        return data
    mean, std = (_for_channels(values, data.input_size[0]) for values in weights.statistics)
    return dataclasses.replace(data, mean=mean, std=std)


def load_weights(model: nn.Module, weights: Weights, *, stem: tuple[str, ...]) -> None:
    """Copy the weights into the model; its head, and a stem of another size, stay as they are.

    stem: names of the first stage's modules: the small-image stem isn't that of large images. A
    first convolution of another number of channels is adapted. Raises ConfigError if another
    layer differs.
    """
    own, head = model.state_dict(), head_name(model)
    first = next((key for key, tensor in own.items() if tensor.ndim == 4), "")
    fitting, differing = {}, []
    for key, tensor in own.items():
        given = weights.tensors.get(key)
        if given is not None and (key == first or is_below(key, stem)):
            given = _with_channels(given, tensor)
        if is_below(key, (head,)):
            continue
        if given is not None and given.shape == tensor.shape:
            fitting[key] = given
        elif not (key.endswith("num_batches_tracked") or is_below(key, stem)):
            differing.append(key.rpartition(".")[0])
    if differing or not fitting:
        names = sorted(set(differing)) or ["all"]
        more = f" and {len(names) - _MOST_NAMED} more" if len(names) > _MOST_NAMED else ""
        raise ConfigError(
            f"{weights.origin} is of another network: these layers differ: "
            f"{', '.join(names[:_MOST_NAMED])}{more}"
        )
    model.load_state_dict(fitting, strict=False)
    left = sorted({key.rpartition(".")[0] for key in own if key not in fitting})
    logger.info("%s: left at random: %s", weights.origin, ", ".join(left))


def backbone_of(path: Path) -> str | None:
    """The backbone whose weights an export of ours has; None for other files."""
    folder = path if path.is_dir() else path.parent
    try:
        manifest = json.loads(read_small(folder / "manifest.json"))
        return str(manifest["config"]["backbone"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def weights_file(path: Path) -> Path:
    """The file that a folder's weights are in."""
    return path / "model.safetensors" if path.is_dir() else path


def digest(path: Path) -> str:
    """sha256 of the weights' file. Raises ConfigError if it can't be read."""
    try:
        check_regular(weights_file(path))
        with weights_file(path).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise ConfigError(f"weights {path} can't be read: {error.strerror}") from error


def read_weights(path: Path) -> Weights:
    """An export of ours (its folder, or its model.safetensors), any safetensors, or a .pth file.

    Raises ConfigError, in one line, if there is nothing that can be read.
    """
    file = weights_file(path)
    try:
        check_regular(file)
        found = file.stat()
    except OSError as error:
        raise ConfigError(f"weights {path}: {error.strerror}: {file}") from error
    return _read_weights(file, found.st_mtime_ns, found.st_size)


@functools.lru_cache(maxsize=1)
def _read_weights(file: Path, _mtime_ns: int, _size: int) -> Weights:
    """One file is kept: each trial of a worker starts from it."""
    try:
        tensors = _tensors(file)
    except Exception as error:  # torch.load raises whatever a broken file leads to
        reason = " ".join(str(error).split())[:120]
        raise ConfigError(f"weights {file} can't be read: {reason}") from error
    return Weights(
        tensors={name.removeprefix("backbone."): value for name, value in tensors.items()},
        origin=f"weights {file}",
        statistics=_statistics(tensors),
    )


def _tensors(file: Path) -> dict[str, Tensor]:
    """By name; a .pth may have them under `state_dict` or `model`, as is usual."""
    if file.suffix == ".safetensors":
        return safetensors.torch.load_file(file)
    content: Any = torch.load(file, map_location="cpu", weights_only=True)
    for name in ("state_dict", "model"):
        content = content.get(name, content) if isinstance(content, dict) else content
    tensors = dict(content) if isinstance(content, dict) else {}
    if not tensors or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError("it holds no state_dict, tensors by name")
    return tensors


def _statistics(tensors: Mapping[str, Tensor]) -> Statistics | None:
    """Of an export of ours, which has them among its tensors."""
    if not {"mean", "std"} <= set(tensors):
        return None
    mean, std = (tuple(map(float, tensors[name].flatten())) for name in ("mean", "std"))
    return mean, std


def _published(name: str, published: Callable[[], Any] | None) -> Weights:
    """Downloaded when they are not there."""
    if published is None:
        raise ConfigError(f"pretrained: there are no published weights of {name}")
    found = published()
    path = Path(torch.hub.get_dir(), "checkpoints", Path(found.url).name)
    try:
        tensors = found.get_state_dict(
            progress=False, check_hash=True, weights_only=True, map_location="cpu"
        )
    except OSError as error:
        raise ConfigError(
            f"pretrained {name}: {path} isn't there, and can't be downloaded ({error})"
        ) from error
    except Exception as error:  # torch.load raises whatever a broken file leads to
        raise ConfigError(
            f"pretrained {name}: {path} can't be read; delete it to have it downloaded again"
        ) from error
    fed = found.transforms()
    statistics = (tuple(fed.mean), tuple(fed.std))
    return Weights(tensors=tensors, origin=f"pretrained {name}", statistics=statistics)


def _with_channels(given: Tensor, own: Tensor) -> Tensor:
    """A first convolution for another number of channels, so that a grey picture excites it alike.

    given, own: (out,in,kH,kW); the answer has own's `in` if all else is the same.
    """
    same_but_for_channels = given.shape[:1] + given.shape[2:] == own.shape[:1] + own.shape[2:]
    if given.shape == own.shape or given.ndim != 4 or not same_but_for_channels:
        return given
    return given.sum(dim=1, keepdim=True).div(own.shape[1]).expand_as(own).clone()


def _for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    if len(values) == channels:
        return values
    return (sum(values) / len(values),) * channels
