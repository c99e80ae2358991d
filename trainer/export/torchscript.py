"""TorchScript by tracing: one file that libtorch and PyTorch run without this project."""

import io
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from trainer.export.model import Classifier, as_classifier
from trainer.export.source import ExportSource
from trainer.modules import traceable


def to_bytes(source: ExportSource) -> bytes:
    """The file's content."""
    buffer = io.BytesIO()
    with _without_deprecation(), torch.inference_mode(), traceable(source.model):
        # verify compares the file with the model, on real images.
        traced = torch.jit.trace(  # type: ignore[no-untyped-call]
            source.model, source.example, check_trace=False
        )
        torch.jit.save(traced, buffer)
    return buffer.getvalue()


def load(path: Path, _manifest: Mapping[str, Any]) -> Classifier:
    """The file, run by PyTorch's TorchScript interpreter. The manifest isn't needed."""
    with _without_deprecation():
        module = torch.jit.load(path, map_location="cpu")  # type: ignore[no-untyped-call]
    return as_classifier(module)


@contextmanager
def _without_deprecation() -> Iterator[None]:
    """torch warns that TorchScript is deprecated: the user has asked for that format."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated")
        yield
