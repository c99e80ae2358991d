"""ONNX by way of torch.export, with a dynamic number of images: for any ONNX runtime."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.export.model import Classifier
from trainer.export.onnx_session import open_session
from trainer.export.source import ExportSource


def to_bytes(source: ExportSource) -> bytes:
    """The file's content, weights inside."""
    return source.onnx


def load(path: Path, _manifest: Mapping[str, Any]) -> Classifier:
    """The file, run by ONNX Runtime. The manifest isn't needed."""
    return open_session(path, num_threads=torch.get_num_threads())
