"""Classify picture files with an export folder alone. Imports without torch."""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from trainer.config import ConfigError, DataError
from trainer.data.pictures import read_picture
from trainer.export.onnx_session import open_session
from trainer.export.tflite_session import open_tflite
from trainer.reading import read_small

if TYPE_CHECKING:
    from trainer.export.model import Classifier

_BATCH = 16
_LONGEST = 4096
"""Side of an image in pixels."""
_RUNTIMES: "dict[str, Callable[[Path], Classifier]]" = {
    "onnx": open_session,
    "onnx-fp16": open_session,
    "onnx-int8": open_session,
    "tflite": open_tflite,
}
"""What runs a file of each format without torch."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What the model takes a picture for."""

    file: str
    class_: str
    probability: float
    """Of that class, by softmax, in [0, 1]."""

    def to_dict(self) -> dict[str, Any]:
        """As in `hpo predict --json`."""
        return {"file": self.file, "class": self.class_, "probability": self.probability}


@dataclass(frozen=True, kw_only=True)
class _Manifest:
    """What prediction needs to know of an export. Raises ConfigError if it can't be that."""

    file: str
    class_names: tuple[str, ...]
    input_size: tuple[int, int, int]

    def __post_init__(self) -> None:
        names, size = self.class_names, self.input_size
        sides = all(type(side) is int and 0 < side <= _LONGEST for side in size)
        _check(sides and size[0] in (1, 3), "input_size", size)
        _check(bool(names) and all(type(name) is str for name in names), "class_names", names)
        # Whoever made the folder doesn't choose a file outside it.
        plain = self.file not in ("", ".", "..") and Path(self.file).name
        _check(plain == self.file, "file", self.file)


def predict(
    export_dir: Path,
    images: Sequence[Path],
    *,
    file_format: str = "onnx",
    say: Callable[[str], None] = lambda _line: None,
) -> list[Prediction]:
    """The most probable class of each picture, in their order.

    images: picture files, or folders of them, which are read to the bottom, in the order of names;
    what is no picture in a folder is passed over, and `say` is told. file_format: of the export's
    file to run, one of those that need no torch.

    Raises ConfigError if the folder is no export with such a file, DataError if a named file is no
    picture or a folder has none.
    """
    manifest = _read_manifest(export_dir, file_format)
    classify = _RUNTIMES[file_format](export_dir / manifest.file)
    predictions: list[Prediction] = []
    for files, pictures in _batches(_pictures(images, manifest.input_size, say)):
        logits = classify(np.stack(pictures))
        _check_finite(logits, files, export_dir)
        probabilities = _softmax(logits)
        if probabilities.shape[1] != len(manifest.class_names):
            raise ConfigError(
                f"{export_dir}: its manifest names {len(manifest.class_names)} classes, the model "
                f"knows {probabilities.shape[1]}"
            )
        for file, row in zip(files, probabilities, strict=True):
            best = int(row.argmax())
            name, probability = manifest.class_names[best], float(row[best])
            predictions.append(Prediction(file=str(file), class_=name, probability=probability))
    return predictions


_Picture = tuple[Path, npt.NDArray[np.uint8]]


def _pictures(
    named: Sequence[Path], input_size: tuple[int, int, int], say: Callable[[str], None]
) -> Iterator[_Picture]:
    """Each file and its picture, uint8 (C,H,W)."""
    for path in named:
        if path.is_dir():
            yield from _folder(path, input_size, say)
        else:
            yield path, read_picture(path, input_size=input_size)


def _folder(
    folder: Path, input_size: tuple[int, int, int], say: Callable[[str], None]
) -> Iterator[_Picture]:
    found = False
    for path in _files_below(folder):
        try:
            picture = read_picture(path, input_size=input_size)
        except DataError as error:
            say(f"passed over: {error}")
            continue
        found = True
        yield path, picture
    if not found:
        raise DataError(f"{folder}: no pictures in this folder")


def _files_below(folder: Path) -> Iterator[Path]:
    """Files in the order of their names, folders among them; links to folders aren't followed."""

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: can't be read: {error.strerror}") from error

    found = []
    for parent, _, names in os.walk(folder, onerror=refuse):
        found += [Path(parent, name) for name in names]
    yield from sorted(found)


def _batches(
    pictures: Iterator[_Picture],
) -> Iterator[tuple[list[Path], list[npt.NDArray[np.uint8]]]]:
    files: list[Path] = []
    batch: list[npt.NDArray[np.uint8]] = []
    for file, picture in pictures:
        files.append(file)
        batch.append(picture)
        if len(batch) == _BATCH:
            yield files, batch
            files, batch = [], []
    if batch:
        yield files, batch


def _read_manifest(export_dir: Path, file_format: str) -> _Manifest:
    path = export_dir / "manifest.json"
    try:
        values = json.loads(read_small(path))
        formats = values["formats"]
        there = [name for name in _RUNTIMES if formats.get(name) is not None]
        if file_format not in there:
            raise ConfigError(
                f"{export_dir} has no file of the format {file_format} that predict runs; it has: "
                f"{', '.join(there) or 'none'}"
            )
        channels, height, width = values["input_size"]
        return _Manifest(
            file=formats[file_format]["file"],
            class_names=_listed(values["class_names"]),
            input_size=(channels, height, width),
        )
    except OSError as error:
        raise ConfigError(f"{export_dir} is no export: {path}: {error.strerror}") from error
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is no manifest of an export") from error


def _listed(names: Any) -> tuple[Any, ...]:
    """Raises TypeError for a text, which has parts, too."""
    if not isinstance(names, list):
        raise TypeError(names)
    return tuple(names)


def _check_finite(logits: npt.NDArray[np.float32], files: Sequence[Path], export_dir: Path) -> None:
    """logits: (N,classes). Raises ConfigError: what isn't a number is the largest of nothing."""
    if logits.ndim != 2 or len(logits) != len(files):
        raise ConfigError(f"{export_dir}: its model gives {logits.shape} for {len(files)} images")
    for file, row in zip(files, logits, strict=True):
        if not np.isfinite(row).all():
            raise ConfigError(f"{export_dir}: its model gives no finite logits for {file}")


def _softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """(N,classes) -> (N,classes), rows sum to 1."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    powers: npt.NDArray[np.float64] = np.exp(shifted)
    scaled: npt.NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return scaled


def _check(holds: bool, field: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"the export's manifest can't have {field} {str(value)[:80]!r}")
