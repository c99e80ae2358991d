"""TFLite by way of litert-torch, for phones and small machines; run here by LiteRT."""

import io
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import torch

from trainer.export.model import Classifier
from trainer.export.source import ExportSource
from trainer.export.tflite_session import open_tflite


def to_bytes(source: ExportSource) -> bytes:
    """The file's content. It takes one image: the converter has no dynamic batch for all graphs."""
    # It prints its progress to stdout, where results go.
    with (
        redirect_stdout(io.StringIO()),
        tempfile.TemporaryDirectory(prefix="hpo-tflite-") as folder,
    ):
        import litert_torch

        path = Path(folder, "model.tflite")
        litert_torch.convert(source.model, (source.example[:1],)).export(str(path))
        return path.read_bytes()


def load(path: Path, _manifest: Mapping[str, Any]) -> Classifier:
    """The file, run by LiteRT's interpreter, image by image. The manifest isn't needed."""
    return open_tflite(path, num_threads=torch.get_num_threads())
