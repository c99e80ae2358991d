"""Classify picture files with an export folder alone. Imports without torch."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.config import ConfigError
from trainer.data.pictures import read_picture
from trainer.export.onnx_session import open_session

_BATCH = 16
_LONGEST = 4096
"""Side of an image in pixels."""


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

    onnx_file: str
    class_names: tuple[str, ...]
    input_size: tuple[int, int, int]

    def __post_init__(self) -> None:
        names, size = self.class_names, self.input_size
        _check(all(type(side) is int and 0 < side <= _LONGEST for side in size), "input_size", size)
        _check(bool(names) and all(type(name) is str for name in names), "class_names", names)
        # Whoever made the folder doesn't choose a file outside it.
        plain = self.onnx_file not in ("", ".", "..") and Path(self.onnx_file).name
        _check(plain == self.onnx_file, "onnx file", self.onnx_file)


def predict(export_dir: Path, images: Sequence[Path]) -> list[Prediction]:
    """The most probable class of each picture, in their order.

    Raises ConfigError if the folder is no export with an ONNX file, DataError if a file is no
    picture.
    """
    manifest = _read_manifest(export_dir)
    classify = open_session(export_dir / manifest.onnx_file)
    num_classes = len(manifest.class_names)
    predictions: list[Prediction] = []
    for start in range(0, len(images), _BATCH):
        files = images[start : start + _BATCH]
        pictures = [read_picture(file, input_size=manifest.input_size) for file in files]
        probabilities = _softmax(classify(np.stack(pictures)))
        if probabilities.shape[1] != num_classes:
            known = probabilities.shape[1]
            raise ConfigError(
                f"{export_dir}: its manifest names {num_classes} classes, the model knows {known}"
            )
        for file, row in zip(files, probabilities, strict=True):
            best = int(row.argmax())
            predictions.append(
                Prediction(
                    file=str(file),
                    class_=manifest.class_names[best],
                    probability=float(row[best]),
                )
            )
    return predictions


def _read_manifest(export_dir: Path) -> _Manifest:
    path = export_dir / "manifest.json"
    try:
        values = json.loads(path.read_bytes())
        onnx = values["formats"].get("onnx")
        if onnx is None:
            raise ConfigError(f"{export_dir} has no ONNX file, which predict runs")
        channels, height, width = values["input_size"]
        return _Manifest(
            onnx_file=onnx["file"],
            class_names=tuple(values["class_names"]),
            input_size=(channels, height, width),
        )
    except OSError as error:
        raise ConfigError(f"{export_dir} is no export: {path}: {error.strerror}") from error
    except ConfigError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{path} is no manifest of an export") from error


def _softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """(N,classes) -> (N,classes), rows sum to 1."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    powers: npt.NDArray[np.float64] = np.exp(shifted)
    scaled: npt.NDArray[np.float64] = powers / powers.sum(axis=1, keepdims=True)
    return scaled


def _check(holds: bool, field: str, value: object) -> None:
    if not holds:
        raise ConfigError(f"the export's manifest can't have {field} {value}")
