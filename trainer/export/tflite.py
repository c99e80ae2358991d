"""TFLite by way of litert-torch, for phones and small machines; run here by LiteRT."""

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.export.model import Classifier
from trainer.export.source import ExportSource
from trainer.export.tflite_session import open_tflite


def to_bytes(source: ExportSource) -> bytes:
    """The file's content. It takes one image: the converter has no dynamic batch for all graphs."""
    import litert_torch

    converted = litert_torch.convert(source.model, (source.example[:1],))
    with tempfile.TemporaryDirectory(prefix="hpo-tflite-") as folder:
        path = Path(folder, "model.tflite")
        converted.export(str(path))
        return path.read_bytes()


def load(path: Path, _manifest: Mapping[str, Any]) -> Classifier:
    """The file, run by LiteRT's interpreter, image by image. The manifest isn't needed."""
    return open_tflite(path, num_threads=torch.get_num_threads())
